"""Pipeline parallelism: a declared model cut into stages, run by torch's schedules.

All microbatches of a step go through one run of the schedule, so that the pipeline fills and drains once a step, and
not once for every microbatch of gradient accumulation.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from titan_core.config.layout import SPLIT_BACKWARD
from titan_core.config.schema import Parallelism
from titan_core.declare.sharding import Sharding, matches
from titan_core.parallel.data_parallel import DataParallel
from titan_core.parallel.mesh import Mesh
from titan_core.parallel.stages import Cut
from titan_core.parallel.ties import Ties
from titan_core.parallel.views import Passage, wrap_forward
from titan_core.runtime.errors import MachineError

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage


class Stage(nn.Module):
    """A piece of a model as a step of a pipeline: a stream and a batch in, a stream out, or at the end a loss (P).

    Schedules pass tensors only (those of torch 2.11 fail with other things), so the batches of a step lie in `waiting`,
    in the order in which every schedule sends microbatches forward.
    """

    def __init__(self, task: Any, *, last: bool) -> None:
        super().__init__()
        self.task = task
        self.last = last
        self.waiting: deque[Any] = deque()

    def forward(self, x: Tensor, batch: Any = None) -> Tensor:
        """Run the piece; `x` is (B, T) tokens at the first stage and (B, T, D) at the others."""
        if batch is None:
            batch = self.waiting.popleft()
        hidden = self.task.hidden(x, batch)
        return torch.hstack([self.task.loss(hidden, batch)]) if self.last else hidden  # 1-d, and no view


def cut(model: nn.Module, stage: Cut, sharding: Sharding) -> None:
    """Take out of a whole model on the meta device what other stages hold; names stay as they are."""
    for name, _ in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if name in stage.elsewhere:
            delattr(model.get_submodule(parent), child)
        elif matches(name, sharding.first + sharding.last) and name not in stage.modules | stage.borrowed:
            setattr(model.get_submodule(parent), child, Passage())


def let_streams_pass(model: nn.Module, stage: Cut) -> None:
    """Make borrowed modules, laid out, pass on what the stage before has sent; tokens they look up."""
    for name in sorted(stage.borrowed):
        wrap_forward(model.get_submodule(name), lambda forward, x: x if x.is_floating_point() else forward(x))


@dataclass(frozen=True)
class Stream:
    """What flows between stages: (B, T / split, dim), T being a rank's tokens."""

    split: int
    dim: int
    dtype: torch.dtype


@dataclass
class Pipeline:
    """This rank's stages of a laid-out model, with the interface of `DataParallel`."""

    stages: list[DataParallel]
    cuts: list[Cut]
    group: ProcessGroup
    schedule: Any
    pipes: list[PipelineStage]
    micro_rows: int
    degree: int
    stream: Stream
    ties: Ties
    scale: Tensor | None = None
    total: Tensor | None = None

    def forward_backward(self, batches: Sequence[Any], scale: Tensor) -> Tensor:
        """Do what `DataParallel.forward_backward` does; ranks without the last stage return 0."""
        self.ties.follow()
        micro = [piece for batch in batches for piece in split_rows(batch, self.micro_rows)]
        self.scale = scale * self.degree
        self.total = torch.zeros_like(scale)
        for pipe in self.pipes:
            pipe.has_backward = True
            pipe.clear_runtime_states()
        args = [(piece.tokens,) for piece in micro] if self.pipes[0].is_first else None
        for stage in self.stages:
            module: Any = stage.module
            module.waiting = deque(micro)
        self.schedule._step_microbatches(args, None, micro, [], False)
        self.ties.add_gradients()
        return self.total

    def loss(self, output: Tensor, _batch: Any) -> Tensor:
        """Note the loss of a microbatch, and return what its backward begins with."""
        assert self.total is not None
        assert self.scale is not None
        self.total += output.detach()
        return (output * self.scale).sum()

    def evaluate(self, batch: Any) -> Tensor:
        """Send a batch forward through all stages; ranks without the last one return 0."""
        self.ties.follow()
        loss = torch.zeros((), device=batch.tokens.device)
        for piece in split_rows(batch, self.micro_rows):
            x = piece.tokens
            for parallel, pipe, stage in zip(self.stages, self.pipes, self.cuts, strict=True):
                x = self._receive(x, piece, stage, pipe)
                x = parallel.module(x, batch=piece)
                if stage.last:
                    loss = loss + x[0]
                else:
                    self._send(x, stage, pipe)
        return loss

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Do what `DataParallel.evaluation` does."""
        with ExitStack() as stack:
            for stage in self.stages:
                stack.enter_context(stage.evaluation())
            yield

    def counted_elsewhere(self) -> Sequence[nn.Parameter]:
        """Return the parameters that other ranks hold too, and count in a norm."""
        return self.ties.counted_elsewhere

    def _receive(self, x: Tensor, piece: Any, stage: Cut, pipe: PipelineStage) -> Tensor:
        """Return the stream from the stage before, which may lie on this rank."""
        if stage.first or self._owner(pipe, stage.index - 1) == self.group.rank():
            return x
        batch, tokens = piece.tokens.shape
        shape = (batch, tokens // self.stream.split, self.stream.dim)
        x = torch.empty(shape, dtype=self.stream.dtype, device=pipe.device)
        dist.recv(x, group=self.group, group_src=self._owner(pipe, stage.index - 1))
        return x

    def _send(self, x: Tensor, stage: Cut, pipe: PipelineStage) -> None:
        owner = self._owner(pipe, stage.index + 1)
        if owner != self.group.rank():
            dist.send(x.contiguous(), group=self.group, group_dst=owner)

    @staticmethod
    def _owner(pipe: PipelineStage, index: int) -> int:
        return pipe.stage_index_to_group_rank[index]


def split_rows(batch: Any, rows: int) -> list[Any]:
    """Cut a batch into microbatches of so many rows."""
    total = batch.tokens.shape[0]
    fields = ("tokens", "labels", "documents", "tokens_ahead", "labels_ahead")
    whole = {name: x for name in fields if (x := getattr(batch, name)) is not None}
    return [
        dataclasses.replace(batch, **{name: x[start : start + rows] for name, x in whole.items()})
        for start in range(0, total, rows)
    ]


def build(
    stages: list[DataParallel],
    cuts: list[Cut],
    mesh: Mesh,
    config: Parallelism,
    *,
    microbatches: int,
    tokens: int,
    stream: Stream,
    loss_parts: int,
    ties: Ties,
    device: torch.device,
) -> Pipeline:
    """Join materialised stages to a pipeline that runs so many microbatches a step, each of rows of `tokens`."""
    from torch.distributed.pipelining import PipelineStage  # and the compiler's front end with it: 0.7 s

    group, rows = mesh.pp_group, config.pipeline_parallel_microbatch_size
    ids = torch.empty(rows, tokens, dtype=torch.int64, device="meta")
    between = torch.empty(
        rows, tokens // stream.split, stream.dim, dtype=stream.dtype, device="meta", requires_grad=True
    )
    loss = torch.empty(loss_parts, device="meta", requires_grad=True)
    pipes = [
        PipelineStage(
            stage.module,
            where.index,
            where.count,
            device,
            input_args=(ids if where.first else between,),
            output_args=(loss if where.last else between,),
            group=group,
            dw_builder=_nothing_left if where.last and loss_parts > 1 else None,
        )
        for stage, where in zip(stages, cuts, strict=True)
    ]
    pipeline = Pipeline(stages, cuts, group, None, pipes, rows, stages[0].degree, stream, ties)
    pipeline.schedule = _schedule(pipeline, config, microbatches)
    return pipeline


def _nothing_left() -> Callable[[], None]:
    """Return the second half of a backward that has been done in one: for layers that predict further tokens.

    They use the same weights one after the other, and the halves that torch makes then meet in what is freed already
    (2.14: "backward through the graph a second time"; before, such gradients were counted twice, pytorch#180952).
    """
    return lambda: None


def _schedule(pipeline: Pipeline, config: Parallelism, microbatches: int) -> Any:
    options: dict[str, Any] = {"loss_fn": pipeline.loss, "scale_grads": False}
    if config.pipeline_parallel_schedule in SPLIT_BACKWARD and torch.__version__ < "2.12":
        raise MachineError(
            f"torch {torch.__version__} cannot run {config.pipeline_parallel_schedule}: it cannot split backwards of "
            "autograd functions that are written in Python",
            tip="use torch 2.14 or newer, or Interleaved1F1B",
        )
    from torch.distributed.pipelining import schedules

    if config.pipeline_parallel_schedule_csv:
        schedule = schedules._PipelineScheduleRuntime(pipeline.pipes, microbatches, **options)
        schedule._load_csv(str(Path(config.pipeline_parallel_schedule_csv)))
        return schedule
    cls: Any = schedules.get_schedule_class(config.pipeline_parallel_schedule)
    if issubclass(cls, schedules.PipelineScheduleSingle):
        return cls(pipeline.pipes[0], microbatches, **options)
    return cls(pipeline.pipes, microbatches, **options)


def most_in_flight(pipeline: Pipeline, rank: int, microbatches: int, kept: dict[int, int]) -> int:
    """Return the most bytes that wait for their backward on a pipeline rank, given those of a microbatch by stage."""
    orders = getattr(pipeline.schedule, "pipeline_order", None)
    if not orders:  # a schedule of one stage a rank
        (size,) = kept.values()
        early = pipeline.schedule.__class__.__name__ == "Schedule1F1B"
        return size * (min(microbatches, pipeline.group.size() - rank) if early else microbatches)
    waiting = most = 0
    for action in orders[rank]:
        for part in getattr(action, "sub_actions", None) or [action]:
            if part is None:
                continue
            kind = part.computation_type.name
            change = (kind == "FORWARD") - (kind in ("FULL_BACKWARD", "BACKWARD_WEIGHT"))
            waiting += kept[part.stage_index] * change
            most = max(most, waiting)
    return most
