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

# Measured on an H200 (torch 2.11, Triton 3.6). Placement at 32768 x 8 assignments: 23 us, with chunks of 1024 27, of
# 2048 35; in two launches, where each chunk adds up all chunks before it, 36. Rows of K = 8 and 1: tiles of 2048
# columns are as fast as smaller ones or up to 15 % faster, the gradients' of 512 up to 6 % faster than of 1024.
CHUNK, CHUNK_WARPS = 512, 4
SCANNED = (64, 32)  # chunks and experts of a tile of the scan
TILE, BACKWARD_TILE = (2048, 4), (512, 2)  # columns and warps
CHOICES = 8  # rows of a token in registers at once
CHECKED = 64  # rows that a program checks for padding


def place(experts_TK: Tensor, num_experts: int, align: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the counting sort: count by chunk, scan the chunks, place."""
    num_assignments = experts_TK.numel()
    num_chunks = max(1, triton.cdiv(num_assignments, CHUNK))
    bins = triton.next_power_of_2(max(num_experts + 1, SCANNED[1]))  # the last is that of dropped assignments
    ints = {"dtype": torch.int32, "device": experts_TK.device}
    counts, ends = torch.empty(num_experts, **ints), torch.empty(num_experts, **ints)
    row, source = torch.empty(experts_TK.shape, **ints), torch.empty(num_rows, **ints)
    by_chunk, totals = torch.empty(num_chunks, bins, **ints), torch.empty(bins, **ints)
    shared = {"BINS": bins, "num_warps": CHUNK_WARPS}
    _count[(num_chunks,)](experts_TK, by_chunk, source, num_assignments, num_rows, num_experts, CHUNK=CHUNK, **shared)
    _scan[(bins // SCANNED[1],)](by_chunk, totals, num_chunks, ROWS=SCANNED[0], COLUMNS=SCANNED[1], **shared)
    _place[(num_chunks,)](
        experts_TK, by_chunk, totals, counts, ends, row, source,
        num_assignments, num_rows, num_experts, align, CHUNK=CHUNK, **shared,
    )  # fmt: skip
    return counts, ends, row, source


def scatter(x_TD: Tensor, row_TK: Tensor, source_R: Tensor) -> Tensor:
    """Launch rows[row[t, k]] = x[t], and zeros in rows whose source is -1."""
    (num_tokens, top_k), num_rows, width = row_TK.shape, source_R.shape[0], x_TD.shape[1]
    rows = x_TD.new_empty(num_rows, width)
    if rows.numel():
        programs = num_tokens * triton.cdiv(width, TILE[0]) + triton.cdiv(num_rows, CHECKED)
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
        _combine[(num_tokens * triton.cdiv(width, TILE[0]),)](
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
        CHECKED=CHECKED, **_tile(top_k, BACKWARD_TILE),
    )  # fmt: skip
    return grad_rows, grad_weights


def _tile(top_k: int, tile: tuple[int, int] = TILE) -> dict[str, int]:
    choices = min(CHOICES, triton.next_power_of_2(top_k))
    return {"TOP_K": top_k, "CHOICES": choices, "COLUMNS": tile[0], "num_warps": tile[1]}


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


@triton.jit(do_not_specialize=["num_chunks"])
def _scan(
    by_chunk_ptr, totals_ptr, num_chunks, BINS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Replace the counts of each chunk by the counts of all chunks before it, in place."""
    expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    before = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, num_chunks, ROWS):
        chunk = start + tl.arange(0, ROWS)
        at = by_chunk_ptr + chunk[:, None] * BINS + expert[None, :]
        mask = chunk[:, None] < num_chunks
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, before[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        before += tl.sum(counts, 0)
    tl.store(totals_ptr + expert, before)


@triton.jit(do_not_specialize=["num_assignments", "num_rows"])
def _place(
    experts_ptr, by_chunk_ptr, totals_ptr, counts_ptr, ends_ptr, row_ptr, source_ptr,
    num_assignments, num_rows, num_experts, align, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sort a chunk by expert, stably, and write where each assignment goes."""
    chunk = tl.program_id(0)
    bins = tl.arange(0, BINS)
    totals = tl.where(bins < num_experts, tl.load(totals_ptr + bins), 0)
    padded = tl.cdiv(totals, align) * align
    ends = tl.cumsum(padded, 0)
    if chunk == 0:
        tl.store(counts_ptr + bins, totals, mask=bins < num_experts)
        tl.store(ends_ptr + bins, ends, mask=bins < num_experts)
    expert = _experts_of_chunk(experts_ptr, num_assignments, num_experts, CHUNK)
    ordered = tl.sort(expert * CHUNK + tl.arange(0, CHUNK))  # the position breaks ties: stable
    counts = tl.histogram(expert, BINS)
    first = tl.cumsum(counts, 0) - counts  # of each expert in `ordered`
    shift = ends - padded + tl.load(by_chunk_ptr + chunk * BINS + bins) - first
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
