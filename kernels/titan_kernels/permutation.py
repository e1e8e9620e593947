"""Bring the rows of each expert together, and back: placement, permute, unpermute (Shazeer et al. 2017, section 3.1).

Shapes: T tokens, K experts chosen a token, E experts, R rows (static: see `placement_rows`), D width.

An assignment is a pair (token, choice), flat index t * K + k. `place` gives each assignment a row such that the rows of
an expert are one region, in the order of the assignments; regions start at multiples of `align`. Nothing here reads a
size from the device, so nothing waits for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_kernels.launch import runs_triton


class Placement(NamedTuple):
    """Where each assignment goes. An assignment whose expert is not in [0, E) is dropped: its row is -1."""

    counts_E: Tensor  # int32: assignments of each expert
    ends_E: Tensor  # int32: the end of each expert's region, padding included
    row_TK: Tensor  # int32: the row of each assignment
    source_R: Tensor  # int32: the assignment of each row; -1 in padding


def placement_rows(num_assignments: int, num_experts: int, align: int = 1) -> int:
    """Return R: enough rows for any routing of `num_assignments`, whatever the padding; a multiple of `align`."""
    most = num_assignments + num_experts * (align - 1)
    return -(-most // align) * align


def place(experts_TK: Tensor, num_experts: int, align: int = 1) -> Placement:
    """Place the assignments `experts_TK` (int64 expert ids) by a stable counting sort.

    The end of the last region is at most R; rows after it belong to nobody.
    """
    if experts_TK.dim() != 2 or experts_TK.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"place() takes expert ids as a 2-d integer tensor (tokens, choices); got {experts_TK.dtype} "
            f"of shape {tuple(experts_TK.shape)}"
        )
    if num_experts < 1 or align < 1:
        raise ValueError(f"place() needs num_experts >= 1 and align >= 1; got {num_experts} and {align}")
    return Placement(*torch.ops.titan_kernels.place(experts_TK, num_experts, align))


def permute(x_TD: Tensor, placement: Placement) -> Tensor:
    """Return rows_RD: each assignment's token in the assignment's row, zeros in padding.

    The gradient of a token is the sum of those of its rows, in fp32.
    """
    _check_tokens(x_TD, placement, "permute")
    return torch.ops.titan_kernels.permute(x_TD, placement.row_TK, placement.source_R)


def unpermute(rows_RD: Tensor, placement: Placement, weights_TK: Tensor | None = None) -> Tensor:
    """Return x_TD: for each token the sum over its choices of weight * row, in fp32, in the dtype of the rows.

    Without weights it is the transpose of `permute`: <permute(x), y> = <x, unpermute(y)>.
    """
    row_TK, source_R = placement.row_TK, placement.source_R
    if rows_RD.dim() != 2 or rows_RD.shape[0] != source_R.shape[0]:
        raise ValueError(
            f"unpermute() takes the {source_R.shape[0]} rows of this placement; got shape {tuple(rows_RD.shape)}"
        )
    if weights_TK is not None and weights_TK.shape != row_TK.shape:
        raise ValueError(
            f"unpermute() takes one weight an assignment, {tuple(row_TK.shape)}; got {tuple(weights_TK.shape)}"
        )
    return torch.ops.titan_kernels.unpermute(rows_RD, row_TK, source_R, weights_TK)


def block_experts(ends_E: Tensor, num_rows: int, block_rows: int) -> Tensor:
    """Return the expert of each block of `block_rows` rows (the m-indices of contiguous grouped GEMMs): int32.

    Right where all regions start at multiples of `block_rows`. Blocks after the last region get -1.
    """
    starts = torch.arange(0, num_rows, block_rows, device=ends_E.device, dtype=ends_E.dtype)
    experts = torch.searchsorted(ends_E, starts, right=True, out_int32=True)
    return experts.masked_fill(experts == ends_E.shape[0], -1)


def reference_place(experts_TK: Tensor, num_experts: int, align: int = 1) -> Placement:
    """`place` in plain torch."""
    experts = experts_TK.flatten().long()
    num_assignments, device = experts.shape[0], experts.device
    experts = torch.where((experts < 0) | (experts >= num_experts), num_experts, experts)
    order = experts.argsort(stable=True)
    counts = torch.bincount(experts, minlength=num_experts + 1)
    padded = -(-counts[:-1] // align) * align
    ends = padded.cumsum(0)
    first = counts.cumsum(0) - counts  # of each expert in `order`
    starts = torch.cat([ends - padded, ends.new_zeros(1)])
    ordered = experts[order]
    rows = starts[ordered] + torch.arange(num_assignments, device=device) - first[ordered]
    rows = torch.where(ordered < num_experts, rows, -1).int()
    row = torch.empty_like(rows)
    row[order] = rows
    num_rows = placement_rows(num_assignments, num_experts, align)
    source = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
    kept = num_assignments - int(counts[-1])
    source[rows[:kept]] = order[:kept].int()
    return Placement(counts[:-1].int(), ends.int(), row.view(experts_TK.shape), source)


def reference_permute(x_TD: Tensor, placement: Placement) -> Tensor:
    """`permute` in plain torch."""
    return _gather_rows(x_TD, placement.source_R, placement.row_TK.shape[1], None)


def reference_unpermute(rows_RD: Tensor, placement: Placement, weights_TK: Tensor | None = None) -> Tensor:
    """`unpermute` in plain torch."""
    row_TK, wide = placement.row_TK, _accumulator(rows_RD)
    x = rows_RD.new_zeros(row_TK.shape[0], rows_RD.shape[1], dtype=wide)
    for choice, row in enumerate(row_TK.unbind(1)):
        placed = (row >= 0)[:, None]
        values = rows_RD.index_select(0, row.clamp_min(0)) if rows_RD.shape[0] else x.to(rows_RD.dtype)
        if weights_TK is not None:
            values = values * weights_TK[:, choice, None].to(wide)
        x = x + torch.where(placed, values, 0)
    return x.to(rows_RD.dtype)


def _gather_rows(x_TD: Tensor, source_R: Tensor, top_k: int, weights_TK: Tensor | None) -> Tensor:
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(source_R.shape[0], x_TD.shape[1])
    assignment = source_R.clamp_min(0)
    rows = x_TD.index_select(0, assignment // top_k)
    if weights_TK is not None:
        rows = (rows * weights_TK.flatten()[assignment][:, None].to(_accumulator(x_TD))).to(x_TD.dtype)
    return rows.masked_fill((source_R < 0)[:, None], 0)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_tokens(x_TD: Tensor, placement: Placement, name: str) -> None:
    if x_TD.dim() != 2 or x_TD.shape[0] != placement.row_TK.shape[0]:
        raise ValueError(
            f"{name}() takes the {placement.row_TK.shape[0]} tokens of this placement; got shape {tuple(x_TD.shape)}"
        )


@torch.library.custom_op("titan_kernels::place", mutates_args=())
def _place(experts_TK: Tensor, num_experts: int, align: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if runs_triton(experts_TK):
        from titan_kernels import permutation_kernels

        num_rows = placement_rows(experts_TK.numel(), num_experts, align)
        return permutation_kernels.place(experts_TK.contiguous(), num_experts, align, num_rows)
    counts, ends, row, source = reference_place(experts_TK, num_experts, align)
    return counts, ends, row, source


@_place.register_fake
def _(experts_TK: Tensor, num_experts: int, align: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = placement_rows(experts_TK.numel(), num_experts, align)
    counts = experts_TK.new_empty(num_experts, dtype=torch.int32)
    row = experts_TK.new_empty(experts_TK.shape, dtype=torch.int32)
    return counts, torch.empty_like(counts), row, experts_TK.new_empty(num_rows, dtype=torch.int32)


@torch.library.custom_op("titan_kernels::permute", mutates_args=())
def _permute(x_TD: Tensor, row_TK: Tensor, source_R: Tensor) -> Tensor:
    if runs_triton(x_TD):
        from titan_kernels import permutation_kernels

        return permutation_kernels.scatter(x_TD.contiguous(), row_TK, source_R)
    return _gather_rows(x_TD, source_R, row_TK.shape[1], None)


@_permute.register_fake
def _(x_TD: Tensor, row_TK: Tensor, source_R: Tensor) -> Tensor:
    return x_TD.new_empty(source_R.shape[0], x_TD.shape[1])


def _save_placement(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _permute_backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
    row_TK, source_R = ctx.saved_tensors
    return torch.ops.titan_kernels.unpermute(grad_RD, row_TK, source_R, None), None, None


_permute.register_autograd(_permute_backward, setup_context=_save_placement)


@torch.library.custom_op("titan_kernels::unpermute", mutates_args=())
def _unpermute(rows_RD: Tensor, row_TK: Tensor, source_R: Tensor, weights_TK: Tensor | None) -> Tensor:
    if runs_triton(rows_RD):
        from titan_kernels import permutation_kernels

        weights = None if weights_TK is None else weights_TK.contiguous()
        return permutation_kernels.combine(rows_RD.contiguous(), row_TK, weights)
    return reference_unpermute(rows_RD, Placement(row_TK, row_TK, row_TK, source_R), weights_TK)


@_unpermute.register_fake
def _(rows_RD: Tensor, row_TK: Tensor, source_R: Tensor, weights_TK: Tensor | None) -> Tensor:
    return rows_RD.new_empty(row_TK.shape[0], rows_RD.shape[1])


@torch.library.custom_op("titan_kernels::unpermute_backward", mutates_args=())
def _unpermute_gradients(
    grad_TD: Tensor, rows_RD: Tensor, row_TK: Tensor, source_R: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    if runs_triton(grad_TD):
        from titan_kernels import permutation_kernels

        return permutation_kernels.combine_backward(
            grad_TD.contiguous(), rows_RD.contiguous(), row_TK, source_R, weights_TK.contiguous()
        )
    wide, grad_weights = _accumulator(rows_RD), torch.zeros_like(weights_TK)
    for choice, row in enumerate(row_TK.unbind(1)):
        if rows_RD.shape[0]:
            products = grad_TD.to(wide) * rows_RD.index_select(0, row.clamp_min(0))
            grad_weights[:, choice] = torch.where(row >= 0, products.sum(1), 0)
    return _gather_rows(grad_TD, source_R, row_TK.shape[1], weights_TK), grad_weights


@_unpermute_gradients.register_fake
def _(grad_TD: Tensor, rows_RD: Tensor, row_TK: Tensor, source_R: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows_RD), torch.empty_like(weights_TK)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_RD, row_TK, source_R, weights_TK = inputs
    ctx.weighted = weights_TK is not None
    ctx.save_for_backward(row_TK, source_R, *((rows_RD, weights_TK) if ctx.weighted else ()))


def _unpermute_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
    row_TK, source_R, *weighted = ctx.saved_tensors
    if not ctx.weighted:
        return torch.ops.titan_kernels.permute(grad_TD, row_TK, source_R), None, None, None
    rows_RD, weights_TK = weighted
    grads = torch.ops.titan_kernels.unpermute_backward(grad_TD, rows_RD, row_TK, source_R, weights_TK)
    return grads[0], None, None, grads[1]


_unpermute.register_autograd(_unpermute_backward, setup_context=_save_rows)
