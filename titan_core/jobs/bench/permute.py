"""Bringing the rows of each expert together, and back.

Shape letters: T tokens, K experts chosen a token, E experts, R = T * K rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_core.jobs.bench.case import OWN, Call, Case
from titan_core.jobs.bench.inputs import Draw
from titan_core.jobs.bench.request import Request

# (tokens, experts, choices, width): DeepSeek-V3, Qwen3 30B, Llama 4 Scout
SHAPES = ((8192, 256, 8, 7168), (32768, 128, 8, 2048), (16384, 16, 1, 5120))
REDUCED = ((301, 16, 4, 100),)
PARTS = ("place", "permute", "unpermute")


@dataclass(frozen=True)
class _Operands:
    experts_TK: Tensor
    weights_TK: Tensor
    x_TD: Tensor
    rows_RD: Tensor
    num_experts: int


def cases(request: Request, draw: Draw) -> Iterator[Case]:
    """Give the three parts at every shape."""
    for shape in REDUCED if request.reduced else SHAPES:
        for part in PARTS:
            yield _case(shape, part, draw)


def _case(shape: tuple[int, int, int, int], part: str, draw: Draw) -> Case:
    tokens, experts, choices, width = shape
    rows = tokens * choices
    # place reads ids (int64) and writes two tables (int32); permute reads tokens and writes rows, unpermute the reverse
    moved = 16.0 * rows if part == "place" else 2.0 * (tokens + rows) * width + 4.0 * rows
    return Case(
        operation="permute",
        shape=f"{tokens}x{width} E={experts} K={choices}",
        part=part,
        dtype="bf16",
        flops=0.0,
        moved=moved,
        inputs=lambda: _operands(shape, draw),
        reference=_TRUTHS[part],
        backends={OWN: lambda operands: _titan(part, operands), "torch": lambda operands: _torch(part, operands)},
    )


def _operands(shape: tuple[int, int, int, int], draw: Draw) -> _Operands:
    tokens, experts, choices, width = shape
    scores = draw.normal(tokens, experts, dtype=torch.float32)
    chosen = scores.topk(choices, -1).indices
    weights = draw.normal(tokens, choices, dtype=torch.float32).softmax(-1)
    return _Operands(chosen, weights, draw.normal(tokens, width), draw.normal(tokens * choices, width), experts)


# ------------------------------------------------------------------------------------------------ the truth


def _order(o: _Operands) -> Tensor:
    """Return the assignments (t * K + k) by expert, and within an expert as they come."""
    return o.experts_TK.flatten().argsort(stable=True)


def _true_place(o: _Operands) -> Sequence[Tensor]:
    counts = torch.bincount(o.experts_TK.flatten(), minlength=o.num_experts)
    return [_order(o).double()[None], counts.cumsum(0).double()[None]]


def _true_permute(o: _Operands) -> Sequence[Tensor]:
    return [o.x_TD[_order(o) // o.experts_TK.shape[1]].double()]


def _true_unpermute(o: _Operands) -> Sequence[Tensor]:
    order = _order(o)
    weighted = o.rows_RD.double() * o.weights_TK.flatten()[order].double()[:, None]
    out = torch.zeros_like(o.x_TD, dtype=torch.float64)
    return [out.index_add_(0, order // o.experts_TK.shape[1], weighted)]


_TRUTHS: Mapping[str, Callable[[Any], Sequence[Tensor]]] = {
    "place": _true_place,
    "permute": _true_permute,
    "unpermute": _true_unpermute,
}


# ------------------------------------------------------------------------------------------------ who computes it


def _titan(part: str, o: _Operands) -> Call:
    from titan_kernels.permutation import permute, place, unpermute

    if part == "place":

        def call() -> list[Tensor]:
            placed = place(o.experts_TK, o.num_experts)
            return [placed.source_R[None], placed.ends_E[None]]

        return call
    placement = place(o.experts_TK, o.num_experts)
    if part == "permute":
        return lambda: permute(o.x_TD, placement)
    return lambda: unpermute(o.rows_RD, placement, o.weights_TK)


def _torch(part: str, o: _Operands) -> Call:
    """A stable sort, a gather, and an atomic sum, as a model without kernels of its own does it."""
    choices = o.experts_TK.shape[1]
    if part == "place":

        def call() -> list[Tensor]:
            flat = o.experts_TK.flatten()
            ends = torch.bincount(flat, minlength=o.num_experts).cumsum(0)
            return [flat.argsort(stable=True)[None], ends[None]]

        return call
    token = _order(o) // choices
    if part == "permute":
        return lambda: o.x_TD.index_select(0, token)
    weights = o.weights_TK.flatten()[_order(o)][:, None]

    def sum_up() -> Tensor:
        out = torch.zeros_like(o.x_TD, dtype=torch.float32)
        return out.index_add_(0, token, o.rows_RD * weights).to(o.x_TD.dtype)

    return sum_up
