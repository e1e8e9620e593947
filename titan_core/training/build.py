"""From a config to a run that is ready to step: every part built in the order in which they need each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from titan_core.config.schema import Config
from titan_core.data.loader import BatchLoader
from titan_core.declare.family import Family
from titan_core.models import resolve
from titan_core.optim.build import build_optimizer, set_lr
from titan_core.parallel import data_parallel, legal, pipeline, ties
from titan_core.parallel.context import Cutter
from titan_core.parallel.data_parallel import DTYPES, DataParallel
from titan_core.parallel.materialise import materialise, stored_buffers
from titan_core.parallel.mesh import Layout, Mesh
from titan_core.parallel.parallelize import Parallel, Part, parallelize, parts_of
from titan_core.parallel.pipeline import Pipeline
from titan_core.parallel.stages import last_stage_rank
from titan_core.quantization import convert, precompute_scales, wires
from titan_core.runtime import determinism
from titan_core.runtime.distributed import World
from titan_core.runtime.errors import ConfigError, Problem
from titan_core.runtime.events import Listener, Note
from titan_core.training.balance import Balance, prepare, set_backend
from titan_core.training.kinds import Kind, kind_of


@dataclass
class Parts:
    """A built run: what the trainer steps, saves and loads. The caller of the library may own the loop instead."""

    config: Config
    world: World
    mesh: Mesh
    family: Family
    sizes: Any
    seed: int
    global_batch: int
    kind: Kind
    models: list[nn.Module]
    task: Any
    parallel: Parallel
    cutter: Cutter
    optimizer: torch.optim.Optimizer
    loader: BatchLoader
    balance: Balance
    said: list[str]
    reports: list[Callable[[], str]]

    @property
    def sample_tokens(self) -> int:
        """Tokens that the run counts for one sample."""
        return next(iter(self.family.lengths(self.config).values()))

    @property
    def microbatches(self) -> int:
        """Microbatches a step and rank."""
        return self.global_batch // (self.config.training.local_batch_size * self.mesh.layout.dp)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by the names that the family declares."""
        return ties.by_name(self.models)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's buffers by name, those that are stored."""
        return {name: b for model in self.models for name, b in stored_buffers(model).items()}

    def update(self, lr: float) -> None:
        """Move the weights by their gradients, and the biases of experts by their loads."""
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.balance.update()

    @property
    def counts(self) -> bool:
        """Does this rank's loss count?

        Others have the same one, or none: one of each tensor-parallel group speaks for all, at the last pipeline stage.
        """
        at = self.mesh.at
        return at["tp"] == 0 and at["pp"] == last_stage_rank(self.config.parallelism)


def build(config: Config, world: World, listener: Listener, global_batch: int | None = None) -> Parts:
    """Build all parts. `global_batch` is that of a run to be resumed, where the config leaves it open."""
    layout = Layout.of(config.parallelism, world.size)
    mesh = Mesh(layout, world.device.type, world.rank)
    seed = determinism.agree_on_seed(config.training.seed)
    if config.training.deterministic:
        determinism.use_deterministic_algorithms()
    determinism.seed_all(seed, mesh.seed_offset())
    family, sizes = resolve(config.model)
    wrong = legal.problems(config, layout, family, sizes)
    if wrong:
        raise ConfigError(wrong)
    kind = kind_of(config, family, sizes)
    kind.open(mesh, world.device, seed, listener)
    rows = global_batch_size(config, layout, global_batch, listener)
    built = build_model(config, world, mesh, family, sizes, seed, rows)
    balance = prepare(built.models, family, sizes, config, mesh, rows)
    optimizer = build_optimizer(ties.by_name(built.models), family.parameters(sizes), config.optimizer)
    loader = kind.loader(mesh, rows, listener)
    cutter = Cutter(layout, mesh.at["cp"], config.parallelism.context_parallel_rotate_method)
    return Parts(
        config, world, mesh, family, sizes, seed, rows, kind, built.models, built.task, built.parallel, cutter,
        optimizer, loader, balance, built.said, built.reports,
    )  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A laid-out model: its bare modules (one, or this rank's pipeline stages), the task, and how it runs."""

    models: list[nn.Module]
    task: Any
    parallel: Parallel
    said: list[str]
    reports: list[Callable[[], str]]


@dataclass(frozen=True)
class LaidOut:
    """What this rank holds of a model, on the meta device: its parts and, in the same order, how they are run.

    `said` is what was done; `reports` say, after the first step, what came of it.
    """

    parts: list[Part]
    stages: list[DataParallel]
    said: list[str]
    reports: list[Callable[[], str]]


def lay_out(config: Config, mesh: Mesh, family: Family, sizes: Any, device: torch.device) -> LaidOut:
    """Build a model on the meta device and lay it out over a mesh."""
    make_task, said = kind_of(config, family, sizes).tasks(mesh)
    reports: list[Callable[[], str]] = []
    if config.parallelism.enable_async_tensor_parallel and config.compile.enable:  # a plan compiles nothing
        from titan_core.parallel import async_tensor  # the compiler: 1 s

        reports.append(async_tensor.enable(mesh.tp.get_group(), mesh.device_type).report)
    parts: list[Part] = []
    laid: list[DataParallel] = []
    for model, cut in parts_of(family, sizes, mesh, config):
        grouped = set_backend(model, config, device)
        quantized = convert(model, family, sizes, config, mesh.layout, device)
        parts.append(Part(model, make_task(model, cut is not None), cut, wires(model, family, config)))
        stage, words = parallelize(parts[-1], family, mesh, config)
        laid.append(stage)
        precompute_scales(stage.module, config)
        said = quantized + words + grouped + said if len(parts) == 1 else said
    return LaidOut(parts, laid, said, reports)


def build_model(
    config: Config, world: World, mesh: Mesh, family: Family, sizes: Any, seed: int, global_batch: int
) -> Built:
    """Build a model on the meta device, lay it out, and draw its weights."""
    laid = lay_out(config, mesh, family, sizes, world.device)
    host = torch.device("cpu") if config.training.enable_cpu_offload else world.device
    for part, stage in zip(laid.parts, laid.stages, strict=True):
        materialise(part.model, family.parameters(sizes), seed, host, buffers_on=world.device)
        data_parallel.replicate(stage, mesh, world.device)
    models = [part.model for part in laid.parts]
    task = laid.parts[-1].task
    if mesh.layout.pp == 1:
        return Built(models, task, laid.stages[0], laid.said, laid.reports)
    joined = join(config, world.device, mesh, sizes, laid, global_batch)
    return Built(models, task, joined, laid.said, laid.reports)


def join(config: Config, device: torch.device, mesh: Mesh, sizes: Any, laid: LaidOut, rows: int) -> Pipeline:
    """Make a pipeline of stages; what flows between them is this rank's part of the residual stream."""
    layout, parallel = mesh.layout, config.parallelism
    split = layout.tp if parallel.enable_sequence_parallel else 1
    stream = pipeline.Stream(split, sizes.dim, DTYPES[config.training.mixed_precision_param])
    micro = parallel.pipeline_parallel_microbatch_size
    cuts = [part.cut for part in laid.parts if part.cut is not None]
    return pipeline.build(
        laid.stages,
        cuts,
        mesh,
        parallel,
        microbatches=rows // (micro * layout.dp),
        tokens=config.training.seq_len // layout.cp,
        stream=stream,
        loss_parts=len(laid.parts[-1].task.factors),
        ties=ties.find([part.model for part in laid.parts], cuts, mesh, parallel),
        device=device,
    )


def global_batch_size(config: Config, layout: Layout, resumed: int | None, listener: Listener) -> int:
    """Return the sequences a step: the config's, or those of the run that is resumed, or one microbatch a rank."""
    unit = config.training.local_batch_size * layout.dp
    asked = config.training.global_batch_size
    rows = asked if asked > 0 else (resumed or unit)
    if asked <= 0 and resumed and resumed != unit:
        listener(Note(f"global batch stays {resumed} sequences, as in the run that is resumed"))
    if rows % unit:
        raise ConfigError(
            [
                Problem(
                    "training.global_batch_size",
                    f"{rows} sequences a step do not divide into {config.training.local_batch_size} "
                    f"(training.local_batch_size) x {layout.dp} data-parallel ranks",
                    tip=f"use a multiple of {unit}, or another local batch size",
                )
            ]
        )
    return rows
