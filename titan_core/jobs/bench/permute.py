"""Bringing the rows of each expert together, and back; before that, choosing the experts.

Shape letters: T tokens, K experts chosen a token, E experts, R = T * K rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_core.jobs.bench import passes
from titan_core.jobs.bench.case import OWN, Absent, Call, Case, Prepared
from titan_core.jobs.bench.inputs import Draw
from titan_core.jobs.bench.request import Request

# (tokens, experts, choices, width): DeepSeek-V3, Qwen3 30B, Llama 4 Scout
SHAPES = ((8192, 256, 8, 7168), (32768, 128, 8, 2048), (16384, 16, 1, 5120))
REDUCED = ((301, 16, 4, 100),)
PARTS = ("place", "permute", "unpermute", "unpermute-bwd", "choose")


@dataclass(frozen=True)
class _Operands:
    scores_TE: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    x_TD: Tensor
    rows_RD: Tensor
    grad_TD: Tensor
    num_experts: int


def cases(request: Request, draw: Draw) -> Iterator[Case]:
    """Give the five parts at every shape."""
    for shape in REDUCED if request.reduced else SHAPES:
        for part in PARTS:
            yield _case(shape, part, draw)


def _case(shape: tuple[int, int, int, int], part: str, draw: Draw) -> Case:
    tokens, experts, choices, width = shape
    rows = tokens * choices
    # choose reads scores (fp32) and writes ids (int64); place reads ids and writes two tables (int32); permute reads
    # tokens and writes rows, unpermute in reverse; its backward reads gradients of tokens and rows, and writes those of
    # rows and weights
    moved = {
        "choose": 4.0 * tokens * experts + 8.0 * rows,
        "place": 16.0 * rows,
        "permute": 2.0 * (tokens + rows) * width + 4.0 * rows,
        "unpermute": 2.0 * (tokens + rows) * width + 4.0 * rows,
        "unpermute-bwd": 2.0 * (tokens + 2 * rows) * width + 12.0 * rows,
    }[part]
    choose = part == "choose"
    return Case(
        operation="permute",
        shape=f"{tokens}x{experts} fp32 K={choices}" if choose else f"{tokens}x{width} E={experts} K={choices}",
        part=part,
        dtype="fp32" if choose else "bf16",
        flops=0.0,
        moved=moved,
        inputs=lambda: _operands(shape, draw),
        reference=_TRUTHS[part],
        backends={
            OWN: lambda operands: _titan(part, operands),
            "torch": lambda operands: _torch(part, operands),
            "compile": lambda operands: _compiled(part, operands),
        },
        limit=1e-12 if choose else None,  # nothing is computed: the scores must be those of the best
    )


def _operands(shape: tuple[int, int, int, int], draw: Draw) -> _Operands:
    tokens, experts, choices, width = shape
    scores = draw.normal(tokens, experts, dtype=torch.float32)
    chosen = scores.topk(choices, -1).indices
    weights = draw.normal(tokens, choices, dtype=torch.float32).softmax(-1)
    x, rows, grad = (draw.normal(number, width) for number in (tokens, tokens * choices, tokens))
    return _Operands(scores, chosen, weights, x, rows, grad, experts)


# ------------------------------------------------------------------------------------------------ the truth


def _order(o: _Operands) -> Tensor:
    """Return the assignments (t * K + k) by expert, and within an expert as they come."""
    return o.experts_TK.flatten().argsort(stable=True)


def _true_choice(o: _Operands) -> Sequence[Tensor]:
    return [o.scores_TE.double().sort(dim=-1, descending=True).values[:, : o.experts_TK.shape[1]]]


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


def _true_unpermute_backward(o: _Operands) -> Sequence[Tensor]:
    order = _order(o)
    grad = o.grad_TD[order // o.experts_TK.shape[1]].double()
    of_weights = torch.empty_like(o.weights_TK, dtype=torch.float64)
    of_weights.view(-1)[order] = (grad * o.rows_RD.double()).sum(1)
    return [grad * o.weights_TK.flatten()[order].double()[:, None], of_weights]


_TRUTHS: Mapping[str, Callable[[Any], Sequence[Tensor]]] = {
    "choose": _true_choice,
    "place": _true_place,
    "permute": _true_permute,
    "unpermute": _true_unpermute,
    "unpermute-bwd": _true_unpermute_backward,
}


# ------------------------------------------------------------------------------------------------ who computes it


def _best(scores_TE: Tensor, k: int) -> Tensor:
    return scores_TE.topk(k, -1, sorted=False).indices


def _choice(choose: Callable[[Tensor, int], Tensor], o: _Operands) -> Prepared:
    """Return a choice whose scores are checked: which of equal experts it is, and in which order, is everyone's own."""
    return Prepared(
        lambda: choose(o.scores_TE, o.experts_TK.shape[1]),
        lambda chosen: o.scores_TE.gather(1, chosen).sort(dim=-1, descending=True).values,
    )


def _titan(part: str, o: _Operands) -> Call | Prepared:
    from titan_kernels.permutation import permute, place, unpermute
    from titan_kernels.top_k import top_k

    if part == "choose":
        return _choice(top_k, o)
    if part == "place":

        def call() -> list[Tensor]:
            placed = place(o.experts_TK, o.num_experts)
            return [placed.source_R[None], placed.ends_E[None]]

        return call
    placement = place(o.experts_TK, o.num_experts)
    if part == "permute":
        return lambda: permute(o.x_TD, placement)
    if part == "unpermute":
        return lambda: unpermute(o.rows_RD, placement, o.weights_TK)

    def weighted(rows_RD: Tensor, weights_TK: Tensor) -> Tensor:
        return unpermute(rows_RD, placement, weights_TK)

    return passes.backward(weighted, passes.Operands([o.rows_RD, o.weights_TK], [], o.grad_TD))


def _torch(part: str, o: _Operands) -> Call | Prepared:
    """A stable sort, a gather, and an atomic sum, as a model without kernels of its own does it."""
    if part == "choose":
        return _choice(_best, o)
    choices = o.experts_TK.shape[1]
    if part == "place":

        def call() -> list[Tensor]:
            flat = o.experts_TK.flatten()
            ends = torch.bincount(flat, minlength=o.num_experts).cumsum(0)
            return [flat.argsort(stable=True)[None], ends[None]]

        return call
    order = _order(o)
    token = order // choices
    if part == "permute":
        return lambda: o.x_TD.index_select(0, token)
    if part == "unpermute-bwd":
        row_TK = _rows(order, choices)
        return lambda: _slopes(o.grad_TD, o.rows_RD, o.weights_TK, order, row_TK)
    weights = o.weights_TK.flatten()[order][:, None]

    def sum_up() -> Tensor:
        out = torch.zeros_like(o.x_TD, dtype=torch.float32)
        return out.index_add_(0, token, o.rows_RD * weights).to(o.x_TD.dtype)

    return sum_up


def _compiled(part: str, o: _Operands) -> Call | Prepared:
    """The best that the compiler is given: gathers only, no atomic sum, and each part in one piece."""
    if part == "choose":
        return _choice(passes.compiled(_best), o)
    if part == "place":
        raise Absent("torch compiles no sort: the same as `torch`")
    order, choices = _order(o), o.experts_TK.shape[1]
    row_TK = _rows(order, choices)
    if part == "permute":
        gather = passes.compiled(_gather)
        return lambda: gather(o.x_TD, order, row_TK)
    if part == "unpermute":
        sum_up = passes.compiled(_sum_of_rows)
        return lambda: sum_up(o.rows_RD, o.weights_TK, row_TK)
    slopes = passes.compiled(_slopes)
    return lambda: slopes(o.grad_TD, o.rows_RD, o.weights_TK, order, row_TK)


def _rows(order_R: Tensor, choices: int) -> Tensor:
    """Return the row of each assignment (T, K)."""
    return order_R.argsort().view(-1, choices)


def _gather(x_TD: Tensor, order_R: Tensor, row_TK: Tensor) -> Tensor:
    return x_TD[order_R // row_TK.shape[1]]


def _sum_of_rows(rows_RD: Tensor, weights_TK: Tensor, row_TK: Tensor) -> Tensor:
    return (rows_RD[row_TK] * weights_TK.unsqueeze(-1)).sum(1).to(rows_RD.dtype)


def _slopes(
    grad_TD: Tensor, rows_RD: Tensor, weights_TK: Tensor, order_R: Tensor, row_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the sum of rows to rows and weights."""
    grad_RD = grad_TD[order_R // row_TK.shape[1]].float()
    of_rows = (grad_RD * weights_TK.flatten()[order_R].unsqueeze(-1)).to(rows_RD.dtype)
    return of_rows, (grad_RD * rows_RD).sum(1)[row_TK]
