"""Data parallelism: FSDP2, HSDP or DDP over one interface, or nothing on one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from titan_core.config.schema import Config
from titan_core.parallel import simple_fsdp
from titan_core.parallel.mesh import Layout, Mesh

Kind = Literal["none", "ddp", "fsdp", "simple"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def kind_of(layout: Layout, config: Config) -> Kind:
    """Say which form a layout takes.

    Host offload is FSDP's, so it needs FSDP even on one device; DDP does not know parameters that are split in other
    ways, so replicas of those are FSDP with one shard.
    """
    alone = layout.dp * layout.cp == 1
    if alone and not config.training.enable_cpu_offload:
        return "none"
    if config.parallelism.data_parallel_backend == "simple":
        return "simple"
    only_replicas = layout.dp_replicate == layout.world_size and not config.training.enable_cpu_offload
    return "ddp" if only_replicas else "fsdp"


@dataclass
class DataParallel:
    """A laid-out module: what it is called with is a batch, or for a stage of a pipeline a stream and a batch."""

    module: nn.Module
    kind: Kind
    degree: int

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Run forward and backward of one microbatch; only the last one of a step reduces gradients."""
        if self.kind == "fsdp":
            module: Any = self.module
            module.set_requires_gradient_sync(last)
            module.set_is_last_backward(last)
        elif self.kind == "simple":
            simple_fsdp.set_requires_gradient_sync(self.module, last)
        skip = self.kind == "ddp" and not last
        with self.module.no_sync() if skip else nullcontext():  # pyright: ignore[reportCallIssue]
            yield

    def forward_backward(self, batches: Sequence[Any], scale: Tensor) -> Tensor:
        """Add the gradients of scale times the sum of all losses, over all data ranks; return this rank's sums, fp32.

        Gradients are averaged over ranks while a loss is a sum: hence the factor.
        """
        total = torch.zeros_like(scale)
        for index, batch in enumerate(batches):
            with self.accumulate(last=index == len(batches) - 1):
                loss = self.module(batch)
                (loss * (scale * self.degree)).sum().backward()
            total += loss.detach()
        return total

    def evaluate(self, batch: Any) -> Tensor:
        """Return the sum of the losses of this rank's part of a batch, fp32."""
        return self.module(batch)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Evaluate, and then train again. What stays gathered after a forward waits for a backward, which does not come
        here: memory would stay up, and a checkpoint would find whole tensors where this rank should have a shard."""
        self.module.eval()
        yield
        self.module.train()
        if self.kind == "fsdp":
            from torch.distributed.fsdp import FSDPModule

            for unit in self.module.modules():
                if isinstance(unit, FSDPModule):
                    unit.reshard()

    def counted_elsewhere(self) -> Sequence[nn.Parameter]:
        """Return the parameters that other ranks hold too, and count in a norm: none."""
        return ()


def replicate(parallel: DataParallel, mesh: Mesh, device: torch.device) -> None:
    """Wrap a materialised task in DDP, where the layout asks for it; DDP cannot wrap meta tensors."""
    if parallel.kind == "ddp":
        parallel.module = nn.parallel.DistributedDataParallel(
            parallel.module,
            device_ids=[device.index] if device.type == "cuda" else None,
            process_group=mesh.replicate.get_group(),
            gradient_as_bucket_view=True,
            broadcast_buffers=False,  # what a rank has counted is its own
            init_sync=False,  # every rank has drawn the same weights: they depend on seed and name only
        )


def apply_views(module: nn.Module, blocks: Sequence[nn.Module], mesh: Mesh, config: Config) -> None:
    """Shard a module on the meta device by views."""
    simple_fsdp.apply(module, blocks, mesh, *_dtypes(config))


def apply_hooks(
    module: nn.Module, blocks: Sequence[nn.Module], experts: Sequence[nn.Module], mesh: Mesh, config: Config
) -> None:
    """Shard a module on the meta device by FSDP2. `blocks` become its units; all the rest is one more unit.

    `experts`, in blocks, are units of their own, as they are split over ranks that share all else.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    param_dtype, reduce_dtype = _dtypes(config)
    options: dict[str, Any] = {
        "mesh": mesh.fsdp,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            cast_forward_inputs=False,  # rotary tables and other fp32 inputs stay what they are
        ),
    }
    if config.training.enable_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    policy = config.parallelism.fsdp_reshard_after_forward
    # under pipelining a block runs many times a step, and would be gathered as often
    reshard = policy == "always" or (policy == "default" and mesh.layout.pp == 1)
    for unit in experts:
        placed = _expert_dim(mesh.layout.expert_fsdp)
        fully_shard(
            unit, reshard_after_forward=reshard, shard_placement_fn=placed, **{**options, "mesh": mesh.expert_fsdp}
        )
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard, **options)
    fully_shard(module, reshard_after_forward=policy == "always", **options)
    _prefetch(blocks, config.parallelism.fsdp_prefetch)


def shard_frozen(module: nn.Module, mesh: Mesh) -> None:
    """Shard a loaded module that is not trained, which every rank must then call equally often; replicas hold one each.

    The units are the blocks of its first list of modules, and all the rest. Parameters come to the device unit by unit.
    """
    from torch.distributed.fsdp import fully_shard

    blocks = next(list(part) for part in module.modules() if isinstance(part, nn.ModuleList))
    for unit in (*blocks, module):
        fully_shard(unit, mesh=mesh.parameters["fsdp"], reshard_after_forward=True)


def _expert_dim(shards: int) -> Callable[[nn.Parameter], Shard]:
    """Shard experts by their number where it divides, as only then all ranks have some; else each of them."""

    def place(parameter: nn.Parameter) -> Shard:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return Shard(0 if local.shape[0] % shards == 0 else 1)

    return place


def _dtypes(config: Config) -> tuple[torch.dtype, torch.dtype]:
    return DTYPES[config.training.mixed_precision_param], DTYPES[config.training.mixed_precision_reduce]


def _prefetch(blocks: Sequence[Any], ahead: int) -> None:
    """Gather so many blocks ahead of the one that computes; one is what FSDP does by itself."""
    if ahead == 1:
        return
    for order, prefetch in ((blocks, "forward"), (blocks[::-1], "backward")):
        for number, block in enumerate(order):
            getattr(block, f"set_modules_to_{prefetch}_prefetch")(list(order[number + 1 : number + 1 + ahead]))
