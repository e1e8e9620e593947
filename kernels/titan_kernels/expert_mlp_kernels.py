"""Triton kernels of `expert_mlp.py`: two products with the gate, or its gradient, where they end."""

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

from titan_kernels import grouped_gemm_kernels as gemm
from titan_kernels.grouped_gemm_kernels import GemmConfig, planned_tile, rows_block, weight_block
from titan_kernels.launch import architecture, dot_precision, num_programs, takes_tensor_map

# By (major compute capability, bytes of an element). Untuned: never measured on a GPU. The forward tile has two
# accumulators and the backward tile reads gate and up beside its own, so both are half as wide as a plain product's.
CONFIGS = {
    (8, 2): GemmConfig(128, 64, 64, num_warps=8, num_stages=3),
    (8, 4): GemmConfig(64, 32, 32, num_warps=4, num_stages=3, tensor_map=False),
    (9, 2): GemmConfig(128, 128, 64, num_warps=8, num_stages=4),
    (9, 4): GemmConfig(64, 32, 32, num_warps=4, num_stages=3, tensor_map=False),
    (10, 2): GemmConfig(128, 128, 64, num_warps=8, num_stages=4),
    (10, 4): GemmConfig(64, 32, 32, num_warps=4, num_stages=3, tensor_map=False),
}


def config_for(x: Tensor, hidden: int) -> GemmConfig:
    """Return the configuration of both kernels for operands like `x`."""
    config = CONFIGS[min(max(architecture() // 10, 8), 10), max(x.element_size(), 2)]
    return replace(config, block_n=min(config.block_n, max(32, triton.next_power_of_2(hidden))))


def forward(
    x: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor,
    w2_EDF: Tensor,
    ends_E: Tensor,
    save: bool,
    source_R: Tensor | None = None,
    top_k: int = 1,
    config: GemmConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch (y, gate, up); with `source_R`, `x` holds tokens, and rows are gathered from them.

    Without `save`, gate and up are empty.
    """
    config = config or config_for(x, w1_EFD.shape[1])
    num_rows = x.shape[0] if source_R is None else source_R.shape[0]
    tiles = gemm.plan(ends_E, num_rows, config.block_m)
    hidden, gate, up = gated_product(x, w1_EFD, w3_EFD, tiles, num_rows, save, source_R, top_k, config)
    down = gemm.config_for(hidden, *w2_EDF.shape[1:])
    if down.block_m != config.block_m:
        tiles = gemm.plan(ends_E, num_rows, down.block_m)
    return gemm.product(hidden, w2_EDF, tiles, down, transposed=False), gate, up


def backward(
    x_RD: Tensor,
    grad_RD: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor,
    w2_EDF: Tensor,
    ends_E: Tensor,
    weights_R: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the gradients to x, w1, w3, w2 and the weights of the rows (empty where there are none)."""
    config = config_for(x_RD, w1_EFD.shape[1])
    tiles = gemm.plan(ends_E, x_RD.shape[0], config.block_m)
    grad_gate, grad_up, hidden, grad_weights = gate_gradient(grad_RD, gate_RF, up_RF, w2_EDF, tiles, weights_R, config)
    down = gemm.config_for(x_RD, x_RD.shape[1], w1_EFD.shape[1])
    if down.block_m != config.block_m:
        tiles = gemm.plan(ends_E, x_RD.shape[0], down.block_m)
    grad_x = gemm.product(grad_gate, w1_EFD, tiles, down, transposed=True, also=(grad_up, w3_EFD))
    grad_1, grad_3 = (gemm.weight_gradient(grad, x_RD, ends_E) for grad in (grad_gate, grad_up))
    return grad_x, grad_1, grad_3, gemm.weight_gradient(grad_RD, hidden, ends_E), grad_weights


def gated_product(
    x: Tensor,
    w1_EFD: Tensor,
    w3_EFD: Tensor,
    tiles: Tensor,
    num_rows: int,
    save: bool,
    source_R: Tensor | None,
    top_k: int,
    config: GemmConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch hidden = silu(x @ w1[e].T) * (x @ w3[e].T), gate and up."""
    num_experts, width_n, width_k = w1_EFD.shape
    hidden = x.new_empty(num_rows, width_n)
    gate, up = (torch.empty_like(hidden) if save else x.new_empty(0) for _ in range(2))
    if hidden.numel() == 0 or x.numel() == 0:
        return hidden.zero_(), gate.zero_(), up.zero_()
    gathered = source_R is not None
    mapped = config.tensor_map and takes_tensor_map(w1_EFD, w3_EFD, *(() if gathered else (x,)))
    block = [1, config.block_n, config.block_k]
    _gated_product[(num_programs(x) * config.programs,)](
        gemm.operand(x, [config.block_m, config.block_k], mapped and not gathered),
        gemm.operand(w1_EFD, block, mapped), gemm.operand(w3_EFD, block, mapped),
        source_R if gathered else tiles, hidden, gate, up, tiles, width_n, width_k, num_experts, top_k,
        SAVE=save, GATHERED=gathered, TENSOR_MAP=mapped, EVEN_K=width_k % config.block_k == 0,
        PRECISION=dot_precision(x), **gemm.blocks_of(config),
    )  # fmt: skip
    return hidden, gate, up


def gate_gradient(
    grad_RD: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
    w2_EDF: Tensor,
    tiles: Tensor,
    weights_R: Tensor | None,
    config: GemmConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the gradients to gate and up, the (weighted) hidden rows, and the gradient to the weights of the rows."""
    num_experts, width_k, width_n = w2_EDF.shape
    grad_gate, grad_up, hidden = (torch.empty_like(gate_RF) for _ in range(3))
    weighted = weights_R is not None
    tiles_n = triton.cdiv(width_n, config.block_n)
    partial = grad_RD.new_empty(gate_RF.shape[0] if weighted else 0, tiles_n, dtype=torch.float32)
    if grad_gate.numel() == 0 or width_k == 0:
        return grad_gate.zero_(), grad_up.zero_(), hidden.zero_(), partial.zero_().sum(1)
    mapped = config.tensor_map and takes_tensor_map(grad_RD, w2_EDF)
    _gate_gradient[(num_programs(grad_RD) * config.programs,)](
        gemm.operand(grad_RD, [config.block_m, config.block_k], mapped),
        gemm.operand(w2_EDF, [1, config.block_k, config.block_n], mapped),
        gate_RF, up_RF, weights_R if weighted else gate_RF, grad_gate, grad_up, hidden, partial, tiles,
        width_n, width_k, num_experts,
        WEIGHTED=weighted, TENSOR_MAP=mapped, EVEN_K=width_k % config.block_k == 0, PRECISION=dot_precision(grad_RD),
        **gemm.blocks_of(config),
    )  # fmt: skip
    return grad_gate, grad_up, hidden, partial.sum(1)


@triton.jit
def _gated_product(
    x, w1, w3, source_ptr, hidden_ptr, gate_ptr, up_ptr, tiles_ptr, width_n, width_k, num_experts, top_k,
    SAVE: tl.constexpr, GATHERED: tl.constexpr, TENSOR_MAP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.load(tiles_ptr), tl.cdiv(width_n, BLOCK_N)
    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        expert, row, end, n = planned_tile(tiles_ptr, index, tiles_m, tiles_n, GROUP_M)
        rows = row + tl.arange(0, BLOCK_M)
        steps = tl.where(expert < num_experts, tl.cdiv(width_k, BLOCK_K), 0)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if GATHERED:
            source = tl.load(source_ptr + rows, mask=rows < end, other=-1)
            tokens = (source // top_k).to(tl.int64)[:, None] * width_k
            placed = (source >= 0)[:, None]
        for step in range(steps):
            k = step * BLOCK_K
            if GATHERED:
                column = (k + tl.arange(0, BLOCK_K))[None, :]
                a = tl.load(x + tokens + column, mask=placed if EVEN_K else placed & (column < width_k), other=0.0)
            else:
                a = rows_block(x, rows, row, end, k, width_k, BLOCK_M, BLOCK_K, TENSOR_MAP, EVEN_K)
            b = weight_block(w1, expert, n * BLOCK_N, k, width_n, width_k, BLOCK_N, BLOCK_K, False, TENSOR_MAP)
            gate = tl.dot(a, b, gate, input_precision=PRECISION)
            b = weight_block(w3, expert, n * BLOCK_N, k, width_n, width_k, BLOCK_N, BLOCK_K, False, TENSOR_MAP)
            up = tl.dot(a, b, up, input_precision=PRECISION)
        column = n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (rows < end)[:, None] & (column < width_n)[None, :]
        at = rows.to(tl.int64)[:, None] * width_n + column[None, :]
        dtype = hidden_ptr.dtype.element_ty
        tl.store(hidden_ptr + at, (gate * tl.sigmoid(gate) * up).to(dtype), mask=inside)
        if SAVE:
            tl.store(gate_ptr + at, gate.to(dtype), mask=inside)
            tl.store(up_ptr + at, up.to(dtype), mask=inside)


@triton.jit
def _gate_gradient(
    grad, w2, gate_ptr, up_ptr, weights_ptr, grad_gate_ptr, grad_up_ptr, hidden_ptr, partial_ptr, tiles_ptr,
    width_n, width_k, num_experts,
    WEIGHTED: tl.constexpr, TENSOR_MAP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.load(tiles_ptr), tl.cdiv(width_n, BLOCK_N)
    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        expert, row, end, n = planned_tile(tiles_ptr, index, tiles_m, tiles_n, GROUP_M)
        rows = row + tl.arange(0, BLOCK_M)
        steps = tl.where(expert < num_experts, tl.cdiv(width_k, BLOCK_K), 0)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            k = step * BLOCK_K
            a = rows_block(grad, rows, row, end, k, width_k, BLOCK_M, BLOCK_K, TENSOR_MAP, EVEN_K)
            b = weight_block(w2, expert, n * BLOCK_N, k, width_n, width_k, BLOCK_N, BLOCK_K, True, TENSOR_MAP)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        weight = tl.full((BLOCK_M,), 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + rows, mask=rows < end, other=0.0).to(tl.float32)
        # A half at a time: six values an element of the whole tile do not fit in registers (1.6 kB spilt a thread).
        halves = total.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1)
        left, right = halves.split()
        column = n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        products = _gate_gradient_at(
            left, rows, column, end, weight, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, hidden_ptr, width_n
        )
        products += _gate_gradient_at(
            right, rows, column + BLOCK_N // 2, end, weight,
            gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, hidden_ptr, width_n,
        )  # fmt: skip
        if WEIGHTED:
            tl.store(partial_ptr + rows.to(tl.int64) * tiles_n + n, products, mask=rows < end)


@triton.jit
def _gate_gradient_at(
    grad, rows, column, end, weight, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, hidden_ptr, width_n
):
    """Write what follows from the gradient to some columns of hidden rows; return its products with those, summed."""
    inside = (rows < end)[:, None] & (column < width_n)[None, :]
    at = rows.to(tl.int64)[:, None] * width_n + column[None, :]
    dtype = hidden_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    hidden = silu * up
    products = tl.sum(tl.where(inside, grad * hidden, 0.0), 1)
    tl.store(hidden_ptr + at, (hidden * weight[:, None]).to(dtype), mask=inside)
    grad *= weight[:, None]
    tl.store(grad_up_ptr + at, (grad * silu).to(dtype), mask=inside)
    tl.store(grad_gate_ptr + at, (grad * up * (sigmoid + silu * (1 - sigmoid))).to(dtype), mask=inside)
    return products
