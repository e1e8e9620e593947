"""Triton kernels of `fp8_grouped_gemm.py`. Both operands lie along the sum: wgmma takes no other float8.

A product whose scales change every 128 steps holds the sum and the 128 steps that are added to it: at 128 x 256 these
are more than the registers. So its tile is 128 x 128, and where the gradient's has two pieces, they are summed one
after the other over the same block of the other operand. The rowwise product is as in `grouped_gemm_kernels.py`.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
# (a checker sees a kernel as the Python function that it is not)

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_kernels.gemm_configs import GemmConfig, constants_of
from titan_kernels.grouped_gemm_kernels import (
    plan,
    planned_tile,
    steps_of,
    store_block,
    store_tile,
    tile_at,
    weight_block,
    zero_rest,
)
from titan_kernels.launch import architecture, num_programs, takes_tensor_map
from titan_kernels.tensor_maps import blocks_of, load_rows, rows_of, store_rows

# By major compute capability, 8 for all where the copy engine cannot read or write the operands; block_k is the width
# of a scale. The stages are what shared memory takes beside the piece of a tile that is written. Measured on an H200
# (torch 2.11, Triton 3.6) at 32768 x 4096 x 7168 of 4 experts, in TFLOP/s: blockwise 982 nested in tiles of 128 x 128,
# rows by a plain map and written through pointers (763 flattened of 128 x 256, 648 flattened of 128 x 128, 660 nested
# with rows by `rows_of`); rowwise 1490 flattened; the weight gradient 875 with two
# programs of 128 x 128 a multiprocessor, 657 with one of 256 x 128, 591 with one of 128 x 128. Others are unmeasured.
BLOCKWISE = {
    8: GemmConfig(128, 128, 128, num_warps=8, num_stages=2),
    9: GemmConfig(128, 128, 128, num_warps=8, num_stages=4, flatten=False),
    10: GemmConfig(128, 128, 128, num_warps=8, num_stages=4),
}
ROWWISE = {**BLOCKWISE, 9: GemmConfig(128, 256, 128, num_warps=8, num_stages=4, pieces=2)}
UNALIGNED_PRODUCT = GemmConfig(64, 64, 128, num_warps=8, num_stages=2)  # loads single bytes: larger tiles spill
WEIGHT_GRADIENT = {
    8: GemmConfig(128, 128, 128, num_warps=8, num_stages=2),
    9: GemmConfig(128, 128, 128, num_warps=4, num_stages=3, pieces=2, programs=2),
    10: GemmConfig(128, 128, 128, num_warps=8, num_stages=4),
}


def config_from(configs: dict[int, GemmConfig], dtype: torch.dtype, mapped: bool) -> GemmConfig:
    """Return this device's configuration: fewer stages where what is written takes more than two bytes a value."""
    config = configs[min(max(architecture() // 10, 8), 10) if mapped else 8]
    return replace(config, num_stages=config.num_stages - 1) if mapped and dtype.itemsize > 2 else config


def blockwise_product(
    q_RK: Tensor,
    scale_RB: Tensor,
    q_ENK: Tensor,
    weight_scale: Tensor,
    ends_E: Tensor,
    dtype: torch.dtype,
    config: GemmConfig | None = None,
) -> Tensor:
    """Launch x @ weight[e].T; scales of weights are (E, N blocks, K blocks), in any order of strides."""
    (num_rows, width_k), (num_experts, width_n, _) = q_RK.shape, q_ENK.shape
    y = torch.empty(num_rows, width_n, dtype=dtype, device=q_RK.device)
    if y.numel() == 0 or width_k == 0:
        return y.zero_()
    mapped = takes_tensor_map(q_RK, q_ENK)
    config = config or _config_of(BLOCKWISE, width_k, width_n, dtype, mapped)
    _blockwise_product[(num_programs(q_RK) * config.programs,)](
        blocks_of(q_RK, [config.block_m, config.block_k], mapped),
        blocks_of(q_ENK, [1, config.block_n, config.block_k], mapped),
        y, plan(ends_E, num_rows, config.block_m), scale_RB, weight_scale, scale_RB.stride(1), *weight_scale.stride(),
        num_rows, width_n, width_k, num_experts,
        EVEN_K=width_k % config.block_k == 0, **constants_of(config, mapped),
    )  # fmt: skip
    return y


def rowwise_product(
    q_RK: Tensor,
    scale_R: Tensor,
    q_ENK: Tensor,
    scale_EN: Tensor,
    ends_E: Tensor,
    dtype: torch.dtype,
    config: GemmConfig | None = None,
) -> Tensor:
    """Launch x @ weight[e].T with a scale for each row of both."""
    (num_rows, width_k), (num_experts, width_n, _) = q_RK.shape, q_ENK.shape
    y = torch.empty(num_rows, width_n, dtype=dtype, device=q_RK.device)
    if y.numel() == 0 or width_k == 0:
        return y.zero_()
    mapped = takes_tensor_map(q_RK, q_ENK, y)
    config = config or _config_of(ROWWISE, width_k, width_n, dtype, mapped)
    _rowwise_product[(num_programs(q_RK) * config.programs,)](
        rows_of(q_RK, [config.block_m, config.block_k], mapped),
        blocks_of(q_ENK, [1, config.block_n, config.block_k], mapped),
        rows_of(y, [config.block_m, config.block_n // config.pieces], mapped),
        plan(ends_E, num_rows, config.block_m), scale_R, scale_EN.contiguous(), num_rows, width_n, width_k, num_experts,
        EVEN_K=width_k % config.block_k == 0, **constants_of(config, mapped),
    )  # fmt: skip
    return y


def _config_of(
    configs: dict[int, GemmConfig], width_k: int, width_n: int, dtype: torch.dtype, mapped: bool
) -> GemmConfig:
    config = UNALIGNED_PRODUCT if width_k % 16 else config_from(configs, dtype, mapped)
    if width_n <= config.block_n // config.pieces:
        config = replace(config, block_n=max(32, triton.next_power_of_2(width_n)), pieces=1)
    return config


def weight_gradient(
    grad_OP: Tensor,
    grad_scale_QO: Tensor,
    x_IP: Tensor,
    x_scale_QI: Tensor,
    ends_E: Tensor,
    dtype: torch.dtype,
    config: GemmConfig | None = None,
) -> Tensor:
    """Launch grad[rows of e].T @ x[rows of e] from operands of `quantize_128x1`."""
    (out, _), width, num_experts = grad_OP.shape, x_IP.shape[0], ends_E.shape[0]
    gradient = torch.empty(num_experts, out, width, dtype=dtype, device=x_IP.device)
    if gradient.numel() == 0 or grad_OP.numel() == 0:
        return gradient.zero_()
    mapped = takes_tensor_map(grad_OP, x_IP, gradient)
    config = config or config_from(WEIGHT_GRADIENT, dtype, mapped)
    half = config.block_m // config.pieces
    _weight_gradient[(num_programs(x_IP) * config.programs,)](
        blocks_of(grad_OP, [half, config.block_k], mapped), blocks_of(x_IP, [config.block_n, config.block_k], mapped),
        grad_scale_QO, x_scale_QI, blocks_of(gradient, [1, half, config.block_n], mapped),
        ends_E, grad_scale_QO.shape[0], out, width, num_experts, **constants_of(config, mapped),
    )  # fmt: skip
    return gradient


@triton.jit(do_not_specialize=["scale_stride", "num_rows"])
def _blockwise_product(
    x, weight, y_ptr, tiles_ptr, scale_ptr, weight_scale_ptr, scale_stride, expert_stride, n_stride, k_stride,
    num_rows, width_n, width_k, num_experts,
    TENSOR_MAP: tl.constexpr, FLATTEN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Add the product of each 128 steps, scaled. BLOCK_N is not wider than a scale of weights, BLOCK_K."""
    tiles_m, tiles_n = tl.load(tiles_ptr), tl.cdiv(width_n, BLOCK_N)
    steps = tl.cdiv(width_k, BLOCK_K)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, _, n = planned_tile(tiles_ptr, index, tiles_m, tiles_n, num_experts, GROUP_M)
        n *= BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        weight_scales = weight_scale_ptr + expert.to(tl.int64) * expert_stride + n // BLOCK_K * n_stride
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            k = step * BLOCK_K
            # rows past the end are another's, or NaN, and are not written: rows of a product don't meet
            a = x.load([row, k]) if TENSOR_MAP else load_rows(x, row, end, k, width_k, BLOCK_M, BLOCK_K, False, EVEN_K)
            b = weight_block(weight, expert, n, k, width_n, width_k, num_experts, BLOCK_N, BLOCK_K, False, TENSOR_MAP)
            scale = tl.load(scale_ptr + step * scale_stride + rows, mask=rows < end, other=0.0)
            scale *= tl.load(weight_scales + step * k_stride)
            total += tl.dot(a, b) * scale[:, None]
        store_rows(y_ptr, row, end, n, width_n, total, False)
    zero_rest(y_ptr, tiles_ptr, num_rows, width_n, BLOCK_M, BLOCK_N, PIECES, False)


@triton.jit(do_not_specialize=["num_rows"])
def _rowwise_product(
    x, weight, y, tiles_ptr, scale_ptr, weight_scale_ptr, num_rows, width_n, width_k, num_experts,
    TENSOR_MAP: tl.constexpr, FLATTEN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.load(tiles_ptr), tl.cdiv(width_n, BLOCK_N)
    steps = tl.cdiv(width_k, BLOCK_K)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, stop, n = planned_tile(tiles_ptr, index, tiles_m, tiles_n, num_experts, GROUP_M)
        n *= BLOCK_N
        rows, columns = row + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            k = step * BLOCK_K
            a = load_rows(x, row, stop, k, width_k, BLOCK_M, BLOCK_K, TENSOR_MAP, EVEN_K)
            b = weight_block(weight, expert, n, k, width_n, width_k, num_experts, BLOCK_N, BLOCK_K, False, TENSOR_MAP)
            total = tl.dot(a, b, total)
        total *= tl.load(scale_ptr + rows, mask=rows < stop, other=0.0)[:, None]
        of_weight = (columns < width_n) & (row < stop)
        total *= tl.load(weight_scale_ptr + expert * width_n + columns, mask=of_weight, other=0.0)[None, :]
        store_tile(y, row, end, n, width_n, total, PIECES, TENSOR_MAP)
    zero_rest(y, tiles_ptr, num_rows, width_n, BLOCK_M, BLOCK_N, PIECES, TENSOR_MAP)


@triton.jit
def block_of(q, line, block, height, num_blocks, LINES: tl.constexpr, BLOCK: tl.constexpr, TENSOR_MAP: tl.constexpr):
    """Load a block of rows of `line` to `line` + LINES of a transposed operand; zeros past the last block."""
    if TENSOR_MAP:
        q = q.load([line, block * BLOCK])
    else:
        lines, rows = line + tl.arange(0, LINES), block * BLOCK + tl.arange(0, BLOCK)
        at = lines.to(tl.int64)[:, None] * (num_blocks * BLOCK) + rows[None, :]
        q = tl.load(q + at, mask=((lines < height) & (block < num_blocks))[:, None], other=0.0)
    return q


@triton.jit
def scales_of(scale_ptr, line, block, height, num_blocks, LINES: tl.constexpr):
    """Load the scales of a block of rows; zeros past the last block."""
    lines = line + tl.arange(0, LINES)
    return tl.load(scale_ptr + block * height + lines, mask=(lines < height) & (block < num_blocks), other=0.0)


@triton.jit
def blocks_of_expert(ends_ptr, expert, of_rows, BLOCK: tl.constexpr):
    """Return an expert's whole blocks [first, last), and whether it shares the one before and the one after them."""
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.minimum(tl.load(ends_ptr + expert), of_rows * BLOCK)
    first, last = tl.cdiv(start, BLOCK), end // BLOCK
    before = (start < first * BLOCK) & (start < end)
    after = (first <= last) & (last * BLOCK < end)
    return first, last, before.to(tl.int32), after.to(tl.int32)


@triton.jit(do_not_specialize=["num_blocks"])
def _weight_gradient(
    grad, x, grad_scale_ptr, x_scale_ptr, gradient, ends_ptr, num_blocks, out, width, num_experts,
    TENSOR_MAP: tl.constexpr, FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Sum over an expert's whole blocks of rows, then over its rows of the blocks that it shares."""
    HALF: tl.constexpr = BLOCK_M // PIECES
    tiles_m, tiles_n, of_rows = tl.cdiv(out, BLOCK_M), tl.cdiv(width, BLOCK_N), num_blocks - 2 * num_experts
    for index in tl.range(tl.program_id(0), num_experts * tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        expert = index // (tiles_m * tiles_n)
        m, n = tile_at(index % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
        m, n = m * BLOCK_M, n * BLOCK_N
        first, last, before, after = blocks_of_expert(ends_ptr, expert, of_rows, BLOCK_K)
        whole = tl.maximum(last - first, 0)
        steps = whole + before + after
        shared = tl.where(steps > 0, of_rows + 2 * expert + 1 - before, num_blocks) - whole
        top, bottom = tl.zeros((HALF, BLOCK_N), tl.float32), tl.zeros((HALF, BLOCK_N), tl.float32)
        for step in range(steps_of(0, steps, steps, 1)):
            block = step + tl.where(step < whole, first, shared)
            x_scale = scales_of(x_scale_ptr, n, block, width, num_blocks, BLOCK_N)
            scale = scales_of(grad_scale_ptr, m, block, out, num_blocks, HALF)
            b = block_of(x, n, block, width, num_blocks, BLOCK_N, BLOCK_K, TENSOR_MAP)
            a = block_of(grad, m, block, out, num_blocks, HALF, BLOCK_K, TENSOR_MAP)
            top += tl.dot(a, b.T) * x_scale[None, :] * scale[:, None]
            if PIECES == 2:
                scale = scales_of(grad_scale_ptr, m + HALF, block, out, num_blocks, HALF)
                a = block_of(grad, m + HALF, block, out, num_blocks, HALF, BLOCK_K, TENSOR_MAP)
                # zeros that wait for `top`: else the compiler begins this product before the registers of the other
                # are free, and spills
                zeros = tl.where(step < 0, top, 0.0)
                bottom += tl.dot(a, b.T, zeros) * x_scale[None, :] * scale[:, None]
        store_block(gradient, expert, m, n, out, width, top, TENSOR_MAP)
        if PIECES == 2:
            store_block(gradient, expert, m + HALF, n, out, width, bottom, TENSOR_MAP)
