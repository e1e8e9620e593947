"""Tensor and sequence parallelism of any declared model (Shoeybi et al. 2019, Korthikanti et al. 2022).

A parameter is stored as a DTensor on the tensor-parallel axis, and seen by its module as this rank's plain part.
Between the regions of a block the residual stream is split along the sequence; a region gathers it, works on its share
of heads or columns, and its partial sums are added while they are scattered back. Without sequence parallelism the
stream is whole on every rank, and a region's results are all-reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from titan_core.declare.sharding import Sharding, matches, within
from titan_core.nn.loss import IGNORE, LossAndSlope, loss_and_slope
from titan_core.parallel.exchange import (
    Enter,
    Gather,
    Leave,
    NarrowGather,
    Scaled,
    Scatter,
    Whole,
    Wire,
    all_gather,
    all_reduce,
)
from titan_core.parallel.views import Passage, split, wrap_forward

_TOKENS = 1  # the dimension of (B, T, D) along which the stream is split


@dataclass(frozen=True)
class Stream:
    """How the residual stream begins, enters a region and leaves it, and ends.

    Several streams (a tuple) travel together, as one tensor.
    """

    group: ProcessGroup
    split: bool

    def begin(self, x_BTD: Tensor) -> Tensor:
        """Return this rank's part of rows that all ranks have; the gradients of other parts are 0."""
        return x_BTD.tensor_split(self.group.size(), _TOKENS)[self.group.rank()] if self.split else x_BTD

    def resume(self, x_BTD: Tensor) -> Tensor:
        """Return this rank's part of a stream that was made whole; the ranks' gradients of it will be added."""
        return self.begin(x_BTD) if self.split else Scaled.apply(x_BTD, 1 / self.group.size())

    def end(self, x_BTD: Tensor) -> Tensor:
        """Return what the stream became, whole; every rank does the same with it."""
        return Whole.apply(x_BTD, _TOKENS, self.group) if self.split else x_BTD

    def modulate(self, x_BM: Tensor) -> Tensor:
        """Return a modulation of which each rank has some columns, whole, to be applied to its part of the stream."""
        return (Gather if self.split else Whole).apply(x_BM, x_BM.dim() - 1, self.group)

    def enter(self, x_BTD: Any, wire: Wire | None = None) -> Any:
        """Return the whole stream to a region; parts of it travel in the form of `wire`."""
        if isinstance(x_BTD, tuple):
            return self._together(x_BTD, lambda x: self.enter(x, wire), parts=1, becomes=self.group.size())
        if self.split and wire is not None:
            return NarrowGather.apply(x_BTD, _TOKENS, self.group, wire)
        return Gather.apply(x_BTD, _TOKENS, self.group) if self.split else Enter.apply(x_BTD, self.group)

    def add_gradients(self, parameter: Tensor) -> Tensor:
        """Return a parameter that is the same on every rank, and whose gradients are partial sums."""
        return Enter.apply(parameter, self.group)

    def count_once(self, parameter: Tensor) -> Tensor:
        """Return a parameter that is added to partial sums: zero to all ranks but the first."""
        return self.add_gradients(parameter) * (self.group.rank() == 0)

    def leave(self, x_BTD: Any) -> Any:
        """Add a region's partial sums and return them as the stream wants them."""
        if isinstance(x_BTD, tuple):
            return self._together(x_BTD, self.leave, parts=self.group.size(), becomes=1)
        return Scatter.apply(x_BTD, _TOKENS, self.group) if self.split else Leave.apply(x_BTD, self.group)

    def _together(
        self, streams: tuple[Tensor, ...], send: Callable[[Tensor], Tensor], *, parts: int, becomes: int
    ) -> tuple[Tensor, ...]:
        """Send streams as one: rank by rank, the rows of each; `parts` and `becomes` are how many ranks' rows there are
        before and after."""
        parts, becomes = (parts, becomes) if self.split else (1, 1)
        by_rank = [x.unflatten(_TOKENS, (parts, -1)) for x in streams]
        whole = send(torch.cat(by_rank, _TOKENS + 1).flatten(_TOKENS, _TOKENS + 1))
        counts = [x.shape[_TOKENS + 1] for x in by_rank]
        again = whole.unflatten(_TOKENS, (becomes, -1)).split(counts, _TOKENS + 1)
        return tuple(x.flatten(_TOKENS, _TOKENS + 1) for x in again)


def apply(
    model: nn.Module,
    sharding: Sharding,
    mesh: DeviceMesh,
    *,
    sequence: bool,
    wires: Mapping[str, Wire] = MappingProxyType({}),
) -> None:
    """Split a model on the meta device over a one-axis mesh; `sequence` splits the stream between the regions too.

    `wires` are the forms in which the stream travels to regions, by their names.
    """
    stream = Stream(mesh.get_group(), sequence)
    for name, module in model.named_modules():
        for parameter_name in list(module._parameters):
            dim = sharding.split_dim(name)
            if parameter_name == "bias" and matches(name, sharding.rows):
                split(module, parameter_name, mesh, [None], stream.count_once)
                continue
            partial = sequence or within(name, (*sharding.regions, *sharding.conditions))
            parts = dim is None and partial  # of tokens, heads or columns, on each rank
            split(module, parameter_name, mesh, [dim], stream.add_gradients if parts else lambda local: local)
        if isinstance(module, Passage):
            continue
        if matches(name, sharding.embeddings):
            _embed_part(module, mesh, stream)
        elif matches(name, sharding.regions):
            wrap_forward(module, _region(stream, wires.get(name)))
        elif matches(name, sharding.closing):
            wrap_forward(module, lambda forward, x, stream=stream: stream.enter(forward(x)))
        elif matches(name, sharding.openings):
            wrap_forward(module, lambda forward, x, stream=stream: forward(stream.begin(x)))
        elif matches(name, sharding.resuming):
            wrap_forward(module, lambda forward, x, stream=stream: forward(stream.resume(x)))
        elif matches(name, sharding.modulations):
            wrap_forward(module, lambda forward, x, stream=stream: stream.modulate(forward(x)))
        elif matches(name, sharding.outputs):
            wrap_forward(module, lambda forward, *args, stream=stream: stream.end(forward(*args)))


def _region(stream: Stream, wire: Wire | None) -> Callable[..., Tensor]:
    def around(forward: Callable[..., Tensor], x_BTD: Tensor, *args: Any) -> Tensor:
        return stream.leave(forward(stream.enter(x_BTD, wire), *args))

    return around


def _embed_part(module: nn.Module, mesh: DeviceMesh, stream: Stream) -> None:
    """Look up what lies in this rank's rows of the table; the other ranks have the rest."""
    first, last = _rows(module._parameters["weight"], mesh)

    def around(forward: Callable[[Tensor], Tensor], tokens_BT: Tensor) -> Tensor:
        inside = (tokens_BT >= first) & (tokens_BT < last)
        found = forward((tokens_BT - first).where(inside, 0))
        return stream.leave(found * inside.unsqueeze(-1))

    wrap_forward(module, around)


def _rows(weight: Any, mesh: DeviceMesh) -> tuple[int, int]:
    """Return the first and the last (exclusive) row of a table that this rank holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(weight.shape, mesh, [Shard(0)])
    return offset[0], offset[0] + shape[0]


# ---------------------------------------------------------------------------------------------- loss


def loss_over_parts(vocab_size: int, mesh: DeviceMesh, *, gather: bool) -> LossAndSlope:
    """Return `loss_and_slope` for logits of which each rank has the columns of its part of the vocabulary.

    Three numbers a row travel instead of the logits, or with `gather` the logits.
    """
    group = mesh.get_group()
    first, last = _rows(torch.empty(vocab_size, 1, device="meta"), mesh)

    def whole(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        parts = _pad(logits_NV, -(-vocab_size // mesh.size()))
        loss, slope = loss_and_slope(all_gather(parts, 1, group)[:, :vocab_size], labels_N)
        return loss, slope[:, first:last].contiguous()

    def parts(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
        valid = labels_N[:, None] != IGNORE
        mine = (labels_N[:, None] >= first) & (labels_N[:, None] < last)
        target = (labels_N[:, None] - first).where(mine, 0)
        logits = logits_NV.float()
        logits = logits - all_reduce(logits.amax(-1, keepdim=True), group, "max")
        picked = logits.gather(-1, target) * mine
        powers = logits.exp_()
        sums, picked = all_reduce(torch.stack((powers.sum(-1, keepdim=True), picked)), group).unbind()
        loss = ((sums.log() - picked) * valid).sum()
        slope = (powers / sums).scatter_add_(-1, target, -mine.float())
        return loss, (slope * valid).to(logits_NV.dtype)

    return whole if gather else parts


def _pad(logits_NV: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(logits_NV, (0, width - logits_NV.shape[1]))
