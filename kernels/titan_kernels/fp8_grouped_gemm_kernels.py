"""Triton kernels of `fp8_grouped_gemm.py`. Both operands lie along the sum: wgmma takes no other float8."""

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
from titan_kernels.grouped_gemm_kernels import plan, planned_tile, tile_at, weight_block
from titan_kernels.launch import num_programs, takes_tensor_map
from titan_kernels.tensor_maps import blocks_of, load_rows, rows_of

# Untuned: never measured on a GPU. A blockwise product holds two accumulators, the sum and the 128 steps being added to
# it. block_k is the width of a scale, and block_n of a blockwise product must not exceed it.
PRODUCT = GemmConfig(128, 128, 128, num_warps=8, num_stages=4)
WEIGHT_GRADIENT = GemmConfig(128, 128, 128, num_warps=8, num_stages=4)


def product(
    q_RK: Tensor,
    scale: Tensor,
    q_ENK: Tensor,
    weight_scale: Tensor,
    ends_E: Tensor,
    dtype: torch.dtype,
    blockwise: bool,
    config: GemmConfig = PRODUCT,
) -> Tensor:
    """Launch x @ weight[e].T; scales are (R, B) and (E, N blocks, K blocks), or if not `blockwise` (R) and (E, N)."""
    (num_rows, width_k), (num_experts, width_n, _) = q_RK.shape, q_ENK.shape
    y = torch.empty(num_rows, width_n, dtype=dtype, device=q_RK.device)
    if y.numel() == 0 or width_k == 0:
        return y.zero_()
    config = replace(config, block_n=min(config.block_n, max(32, triton.next_power_of_2(width_n))))
    mapped = config.tensor_map and takes_tensor_map(q_RK, q_ENK)
    _product[(num_programs(q_RK) * config.programs,)](
        rows_of(q_RK, [config.block_m, config.block_k], mapped),
        blocks_of(q_ENK, [1, config.block_n, config.block_k], mapped),
        y, plan(ends_E, num_rows, config.block_m), scale, weight_scale,
        scale.stride(-1), weight_scale.stride(0), weight_scale.stride(1), weight_scale.stride(-1),
        width_n, width_k, num_experts,
        BLOCKWISE=blockwise, EVEN_K=width_k % config.block_k == 0, **constants_of(config, mapped),
    )  # fmt: skip
    return y


def weight_gradient(
    grad_OR: Tensor,
    grad_scale_BO: Tensor,
    x_IR: Tensor,
    x_scale_BI: Tensor,
    ends_E: Tensor,
    dtype: torch.dtype,
    config: GemmConfig = WEIGHT_GRADIENT,
) -> Tensor:
    """Launch grad[rows of e].T @ x[rows of e] from transposed operands with a scale for 128 rows of a column."""
    (out, num_rows), width, num_experts = grad_OR.shape, x_IR.shape[0], ends_E.shape[0]
    gradient = torch.empty(num_experts, out, width, dtype=dtype, device=x_IR.device)
    if gradient.numel() == 0 or num_rows == 0:
        return gradient.zero_()
    mapped = config.tensor_map and takes_tensor_map(grad_OR, x_IR)
    _weight_gradient[(num_programs(x_IR) * config.programs,)](
        blocks_of(grad_OR, [config.block_m, config.block_k], mapped),
        blocks_of(x_IR, [config.block_n, config.block_k], mapped),
        grad_scale_BO, x_scale_BI, gradient, ends_E, num_rows, grad_OR.stride(0), out, width, num_experts,
        **constants_of(config, mapped),
    )  # fmt: skip
    return gradient


@triton.jit(do_not_specialize=["scale_stride"])
def _product(
    x, weight, y_ptr, tiles_ptr, scale_ptr, weight_scale_ptr,
    scale_stride, expert_stride, n_stride, k_stride, width_n, width_k, num_experts,
    BLOCKWISE: tl.constexpr, TENSOR_MAP: tl.constexpr, FLATTEN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.load(tiles_ptr), tl.cdiv(width_n, BLOCK_N)
    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        expert, row, end, stop, n = planned_tile(tiles_ptr, index, tiles_m, tiles_n, num_experts, GROUP_M)
        rows = row + tl.arange(0, BLOCK_M)
        column = n * BLOCK_N + tl.arange(0, BLOCK_N)
        steps = tl.where(expert < num_experts, tl.cdiv(width_k, BLOCK_K), 0)
        weight_scales = weight_scale_ptr + expert.to(tl.int64) * expert_stride
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            a = load_rows(x, row, stop, step * BLOCK_K, width_k, BLOCK_M, BLOCK_K, TENSOR_MAP, EVEN_K)
            b = weight_block(
                weight, expert, n * BLOCK_N, step * BLOCK_K, width_n, width_k, num_experts,
                BLOCK_N, BLOCK_K, False, TENSOR_MAP,
            )  # fmt: skip
            if BLOCKWISE:
                at = scale_ptr + step * scale_stride + rows
                scale = tl.load(at, mask=rows < end, other=0.0)
                scale *= tl.load(weight_scales + n * BLOCK_N // BLOCK_K * n_stride + step * k_stride)
                total += tl.dot(a, b) * scale[:, None]
            else:
                total = tl.dot(a, b, total, max_num_imprecise_acc=BLOCK_K)
        if not BLOCKWISE:
            scale = tl.load(scale_ptr + rows, mask=rows < end, other=0.0)
            of_weight = (column < width_n) & (expert < num_experts)
            total *= scale[:, None] * tl.load(weight_scales + column * n_stride, mask=of_weight, other=0.0)[None, :]
            total = tl.where(expert < num_experts, total, 0.0)  # there the scale of x may be NaN
        inside = (rows < end)[:, None] & (column < width_n)[None, :]
        at = rows.to(tl.int64)[:, None] * width_n + column[None, :]
        tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _columns_block(
    q, m, row, width, stride, start, end, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TENSOR_MAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Load q[m : m + ROWS, row : row + COLUMNS] of a transposed operand; if MASKED, zeros but for [start, end)."""
    column = row + tl.arange(0, COLUMNS)
    inside = ((column >= start) & (column < end))[None, :]
    if TENSOR_MAP:
        block = q.load([m, row])
        if MASKED:
            block = tl.where(inside, block, tl.zeros_like(block))
    else:
        line = m + tl.arange(0, ROWS)
        at = line.to(tl.int64)[:, None] * stride + column[None, :]
        block = tl.load(q + at, mask=inside & (line < width)[:, None], other=0.0)
    return block


@triton.jit
def _scaled_step(
    total, grad, x, grad_scale_ptr, x_scale_ptr, block, m, n, start, end, stride, out, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TENSOR_MAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the product of one block of rows."""
    a = _columns_block(grad, m, block * BLOCK_K, out, stride, start, end, BLOCK_M, BLOCK_K, TENSOR_MAP, MASKED)
    b = _columns_block(x, n, block * BLOCK_K, width, stride, start, end, BLOCK_N, BLOCK_K, TENSOR_MAP, MASKED)
    row, column = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    a_scale = tl.load(grad_scale_ptr + block * out + row, mask=row < out, other=0.0)
    b_scale = tl.load(x_scale_ptr + block * width + column, mask=column < width, other=0.0)
    return total + tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]


@triton.jit(do_not_specialize=["num_rows", "stride"])
def _weight_gradient(
    grad, x, grad_scale_ptr, x_scale_ptr, gradient_ptr, ends_ptr, num_rows, stride, out, width, num_experts,
    TENSOR_MAP: tl.constexpr, FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(out, BLOCK_M), tl.cdiv(width, BLOCK_N)
    for index in range(tl.program_id(0), num_experts * tiles_m * tiles_n, tl.num_programs(0)):
        expert = index // (tiles_m * tiles_n)
        m, n = tile_at(index % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
        m, n = m * BLOCK_M, n * BLOCK_N
        start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.minimum(tl.load(ends_ptr + expert), num_rows)
        first, last = tl.cdiv(start, BLOCK_K), end // BLOCK_K  # the blocks that are this expert's alone
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in range(first, last):
            total = _scaled_step(
                total, grad, x, grad_scale_ptr, x_scale_ptr, block, m, n, start, end, stride, out, width,
                BLOCK_M, BLOCK_N, BLOCK_K, TENSOR_MAP, False,
            )  # fmt: skip
        head, tail = start // BLOCK_K, end // BLOCK_K
        for block in range(head, tail + 1, tl.maximum(tail - head, 1)):  # both, or the one that they are
            if ((block < first) | (block >= last)) & (block * BLOCK_K < end):
                total = _scaled_step(
                    total, grad, x, grad_scale_ptr, x_scale_ptr, block, m, n, start, end, stride, out, width,
                    BLOCK_M, BLOCK_N, BLOCK_K, TENSOR_MAP, True,
                )  # fmt: skip
        row, column = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        at = expert.to(tl.int64) * out * width + row[:, None] * width + column[None, :]
        inside = (row < out)[:, None] & (column < width)[None, :]
        tl.store(gradient_ptr + at, total.to(gradient_ptr.dtype.element_ty), mask=inside)
