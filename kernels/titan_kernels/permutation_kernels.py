"""Triton kernels of `permutation.py`.

Bytes that must move, with e bytes an element: permute T*D*e read and R*D*e written, unpermute the same the other way,
its backward (T + R)*D*e read and R*D*e written. All three go by token, so that a token, or its gradient, is read once
and goes to its K rows from registers; a few programs more clear the rows that are padding. Placement moves a few
integers an assignment; what it costs is its two launches.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
# (a checker sees a kernel as the Python function that it is not)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Untuned: never measured on a GPU. A chunk of 2048 is what eight warps sort in registers, and makes chunks so few that
# each can add up the counts of all. A thread of four warps holds eight columns (16 bytes in bf16) of up to eight rows.
CHUNK, CHUNK_WARPS = 2048, 8
COUNTS = 4096  # of the other chunks, read at once
COLUMNS, NUM_WARPS = 1024, 4
CHOICES = 8  # rows of a token in registers at once
CHECKED = 64  # rows that a program checks for padding


def place(experts_TK: Tensor, num_experts: int, align: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the counting sort: count by chunk, then place."""
    num_assignments = experts_TK.numel()
    num_chunks = max(1, triton.cdiv(num_assignments, CHUNK))
    bins = triton.next_power_of_2(max(num_experts + 1, 32))  # one of them is that of dropped assignments
    ints = {"dtype": torch.int32, "device": experts_TK.device}
    counts, ends = torch.empty(num_experts, **ints), torch.empty(num_experts, **ints)
    row, source = torch.empty(experts_TK.shape, **ints), torch.empty(num_rows, **ints)
    by_chunk = torch.empty(num_chunks, bins, **ints)
    shared = {"BINS": bins, "CHUNK": CHUNK, "num_warps": CHUNK_WARPS}
    _count[(num_chunks,)](experts_TK, by_chunk, source, num_assignments, num_rows, num_experts, **shared)
    _place[(num_chunks,)](
        experts_TK, by_chunk, counts, ends, row, source,
        num_chunks, num_assignments, num_rows, num_experts, align, CHUNKS=max(1, COUNTS // bins), **shared,
    )  # fmt: skip
    return counts, ends, row, source


def scatter(x_TD: Tensor, row_TK: Tensor, source_R: Tensor) -> Tensor:
    """Launch rows[row[t, k]] = x[t], and zeros in rows whose source is -1."""
    (num_tokens, top_k), num_rows, width = row_TK.shape, source_R.shape[0], x_TD.shape[1]
    rows = x_TD.new_empty(num_rows, width)
    if rows.numel():
        programs = num_tokens * triton.cdiv(width, COLUMNS) + triton.cdiv(num_rows, CHECKED)
        _scatter[(programs,)](
            x_TD, row_TK, source_R, rows, num_tokens, num_rows, width,
            ALL=triton.next_power_of_2(top_k), CHECKED=CHECKED, **_tile(top_k),
        )  # fmt: skip
    return rows


def combine(rows_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Launch x[t] = sum over k of weights[t, k] * rows[row[t, k]]."""
    num_tokens, top_k = row_TK.shape
    num_rows, width = rows_RD.shape
    x = rows_RD.new_empty(num_tokens, width)
    if x.numel():
        _combine[(num_tokens * triton.cdiv(width, COLUMNS),)](
            rows_RD, row_TK, row_TK if weights_TK is None else weights_TK, x, num_rows, width,
            WEIGHTED=weights_TK is not None, **_tile(top_k),
        )  # fmt: skip
    return x


def combine_backward(
    grad_TD: Tensor, rows_RD: Tensor, row_TK: Tensor, source_R: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the gradients of `combine` to rows and weights in one pass over the rows."""
    (num_tokens, top_k), (num_rows, width) = row_TK.shape, rows_RD.shape
    if not rows_RD.numel():
        return torch.empty_like(rows_RD), torch.zeros_like(weights_TK)
    grad_rows, grad_weights = torch.empty_like(rows_RD), torch.empty_like(weights_TK)
    _combine_backward[(num_tokens + triton.cdiv(num_rows, CHECKED),)](
        grad_TD, rows_RD, row_TK, source_R, weights_TK, grad_rows, grad_weights, num_tokens, num_rows, width,
        CHECKED=CHECKED, **_tile(top_k),
    )  # fmt: skip
    return grad_rows, grad_weights


def _tile(top_k: int) -> dict[str, int]:
    choices = min(CHOICES, triton.next_power_of_2(top_k))
    return {"TOP_K": top_k, "CHOICES": choices, "COLUMNS": COLUMNS, "num_warps": NUM_WARPS}


@triton.jit
def _experts_of_chunk(experts_ptr, num_assignments, num_experts, CHUNK: tl.constexpr):
    assignment = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(experts_ptr + assignment, mask=assignment < num_assignments, other=-1)
    kept = (expert >= 0) & (expert < num_experts)
    return tl.where(kept, expert, num_experts).to(tl.int32)


@triton.jit(do_not_specialize=["num_assignments", "num_rows"])
def _count(
    experts_ptr, by_chunk_ptr, source_ptr, num_assignments, num_rows, num_experts,
    BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the assignments of each expert in each chunk, and mark all rows as padding."""
    chunk = tl.program_id(0)
    expert = _experts_of_chunk(experts_ptr, num_assignments, num_experts, CHUNK)
    tl.store(by_chunk_ptr + chunk * BINS + tl.arange(0, BINS), tl.histogram(expert, BINS))
    for start in range(chunk * CHUNK, num_rows, tl.num_programs(0) * CHUNK):
        row = start + tl.arange(0, CHUNK)
        tl.store(source_ptr + row, tl.full((CHUNK,), -1, tl.int32), mask=row < num_rows)


@triton.jit(do_not_specialize=["num_chunks", "num_assignments", "num_rows"])
def _place(
    experts_ptr, by_chunk_ptr, counts_ptr, ends_ptr, row_ptr, source_ptr,
    num_chunks, num_assignments, num_rows, num_experts, align,
    BINS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Sort a chunk by expert, stably, and write where each assignment goes."""
    chunk = tl.program_id(0)
    bins = tl.arange(0, BINS)
    totals = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)  # in the chunks before this one
    for start in range(0, num_chunks, CHUNKS):
        other = start + tl.arange(0, CHUNKS)[:, None]
        found = tl.load(by_chunk_ptr + other * BINS + bins[None, :], mask=other < num_chunks, other=0)
        totals += tl.sum(found, 0)
        before += tl.sum(tl.where(other < chunk, found, 0), 0)
    totals = tl.where(bins < num_experts, totals, 0)
    padded = tl.cdiv(totals, align) * align
    ends = tl.cumsum(padded, 0)
    if chunk == 0:
        tl.store(counts_ptr + bins, totals, mask=bins < num_experts)
        tl.store(ends_ptr + bins, ends, mask=bins < num_experts)
    expert = _experts_of_chunk(experts_ptr, num_assignments, num_experts, CHUNK)
    ordered = tl.sort(expert * CHUNK + tl.arange(0, CHUNK))  # the position breaks ties: stable
    counts = tl.histogram(expert, BINS)
    first = tl.cumsum(counts, 0) - counts  # of each expert in `ordered`
    shift = ends - padded + before - first
    expert = ordered // CHUNK
    assignment = chunk * CHUNK + ordered % CHUNK
    row = tl.gather(shift, expert, 0) + tl.arange(0, CHUNK)
    kept = (expert < num_experts) & (row < num_rows)
    tl.store(row_ptr + assignment, tl.where(kept, row, -1), mask=assignment < num_assignments)
    tl.store(source_ptr + row, assignment, mask=kept)


@triton.jit
def _rows_of(row_ptr, token, first, num_rows, TOP_K: tl.constexpr, CHOICES: tl.constexpr):
    """Return the rows of some choices of a token, and which of them exist."""
    choice = first + tl.arange(0, CHOICES)
    row = tl.load(row_ptr + token * TOP_K + choice, mask=choice < TOP_K, other=-1)
    return row.to(tl.int64), (row >= 0) & (row < num_rows)


@triton.jit
def _clear_padding(source_ptr, rows_ptr, first, num_rows, width, COLUMNS: tl.constexpr, CHECKED: tl.constexpr):
    """Write zeros to those of some rows that are padding, one by one: a tile of rows would double the registers."""
    row = first + tl.arange(0, CHECKED)
    source = tl.load(source_ptr + row, mask=row < num_rows, other=0)
    if tl.min(source, 0) < 0:
        zeros = tl.zeros((COLUMNS,), rows_ptr.dtype.element_ty)
        for number in range(0, CHECKED):
            padding = first + number
            if tl.load(source_ptr + padding, mask=padding < num_rows, other=0) < 0:
                for start in range(0, width, COLUMNS):
                    column = start + tl.arange(0, COLUMNS)
                    tl.store(rows_ptr + padding.to(tl.int64) * width + column, zeros, mask=column < width)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _scatter(
    x_ptr, row_ptr, source_ptr, rows_ptr, num_tokens, num_rows, width,
    TOP_K: tl.constexpr, ALL: tl.constexpr, CHOICES: tl.constexpr, COLUMNS: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Copy a part of a token to its rows; the last programs clear padding."""
    parts = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    if program < num_tokens * parts:
        token = program // parts
        _, wanted = _rows_of(row_ptr, token, 0, num_rows, TOP_K, ALL)
        if tl.max(wanted.to(tl.int32), 0) > 0:  # of the tokens of all ranks, most may have no row here
            column = (program % parts * COLUMNS + tl.arange(0, COLUMNS))[None, :]
            values = tl.load(x_ptr + token.to(tl.int64) * width + column, mask=column < width, other=0.0)
            values = tl.broadcast_to(values, (CHOICES, COLUMNS))
            for first in tl.static_range(0, TOP_K, CHOICES):
                row, placed = _rows_of(row_ptr, token, first, num_rows, TOP_K, CHOICES)
                tl.store(rows_ptr + row[:, None] * width + column, values, mask=placed[:, None] & (column < width))
    else:
        first = (program - num_tokens * parts) * CHECKED
        _clear_padding(source_ptr, rows_ptr, first, num_rows, width, COLUMNS, CHECKED)


@triton.jit(do_not_specialize=["num_rows"])
def _combine(
    rows_ptr, row_ptr, weights_ptr, x_ptr, num_rows, width,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, CHOICES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum a part of the rows of a token."""
    parts = tl.cdiv(width, COLUMNS)
    token = tl.program_id(0) // parts
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in tl.static_range(0, TOP_K, CHOICES):
        row, placed = _rows_of(row_ptr, token, first, num_rows, TOP_K, CHOICES)
        mask = placed[:, None] & (column < width)[None, :]
        values = tl.load(rows_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            choice = first + tl.arange(0, CHOICES)
            weight = tl.load(weights_ptr + token * TOP_K + choice, mask=placed, other=0.0)
            values *= weight.to(tl.float32)[:, None]
        total += tl.sum(values, 0)
    tl.store(x_ptr + token.to(tl.int64) * width + column, total.to(x_ptr.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _combine_backward(
    grad_ptr, rows_ptr, row_ptr, source_ptr, weights_ptr, grad_rows_ptr, grad_weights_ptr, num_tokens, num_rows, width,
    TOP_K: tl.constexpr, CHOICES: tl.constexpr, COLUMNS: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Weigh the gradient of a token for its rows, and multiply it with them; the last programs clear padding."""
    token = tl.program_id(0)
    if token < num_tokens:
        for first in tl.static_range(0, TOP_K, CHOICES):
            row, placed = _rows_of(row_ptr, token, first, num_rows, TOP_K, CHOICES)
            choice = first + tl.arange(0, CHOICES)
            weight = tl.load(weights_ptr + token * TOP_K + choice, mask=placed, other=0.0).to(tl.float32)[:, None]
            products = tl.zeros((CHOICES, COLUMNS), tl.float32)
            for start in range(0, width, COLUMNS):
                column = (start + tl.arange(0, COLUMNS))[None, :]
                grad = tl.load(grad_ptr + token.to(tl.int64) * width + column, mask=column < width, other=0.0)
                grad = grad.to(tl.float32)
                mask = placed[:, None] & (column < width)
                values = tl.load(rows_ptr + row[:, None] * width + column, mask=mask, other=0.0).to(tl.float32)
                products += tl.where(mask, grad * values, 0.0)
                grad_row = (grad * weight).to(grad_rows_ptr.dtype.element_ty)
                tl.store(grad_rows_ptr + row[:, None] * width + column, grad_row, mask=mask)
            grad_weight = tl.sum(products, 1).to(grad_weights_ptr.dtype.element_ty)
            tl.store(grad_weights_ptr + token * TOP_K + choice, grad_weight, mask=choice < TOP_K)
    else:
        first = (token - num_tokens) * CHECKED
        _clear_padding(source_ptr, grad_rows_ptr, first, num_rows, width, COLUMNS, CHECKED)
