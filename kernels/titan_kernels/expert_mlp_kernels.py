"""Triton kernels of `expert_mlp.py`: two products with the gate, or its gradient, where they end."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
# (a checker sees a kernel as the Python function that it is not)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_kernels import grouped_gemm_kernels as gemm
from titan_kernels.gemm_configs import GemmConfig, config_for, constants_of
from titan_kernels.grouped_gemm_kernels import planned_tile, steps_of, weight_block
from titan_kernels.launch import dot_precision, num_programs, takes_tensor_map
from titan_kernels.tensor_maps import blocks_of, halves, load_rows, rows_of, store_rows


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
    config = config or config_for("gated", x, w1_EFD.shape[1])
    num_rows = x.shape[0] if source_R is None else source_R.shape[0]
    tiles = gemm.plan(ends_E, num_rows, config.block_m)
    hidden, gate, up = gated_product(x, w1_EFD, w3_EFD, tiles, num_rows, save, source_R, top_k, config)
    down = config_for("product", hidden, w2_EDF.shape[1])
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
    config = config_for("gate_gradient", x_RD, w1_EFD.shape[1])
    tiles = gemm.plan(ends_E, x_RD.shape[0], config.block_m)
    grad_gate, grad_up, hidden, grad_weights = gate_gradient(grad_RD, gate_RF, up_RF, w2_EDF, tiles, weights_R, config)
    down = config_for("pair", x_RD, x_RD.shape[1])
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
    mapped = config.tensor_map and takes_tensor_map(x, w1_EFD, w3_EFD, hidden)
    weights = [blocks_of(weight, [1, config.block_n, config.block_k], mapped) for weight in (w1_EFD, w3_EFD)]
    written = [
        rows_of(y if y.numel() else hidden, [config.block_m, config.block_n], mapped) for y in (hidden, gate, up)
    ]
    _gated_product[(num_programs(x) * config.programs,)](
        x if gathered else rows_of(x, [config.block_m, config.block_k], mapped), *weights,
        source_R if gathered else tiles, *written, tiles, width_n, width_k, num_experts, top_k,
        SAVE=save, GATHERED=gathered, EVEN_K=width_k % config.block_k == 0,
        PRECISION=dot_precision(x), **constants_of(config, mapped),
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
    mapped = config.tensor_map and takes_tensor_map(grad_RD, w2_EDF, gate_RF, up_RF)
    piece = [config.block_m, config.block_n // 2]
    _gate_gradient[(num_programs(grad_RD) * config.programs,)](
        rows_of(grad_RD, [config.block_m, config.block_k], mapped),
        blocks_of(w2_EDF, [1, config.block_k, config.block_n], mapped),
        *(rows_of(x, piece, mapped) for x in (gate_RF, up_RF, grad_gate, grad_up, hidden)),
        weights_R if weighted else gate_RF, partial, tiles, width_n, width_k, num_experts,
        WEIGHTED=weighted, EVEN_K=width_k % config.block_k == 0, PRECISION=dot_precision(grad_RD),
        **constants_of(config, mapped),
    )  # fmt: skip
    return grad_gate, grad_up, hidden, partial.sum(1)


@triton.jit
def _gated_product(
    x, w1, w3, source_ptr, hidden, gate, up, tiles_ptr, width_n, width_k, num_experts, top_k,
    SAVE: tl.constexpr, GATHERED: tl.constexpr, TENSOR_MAP: tl.constexpr, FLATTEN: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.load(tiles_ptr), tl.cdiv(width_n, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, stop, n = planned_tile(tiles_ptr, index, tiles_m, tiles_n, num_experts, GROUP_M)
        n *= BLOCK_N
        one = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        three = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if GATHERED:
            rows = row + tl.arange(0, BLOCK_M)
            source = tl.load(source_ptr + rows, mask=rows < stop, other=-1)
            tokens = (source // top_k).to(tl.int64)[:, None] * width_k
            placed = (source >= 0)[:, None]
        for step in range(steps_of(row, stop, width_k, BLOCK_K)):
            k = step * BLOCK_K
            if GATHERED:
                column = (k + tl.arange(0, BLOCK_K))[None, :]
                a = tl.load(x + tokens + column, mask=placed if EVEN_K else placed & (column < width_k), other=0.0)
            else:
                a = load_rows(x, row, stop, k, width_k, BLOCK_M, BLOCK_K, TENSOR_MAP, EVEN_K)
            b = weight_block(w1, expert, n, k, width_n, width_k, num_experts, BLOCK_N, BLOCK_K, False, TENSOR_MAP)
            one = tl.dot(a, b, one, input_precision=PRECISION)
            b = weight_block(w3, expert, n, k, width_n, width_k, num_experts, BLOCK_N, BLOCK_K, False, TENSOR_MAP)
            three = tl.dot(a, b, three, input_precision=PRECISION)
        store_rows(hidden, row, end, n, width_n, one * tl.sigmoid(one) * three, TENSOR_MAP)
        if SAVE:
            store_rows(gate, row, end, n, width_n, one, TENSOR_MAP)
            store_rows(up, row, end, n, width_n, three, TENSOR_MAP)


@triton.jit
def _gate_gradient(
    grad, w2, gate, up, grad_gate, grad_up, hidden, weights_ptr, partial_ptr, tiles_ptr, width_n, width_k, num_experts,
    WEIGHTED: tl.constexpr, TENSOR_MAP: tl.constexpr, FLATTEN: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.load(tiles_ptr), tl.cdiv(width_n, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, stop, n = planned_tile(tiles_ptr, index, tiles_m, tiles_n, num_experts, GROUP_M)
        rows = row + tl.arange(0, BLOCK_M)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps_of(row, stop, width_k, BLOCK_K)):
            k = step * BLOCK_K
            a = load_rows(grad, row, stop, k, width_k, BLOCK_M, BLOCK_K, TENSOR_MAP, EVEN_K)
            b = weight_block(
                w2, expert, n * BLOCK_N, k, width_n, width_k, num_experts, BLOCK_N, BLOCK_K, True, TENSOR_MAP
            )
            total = tl.dot(a, b, total, input_precision=PRECISION)
        weight = tl.full((BLOCK_M,), 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.load(weights_ptr + rows, mask=rows < stop, other=0.0).to(tl.float32)
        left, right = halves(total)
        products = _gate_gradient_at(
            left, row, end, stop, n * BLOCK_N, weight, gate, up, grad_gate, grad_up, hidden, width_n, TENSOR_MAP
        )
        products += _gate_gradient_at(
            right, row, end, stop, n * BLOCK_N + BLOCK_N // 2, weight,
            gate, up, grad_gate, grad_up, hidden, width_n, TENSOR_MAP,
        )  # fmt: skip
        if WEIGHTED:
            tl.store(partial_ptr + rows.to(tl.int64) * tiles_n + n, products, mask=rows < end)


@triton.jit
def _gate_gradient_at(
    grad, row, end, stop, column, weight, gate, up, grad_gate, grad_up, hidden, width, TENSOR_MAP: tl.constexpr
):
    """Write what follows from the gradient to some columns of hidden rows; return its products with those, summed."""
    ROWS: tl.constexpr = grad.shape[0]
    COLUMNS: tl.constexpr = grad.shape[1]
    gated = load_rows(gate, row, stop, column, width, ROWS, COLUMNS, TENSOR_MAP, False).to(tl.float32)
    upward = load_rows(up, row, stop, column, width, ROWS, COLUMNS, TENSOR_MAP, False).to(tl.float32)
    sigmoid = tl.sigmoid(gated)
    silu = gated * sigmoid
    product = silu * upward
    products = tl.sum(grad * product, 1)
    store_rows(hidden, row, end, column, width, product * weight[:, None], TENSOR_MAP)
    grad *= weight[:, None]
    store_rows(grad_up, row, end, column, width, grad * silu, TENSOR_MAP)
    store_rows(grad_gate, row, end, column, width, grad * upward * (sigmoid + silu * (1 - sigmoid)), TENSOR_MAP)
    return products
