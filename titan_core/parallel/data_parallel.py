"""Data parallelism: FSDP2, HSDP or DDP over one interface, or nothing on one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from titan_core.config.schema import Config
from titan_core.parallel.mesh import Layout, Mesh

Kind = Literal["none", "ddp", "fsdp"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def kind_of(layout: Layout, cpu_offload: bool) -> Kind:
    """Say which form a layout takes. Host offload is FSDP's, so it needs FSDP even on one device."""
    if layout.dp_shard > 1 or cpu_offload:
        return "fsdp"
    return "ddp" if layout.dp_replicate > 1 else "none"


@dataclass
class DataParallel:
    """A laid-out task: `module` is what the trainer calls."""

    module: nn.Module
    kind: Kind
    degree: int

    @property
    def loss_scale(self) -> int:
        """Gradients are averaged over ranks; a loss is a sum: multiply it by this before the backward."""
        return self.degree

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        """Run forward and backward of one microbatch; only the last one of a step reduces gradients."""
        if self.kind == "fsdp":
            module: Any = self.module
            module.set_requires_gradient_sync(last)
            module.set_is_last_backward(last)
        skip = self.kind == "ddp" and not last
        with self.module.no_sync() if skip else nullcontext():  # pyright: ignore[reportCallIssue]
            yield


def apply(task: nn.Module, blocks: Iterable[nn.Module], mesh: Mesh, config: Config) -> DataParallel:
    """Shard or replicate a task. `blocks` become FSDP units; all the rest is one more unit."""
    kind = kind_of(mesh.layout, config.training.enable_cpu_offload)
    if kind == "fsdp":
        _shard(task, blocks, mesh, config)
    return DataParallel(task, kind, mesh.layout.dp)


def replicate(parallel: DataParallel, mesh: Mesh, device: torch.device) -> None:
    """Wrap a materialised task in DDP, where the layout asks for it; DDP cannot wrap meta tensors."""
    if parallel.kind == "ddp":
        parallel.module = nn.parallel.DistributedDataParallel(
            parallel.module,
            device_ids=[device.index] if device.type == "cuda" else None,
            process_group=mesh.replicate.get_group(),
            gradient_as_bucket_view=True,
            init_sync=False,  # every rank has drawn the same weights: they depend on seed and name only
        )


def _shard(task: nn.Module, blocks: Iterable[nn.Module], mesh: Mesh, config: Config) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    training = config.training
    options: dict[str, Any] = {
        "mesh": mesh.fsdp,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=DTYPES[training.mixed_precision_param],
            reduce_dtype=DTYPES[training.mixed_precision_reduce],
            cast_forward_inputs=False,  # rotary tables and other fp32 inputs stay what they are
        ),
    }
    if training.enable_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    # "default" frees after the forward; it would keep only under pipelining, where a block runs many times a step
    reshard = config.parallelism.fsdp_reshard_after_forward != "never"
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard, **options)
    always = config.parallelism.fsdp_reshard_after_forward == "always"
    fully_shard(task, reshard_after_forward=always, **options)
