"""Triton kernels of `quant.py`: each reads its input once, but for rowwise, whose second read of a row meets L2.

Bytes that must move for n bf16 values: 2n read and n written (128 x 128: 2n, its transpose is written too).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
# (a checker sees a kernel as the Python function that it is not)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Tiles of 4096 to 16384 values: 32 to 64 a thread, two to eight 16-byte loads each. Measured on an H200 (torch 2.11,
# Triton 3.6), in parts of the rate of a copy: 1 x 128 98 %, 128 x 1 73 % (62 % with eight warps), 128 x 128 61 %.
ROWS_1X128, WARPS_1X128 = 32, 4
COLUMNS_128X1, WARPS_128X1 = 64, 4
WARPS_128X128 = 8
COLUMNS_ROWWISE, WARPS_ROWWISE = 4096, 4


def quantize_1x128(x_RK: Tensor, q_RK: Tensor, scale_RB: Tensor) -> None:
    """Launch the quantisation of 1 x 128 blocks into `q_RK` and the columns of `scale_RB`."""
    num_rows, width = x_RK.shape
    if x_RK.numel():
        _quantize_1x128[(triton.cdiv(num_rows, ROWS_1X128) * triton.cdiv(width, 128),)](
            x_RK, q_RK, scale_RB, num_rows, width, scale_RB.stride(1), ROWS=ROWS_1X128, num_warps=WARPS_1X128
        )


def quantize_128x1(x_RK: Tensor, ends_E: Tensor | None, q_KP: Tensor, scale_QK: Tensor) -> None:
    """Launch the quantisation of 128 x 1 blocks, transposed."""
    (num_rows, width), num_blocks = x_RK.shape, scale_QK.shape[0]
    if x_RK.numel():
        ends, num_experts = (scale_QK, 0) if ends_E is None else (ends_E, ends_E.shape[0])
        _quantize_128x1[(num_blocks * triton.cdiv(width, COLUMNS_128X1),)](
            x_RK, ends, q_KP, scale_QK, num_rows, width, num_blocks, num_experts,
            ENDS=ends_E is not None, COLUMNS=COLUMNS_128X1, num_warps=WARPS_128X1,
        )  # fmt: skip


def quantize_128x128(weight_EOI: Tensor, q_EOI: Tensor, q_EIO: Tensor, scale: Tensor) -> None:
    """Launch the quantisation of 128 x 128 blocks, as they are and transposed."""
    experts, out, width = weight_EOI.shape
    if weight_EOI.numel():
        _quantize_128x128[(triton.cdiv(width, 128), triton.cdiv(out, 128), experts)](
            weight_EOI, q_EOI, q_EIO, scale, out, width, num_warps=WARPS_128X128
        )


def quantize_rowwise(x: Tensor, q: Tensor, scale: Tensor) -> None:
    """Launch the quantisation of rows."""
    width = x.shape[-1]
    if x.numel():
        _quantize_rowwise[(x.numel() // width,)](
            x, q, scale, width,
            COLUMNS=min(COLUMNS_ROWWISE, triton.next_power_of_2(width)), num_warps=WARPS_ROWWISE,
        )  # fmt: skip


@triton.jit
def scale_of(amax):
    """Return amax / 448, at least quant.SMALLEST_SCALE."""
    return tl.maximum(amax * (1 / 448.0), 1e-30)


@triton.jit
def rounded(x, scale):
    """Return x / scale as float8. NaN stays NaN: the maximum skips it, so it spoils its own value and not the scale."""
    scaled = x * tl.div_rn(1.0, scale)
    return tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["num_rows", "scale_stride"])
def _quantize_1x128(x_ptr, q_ptr, scale_ptr, num_rows, width, scale_stride, ROWS: tl.constexpr):
    m, k = _block_at(width, 128)
    row = m * ROWS + tl.arange(0, ROWS)
    column = (k * 128 + tl.arange(0, 128))[None, :]
    at = row.to(tl.int64)[:, None] * width + column
    inside = (row < num_rows)[:, None] & (column < width)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(x), 1))
    tl.store(q_ptr + at, rounded(x, scale[:, None]), mask=inside)
    tl.store(scale_ptr + k.to(tl.int64) * scale_stride + row, scale, mask=row < num_rows)


@triton.jit
def _block_at(width, COLUMNS: tl.constexpr):
    """Return (block of rows, block of columns) of this program: neighbours read neighbouring bytes."""
    across = tl.cdiv(width, COLUMNS)
    return tl.program_id(0) // across, tl.program_id(0) % across


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _quantize_128x1(
    x_ptr, ends_ptr, q_ptr, scale_ptr, num_rows, width, num_blocks, num_experts,
    ENDS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    place, k = _block_at(width, COLUMNS)
    block, begin, end, last = place, 0, num_rows, num_rows
    if ENDS:
        last = tl.minimum(tl.load(ends_ptr + num_experts - 1), num_rows)
        block, begin, end = _shared_block(ends_ptr, place, num_blocks - 2 * num_experts)
    if begin < end:
        row, column = block * 128 + tl.arange(0, 128), k * COLUMNS + tl.arange(0, COLUMNS)
        inside = (row < last)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scale = scale_of(tl.max(tl.abs(x), 0))
        q = rounded(tl.where(((row >= begin) & (row < end))[:, None], x, 0.0), scale[None, :])
        line = q_ptr + column.to(tl.int64)[:, None] * (num_blocks * 128)
        tl.store(line + place * 128 + tl.arange(0, 128)[None, :], q.T, mask=(column < width)[:, None])
        tl.store(scale_ptr + place.to(tl.int64) * width + column, scale, mask=column < width)


@triton.jit
def _shared_block(ends_ptr, place, num_blocks):
    """Return which block of rows stands at `place`, and which rows of it: all, or after all blocks an expert's.

    Those are two an expert: the block of its first row, and the one after its last whole one. No rows where it shares
    no such block, or where both are one.
    """
    shared = place - num_blocks
    expert = shared // 2
    start = tl.load(ends_ptr + expert - 1, mask=shared >= 2, other=0)
    end = tl.minimum(tl.load(ends_ptr + expert, mask=shared >= 0, other=0), num_blocks * 128)
    first, after = tl.cdiv(start, 128), end // 128
    tail = shared % 2 == 1
    block = tl.where(tail, after, first - 1)
    begin = tl.where(tail, tl.where(after < first, end, after * 128), start)
    stop = tl.where(tail, end, tl.minimum(end, first * 128))
    ordinary = shared < 0
    return tl.where(ordinary, place, block), tl.where(ordinary, 0, begin), tl.where(ordinary, num_blocks * 128, stop)


@triton.jit
def _quantize_128x128(weight_ptr, q_ptr, transposed_ptr, scale_ptr, out, width):
    expert = tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(1) * 128 + tl.arange(0, 128), tl.program_id(0) * 128 + tl.arange(0, 128)
    inside = (row < out)[:, None] & (column < width)[None, :]
    start = expert * out * width
    at = start + row[:, None] * width + column[None, :]
    x = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(tl.abs(x), 1), 0))
    q = rounded(x, scale)
    tl.store(q_ptr + at, q, mask=inside)
    turned = (column < width)[:, None] & (row < out)[None, :]
    tl.store(transposed_ptr + start + column[:, None] * out + row[None, :], q.T, mask=turned)
    tl.store(
        scale_ptr + (expert * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0), scale
    )


@triton.jit
def _quantize_rowwise(x_ptr, q_ptr, scale_ptr, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = scale_of(tl.max(largest, 0))
    tl.store(scale_ptr + row, scale)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(q_ptr + row * width + column, rounded(x, scale), mask=column < width)
