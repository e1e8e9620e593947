"""A step of a run on ranks that are not there: the real engine on tensors without data.

A fake process group stands for all ranks; this process plays one rank of each kind of pipeline stage. So what is
planned is what would run: the same modules, views, hooks and collectives.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from titan_core.config.schema import Config
from titan_core.declare.family import Family
from titan_core.nn.planning import plan_for
from titan_core.observe.ledger import Key, Ledger
from titan_core.parallel import stages, ties
from titan_core.parallel.context import Cutter
from titan_core.parallel.data_parallel import DTYPES
from titan_core.parallel.mesh import Layout, Mesh
from titan_core.parallel.parallelize import find
from titan_core.parallel.pipeline import most_in_flight
from titan_core.parallel.stages import Cut
from titan_core.training.build import LaidOut, join, lay_out
from titan_core.training.kinds import Kind, kind_of


@dataclass(frozen=True)
class RankPlan:
    """What a rank of one kind holds and does in a step; bytes.

    `activations` are those kept between forward and backward, of all microbatches in flight; `gathered` the parameters
    that FSDP has gathered. `peak` is less than the sum where these are not there at once, and more where results of
    single operations are large. `collectives` map (name, axis) to calls and bytes a step.
    """

    ranks: int
    stages: tuple[int, ...]
    blocks: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    peak: int
    collectives: dict[Key, tuple[int, int]]


def simulate(
    config: Config, family: Family, sizes: Any, layout: Layout, global_batch: int, device_type: str
) -> list[RankPlan]:
    """Plan one rank of every kind: pipeline ranks with equally many blocks, in the middle, are one kind."""
    kinds: dict[Any, list[int]] = {}
    for pp_rank in range(layout.pp):
        kinds.setdefault(_kind(config, family, sizes, layout, pp_rank), []).append(pp_rank)
    plans = []
    each = layout.world_size // layout.pp
    for pp_ranks in kinds.values():
        with _fake_world(layout.world_size, pp_ranks[0] * each):
            plan = _plan_rank(config, family, sizes, layout, pp_ranks[0] * each, global_batch, device_type)
        plans.append(dataclasses.replace(plan, ranks=len(pp_ranks) * each))
    return plans


def _kind(config: Config, family: Family, sizes: Any, layout: Layout, pp_rank: int) -> Any:
    """Return what tells one pipeline rank's work from another's; how much is in flight grows towards the first rank."""
    if layout.pp == 1:
        return None
    with torch.device("meta"):
        names = [name for name, _ in family.build(sizes).named_modules()]
    mine = stages.owned(config.parallelism, stages.cuts(config.parallelism, family, sizes, names), pp_rank)
    return tuple((cut.first, cut.last, len(cut.modules)) for cut in mine)


@contextmanager
def _fake_world(size: int, rank: int) -> Iterator[None]:
    """Be one rank of a job whose other ranks are not there, and whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _plan_rank(
    config: Config, family: Family, sizes: Any, layout: Layout, rank: int, global_batch: int, device_type: str
) -> RankPlan:
    config = dataclasses.replace(
        config,
        compile=dataclasses.replace(config.compile, enable=False),
        model=dataclasses.replace(config.model, converters=[]),  # they change how products are formed, not what is held
    )
    mesh = Mesh(layout, "cpu", rank)
    laid = lay_out(config, mesh, family, sizes, torch.device(device_type))
    kind = kind_of(config, family, sizes)
    step = _Step(config, mesh, kind, sizes, global_batch // (config.training.local_batch_size * layout.dp))
    cuts = [part.cut for part in laid.parts if part.cut is not None]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        for part in laid.parts:
            part.model.to_empty(device="cpu")
    models = [part.model for part in laid.parts]
    parameters = [p for model in models for p in model.parameters()]
    tied = ties.find(models, cuts, mesh, config.parallelism)
    ledger = Ledger(_axes(mesh) | {group.group_name: "pipeline" for _, group in tied.groups})
    with plan_for(device_type), fake:
        ledger.hold(parameters)
        with ledger:
            step.run(laid, ledger)
            tied.add_gradients()
    kept = list(step.kept.values())
    if layout.pp > 1:
        whole = join(config, torch.device("cpu"), mesh, sizes, laid, global_batch)
        in_flight = most_in_flight(whole, mesh.at["pp"], step.count, step.kept)
    else:
        in_flight = kept[0]
    weights = sum(map(_bytes, parameters))
    optimizer = 2 * sum(map(_bytes, ties.by_name(models).values()))
    return RankPlan(
        ranks=1,
        stages=tuple(cut.index for cut in cuts) or (0,),
        blocks=sum(len(find(part.model, family.blocks)) for part in laid.parts),
        parameters=sum(_local(p).numel() for p in parameters),
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        activations=in_flight,
        gathered=ledger.peak_resized,
        peak=ledger.peak + optimizer + max(0, in_flight - max(kept)),
        collectives=step.collectives(ledger),
    )


class _Step:
    """Runs the first and the last microbatch of a step through this rank's stages, and multiplies.

    `kept` are the bytes that a microbatch leaves between forward and backward, by stage.
    """

    def __init__(self, config: Config, mesh: Mesh, kind: Kind, sizes: Any, microbatches: int) -> None:
        self.config, self.mesh, self.kind, self.sizes = config, mesh, kind, sizes
        self.rows = config.training.local_batch_size
        self.count = microbatches
        if mesh.layout.pp > 1:
            self.rows = config.parallelism.pipeline_parallel_microbatch_size
            self.count = microbatches * config.training.local_batch_size // self.rows
        self.kept: dict[int, int] = {}
        self._first: tuple[Counter[Key], Counter[Key]] = Counter(), Counter()

    def run(self, laid: LaidOut, ledger: Ledger) -> None:
        """Compute with whatever the tensors are."""
        method = self.config.parallelism.context_parallel_rotate_method
        batch = Cutter(self.mesh.layout, self.mesh.at["cp"], method)(self.kind.blank(self.rows))
        for last in [False, True][-min(2, self.count) :]:
            for stage, part in zip(laid.stages, laid.parts, strict=True):
                if self.mesh.layout.pp > 1 and stage.kind == "fsdp":  # a pipeline keeps what it gathered for a step
                    module: Any = stage.module
                    module.set_reshard_after_backward(last)
                with stage.accumulate(last):
                    self._forward_backward(stage.module, part.cut, batch, ledger)
            if not last:
                self._first = ledger.calls.copy(), ledger.bytes.copy()

    def _forward_backward(self, module: nn.Module, cut: Cut | None, batch: Any, ledger: Ledger) -> None:
        before = ledger.sizes()
        if cut is None:
            out = module(batch)
        else:
            out = module(batch.tokens if cut.first else self._stream(batch), batch=batch)
        after = ledger.sizes()
        out.backward(torch.ones_like(out))  # which shows what was gathered, by freeing it
        self.kept[0 if cut is None else cut.index] = ledger.without_resized(after) - ledger.without_resized(before)

    def collectives(self, ledger: Ledger) -> dict[Key, tuple[int, int]]:
        """Return calls and bytes of a whole step: the microbatches between the first and the last are like the first,
        but for parameters that a pipeline gathers once a step."""
        between = max(0, self.count - 2)
        found = {}
        for key in ledger.calls:
            repeated = between if self.mesh.layout.pp == 1 or key[1] not in ("fsdp", "replicate") else 0
            calls, size = self._first[0][key], self._first[1][key]
            found[key] = ledger.calls[key] + repeated * calls, ledger.bytes[key] + repeated * size
        return found

    def _stream(self, batch: Any) -> Tensor:
        """Return what the stage before would send."""
        split = self.mesh.layout.tp if self.config.parallelism.enable_sequence_parallel else 1
        rows, tokens = batch.tokens.shape
        dtype = DTYPES[self.config.training.mixed_precision_param]
        return torch.empty(rows, tokens // split, self.sizes.dim, dtype=dtype, requires_grad=True)


def _axes(mesh: Mesh) -> dict[str, str]:
    """Name the process groups by the axes that they run along."""
    named = {"replicate": mesh.replicate.get_group(), "fsdp": mesh.parameters["fsdp"].get_group()}
    named |= {"tensor": mesh.tp.get_group(), "context": mesh.cp_group, "pipeline": mesh.pp_group}
    if mesh.layout.ep > 1:
        named |= {"expert": mesh.experts["ep"].get_group(), "expert fsdp": mesh.experts["expert_fsdp"].get_group()}
    found: dict[str, str] = {}
    for axis, group in named.items():  # axes over the same ranks may share a group
        known = found.get(group.group_name)
        found[group.group_name] = axis if known is None else f"{known}, {axis}"
    return found


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _bytes(x: Tensor) -> int:
    local = _local(x)
    return local.numel() * local.element_size()
