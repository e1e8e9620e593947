"""Triton kernels of `permutation.py`.

Bytes that must move, with e bytes an element: permute T*D*e read (a token's K reads meet in L2) and R*D*e written,
unpermute the same the other way. Placement moves a few integers an assignment; what it costs is its three launches.
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

# Untuned: never measured on a GPU. A chunk of 1024 is what four warps sort in registers; a tile of 4 x 1024 gives each
# of 128 threads four 16-byte loads in flight (bf16).
CHUNK = 1024
SCANNED = (64, 32)  # chunks and experts of a tile of the scan
TILE_ROWS, TILE_COLUMNS = 4, 1024
NUM_WARPS = 4


def place(experts_TK: Tensor, num_experts: int, align: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the counting sort: count by chunk, scan the chunks, place."""
    num_assignments = experts_TK.numel()
    num_chunks = max(1, triton.cdiv(num_assignments, CHUNK))
    bins = triton.next_power_of_2(max(num_experts + 1, SCANNED[1]))  # the last is that of dropped assignments
    ints = {"dtype": torch.int32, "device": experts_TK.device}
    counts, ends = torch.empty(num_experts, **ints), torch.empty(num_experts, **ints)
    row, source = torch.empty(experts_TK.shape, **ints), torch.empty(num_rows, **ints)
    by_chunk, totals = torch.empty(num_chunks, bins, **ints), torch.empty(bins, **ints)
    shared = {"BINS": bins, "num_warps": NUM_WARPS}
    _count[(num_chunks,)](experts_TK, by_chunk, source, num_assignments, num_rows, num_experts, CHUNK=CHUNK, **shared)
    _scan[(bins // SCANNED[1],)](by_chunk, totals, num_chunks, ROWS=SCANNED[0], COLUMNS=SCANNED[1], **shared)
    _place[(num_chunks,)](
        experts_TK, by_chunk, totals, counts, ends, row, source,
        num_assignments, num_rows, num_experts, align, CHUNK=CHUNK, **shared,
    )  # fmt: skip
    return counts, ends, row, source


def gather(x_TD: Tensor, source_R: Tensor, top_k: int) -> Tensor:
    """Launch rows[r] = x[source[r] // top_k]; zeros where the source is -1."""
    num_rows, width = source_R.shape[0], x_TD.shape[1]
    rows = x_TD.new_empty(num_rows, width)
    if rows.numel():
        grid = (triton.cdiv(num_rows, TILE_ROWS), triton.cdiv(width, TILE_COLUMNS))
        _gather[grid](
            x_TD, source_R, rows, num_rows, x_TD.shape[0] * top_k, top_k, width,
            ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return rows


def combine(rows_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Launch x[t] = sum over k of weights[t, k] * rows[row[t, k]]."""
    (num_tokens, top_k), (num_rows, width) = row_TK.shape, rows_RD.shape
    x = rows_RD.new_empty(num_tokens, width)
    if x.numel():
        grid = (triton.cdiv(num_tokens, TILE_ROWS), triton.cdiv(width, TILE_COLUMNS))
        _combine[grid](
            rows_RD, row_TK, row_TK if weights_TK is None else weights_TK, x, num_tokens, num_rows, width,
            TOP_K=top_k, WEIGHTED=weights_TK is not None, ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return x


def combine_backward(grad_TD: Tensor, rows_RD: Tensor, source_R: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the gradients of `combine` to rows and weights in one pass over the rows."""
    num_rows, width = rows_RD.shape
    grad_rows, grad_weights = torch.empty_like(rows_RD), torch.zeros_like(weights_TK)
    if rows_RD.numel():
        _combine_backward[(triton.cdiv(num_rows, TILE_ROWS),)](
            grad_TD, rows_RD, source_R, weights_TK, grad_rows, grad_weights,
            num_rows, weights_TK.numel(), weights_TK.shape[1], width,
            ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_rows, grad_weights


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


@triton.jit(do_not_specialize=["num_rows", "num_assignments"])
def _gather(
    x_ptr, source_ptr, rows_ptr, num_rows, num_assignments, top_k, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    source = tl.load(source_ptr + row, mask=row < num_rows, other=-1)
    placed = ((source >= 0) & (source < num_assignments))[:, None]
    token = (source // top_k).to(tl.int64)[:, None]
    values = tl.load(x_ptr + token * width + column, mask=placed & (column < width), other=0.0)
    inside = (row < num_rows)[:, None] & (column < width)
    tl.store(rows_ptr + row.to(tl.int64)[:, None] * width + column, values, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _combine(
    rows_ptr, row_ptr, weights_ptr, x_ptr, num_tokens, num_rows, width,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for choice in tl.static_range(TOP_K):
        row = tl.load(row_ptr + token * TOP_K + choice, mask=token < num_tokens, other=-1)
        placed = ((row >= 0) & (row < num_rows))[:, None] & (column < width)
        values = tl.load(rows_ptr + row.to(tl.int64)[:, None] * width + column, mask=placed, other=0.0)
        if WEIGHTED:
            weight = tl.load(weights_ptr + token * TOP_K + choice, mask=token < num_tokens, other=0.0)
            total += tl.where(placed, values.to(tl.float32) * weight.to(tl.float32)[:, None], 0.0)
        else:
            total += values.to(tl.float32)
    inside = (token < num_tokens)[:, None] & (column < width)
    tl.store(x_ptr + token.to(tl.int64)[:, None] * width + column, total.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_assignments"])
def _combine_backward(
    grad_ptr, rows_ptr, source_ptr, weights_ptr, grad_rows_ptr, grad_weights_ptr,
    num_rows, num_assignments, top_k, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.load(source_ptr + row, mask=row < num_rows, other=-1)
    placed = (source >= 0) & (source < num_assignments)
    weight = tl.load(weights_ptr + source, mask=placed, other=0.0).to(tl.float32)[:, None]
    token = (source // top_k).to(tl.int64)[:, None]
    at = row.to(tl.int64)[:, None] * width
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        column = (start + tl.arange(0, COLUMNS))[None, :]
        mask = placed[:, None] & (column < width)
        grad = tl.load(grad_ptr + token * width + column, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(rows_ptr + at + column, mask=mask, other=0.0).to(tl.float32)
        products += grad * values
        inside = (row < num_rows)[:, None] & (column < width)
        tl.store(grad_rows_ptr + at + column, (grad * weight).to(grad_rows_ptr.dtype.element_ty), mask=inside)
    grad_weight = tl.sum(products, 1).to(grad_weights_ptr.dtype.element_ty)
    tl.store(grad_weights_ptr + source, grad_weight, mask=placed)
