"""One engine that lays any family's model over a mesh: no model is named here.

Order: tensor and context parallelism, which decide what a rank computes; then activation checkpointing, then
compilation of each block, then sharding; so that exchanges inside of a block are recomputed and compiled with it, and
FSDP's gathers stay outside of what is compiled. Gathers by views are recomputed and compiled too, so they come first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titan_core.config.schema import Compile, Config
from titan_core.declare.family import Family
from titan_core.declare.sharding import matches
from titan_core.nn.layers import set_compute_dtype, set_parameter_dtype
from titan_core.parallel import activation_checkpoint, context, data_parallel, expert, pipeline, stages, tensor
from titan_core.parallel.data_parallel import DTYPES, DataParallel
from titan_core.parallel.exchange import Wire
from titan_core.parallel.mesh import Mesh
from titan_core.parallel.stages import Cut


class Parallel(Protocol):
    """A laid-out model, whole or in stages."""

    def forward_backward(self, batches: Sequence[Any], scale: Tensor) -> Tensor:
        """Add the gradients of scale times the sum of all losses; return this rank's sum of losses, fp32, (P) as
        `scale`: one for each part of the task's loss."""
        ...

    def evaluate(self, batch: Any) -> Tensor:
        """Return the sum of the losses of this rank's part of a batch, fp32; 0 where the loss is not computed."""
        ...

    def evaluation(self) -> AbstractContextManager[None]:
        """Evaluate in a `with` block; after it the model trains again, and holds nothing that it did not before."""
        ...

    def counted_elsewhere(self) -> Sequence[nn.Parameter]:
        """Return the parameters of this rank that another one counts in a norm, as it holds them too."""
        ...


@dataclass(frozen=True)
class Part:
    """A model, or the piece of it that is one pipeline stage: the bare module and its task.

    `wires` are narrow forms in which the residual stream may travel to regions, by their names.
    """

    model: nn.Module
    task: Any
    cut: Cut | None = None
    wires: Mapping[str, Wire] = field(default_factory=dict)


def parts_of(family: Family, sizes: Any, mesh: Mesh, config: Config) -> list[tuple[nn.Module, Cut | None]]:
    """Build on the meta device what this rank holds of a model: all of it, or its pipeline stages."""
    with torch.device("meta"):
        model = _build(family, sizes, config)
        if mesh.layout.pp == 1:
            return [(model, None)]
        names = [name for name, _ in model.named_modules()]
        every = stages.cuts(config.parallelism, family, sizes, names)
        found: list[tuple[nn.Module, Cut | None]] = []
        for stage in stages.owned(config.parallelism, every, mesh.at["pp"]):
            piece = _build(family, sizes, config)
            pipeline.cut(piece, stage, family.sharding)
            found.append((piece, stage))
        return found


def _build(family: Family, sizes: Any, config: Config) -> nn.Module:
    model = family.build(sizes)
    set_parameter_dtype(model, DTYPES[config.training.dtype])
    return model


def parallelize(part: Part, family: Family, mesh: Mesh, config: Config) -> tuple[DataParallel, list[str]]:
    """Lay out one part on the meta device; returns it and one line for each thing that was done."""
    model, parallel = part.model, config.parallelism
    set_compute_dtype(model, DTYPES[config.training.mixed_precision_param])
    sharding = family.sharding.routed_by_parts() if mesh.layout.routed_by_parts else family.sharding
    if mesh.layout.ep > 1:
        expert.apply(model, sharding, mesh, parallel.expert_parallel_dispatch, parallel.expert_parallel_capacity)
    if mesh.layout.tp > 1:
        tensor.apply(model, sharding, mesh.tp, sequence=parallel.enable_sequence_parallel, wires=part.wires)
    if mesh.layout.routed_by_parts:
        expert.count_whole_sequences(model, sharding, mesh.tp.get_group())
    if mesh.layout.cp > 1:
        context.apply(model, sharding, mesh, parallel.context_parallel_rotate_method)
        expert.count_whole_sequences(model, sharding, mesh.cp_group)
    if part.cut is not None:
        pipeline.let_streams_pass(model, part.cut)
    units = find(model, family.blocks)
    module = part.task if part.cut is None else pipeline.Stage(part.task, last=part.cut.last)
    kind = data_parallel.kind_of(mesh.layout, config)
    forced = activation_checkpoint.forced_shapes(units, config.activation_checkpoint)
    if kind == "simple":
        data_parallel.apply_views(module, units, mesh, config)
    said = [f"recompute {activation_checkpoint.apply(units, config.activation_checkpoint, forced)}"]
    if config.compile.enable and "model" in config.compile.components:
        _compile(units, config.compile)
        said.append(f"compile {len(units)} blocks ({config.compile.backend})")
    if kind == "fsdp":
        experts = find(model, sharding.experts) if mesh.layout.ep > 1 else []
        data_parallel.apply_hooks(module, units, experts, mesh, config)
    return DataParallel(module, kind, mesh.layout.dp * mesh.layout.cp), said


def find(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """Return the modules whose names match a glob, `*` standing for one name, in order."""
    return [module for name, module in model.named_modules() if matches(name, patterns)]


def _compile(units: Sequence[nn.Module], config: Compile) -> None:
    """Compile each block: equal blocks share their compiled code, so the cost does not grow with depth."""
    for unit in units:
        unit.forward = torch.compile(unit.forward, backend=config.backend, fullgraph=True)
