"""Triton kernels of `expert_mlp.py`: two products with the gate where they end, and the gradient of the gate.

The gradient is a kernel of its own after the product w2 grad. Where that product ended with it, on an H200 at
Qwen3-30B's shape, both took 1.95 ms (six values an element of a tile barely fit in registers); the product alone takes
1.14 ms, what is left moves six values an element, and a row's weight gets its gradient in one pass.
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

from titan_kernels import grouped_gemm_kernels as gemm
from titan_kernels.gemm_configs import GemmConfig, config_for, constants_of
from titan_kernels.grouped_gemm_kernels import planned_tile, weight_block
from titan_kernels.launch import dot_precision, num_programs, takes_tensor_map
from titan_kernels.tensor_maps import blocks_of, load_rows, rows_of, store_rows

GATE_ROWS, GATE_COLUMNS, GATE_WARPS = 4, 512, 4  # 16 bytes a thread and row, a few rows in flight


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
    down = config_for("pair", x_RD, x_RD.shape[1])
    tiles = gemm.plan(ends_E, x_RD.shape[0], down.block_m)
    grad_hidden = gemm.input_gradient(grad_RD, w2_EDF, ends_E)
    grad_gate, grad_up, hidden, grad_weights = gate_gradient(grad_hidden, gate_RF, up_RF, ends_E, weights_R)
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
    weights = [blocks_of(weight, [1, config.block_n, config.block_k], mapped) for weight in (w1_EFD, w3_EFD)]
    _gated_product[(num_programs(x) * config.programs,)](
        x if gathered else rows_of(x, [config.block_m, config.block_k], mapped), *weights,
        source_R if gathered else tiles, hidden, gate, up, tiles, width_n, width_k, num_experts, top_k,
        SAVE=save, GATHERED=gathered, EVEN_K=width_k % config.block_k == 0,
        PRECISION=dot_precision(x), **constants_of(config, mapped),
    )  # fmt: skip
    return hidden, gate, up


def gate_gradient(
    grad_RF: Tensor, gate_RF: Tensor, up_RF: Tensor, ends_E: Tensor, weights_R: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the gradients to gate and up, the (weighted) hidden rows, and the gradient to the weights of the rows.

    The hidden rows take the place of their gradient, `grad_RF`. Rows of nobody are left as they are.
    """
    num_rows, width = grad_RF.shape
    grad_gate, grad_up, weighted = torch.empty_like(gate_RF), torch.empty_like(up_RF), weights_R is not None
    grad_weights = torch.empty(num_rows if weighted else 0, dtype=torch.float32, device=grad_RF.device)
    if grad_RF.numel():
        _gate_gradient[(triton.cdiv(num_rows, GATE_ROWS),)](
            grad_RF, gate_RF, up_RF, weights_R if weighted else gate_RF, grad_gate, grad_up, grad_weights,
            ends_E, num_rows, width, ends_E.shape[0],
            WEIGHTED=weighted, ROWS=GATE_ROWS, COLUMNS=GATE_COLUMNS, num_warps=GATE_WARPS,
        )  # fmt: skip
    return grad_gate, grad_up, grad_RF, grad_weights


@triton.jit
def _gated_product(
    x, w1, w3, source_ptr, hidden, gate, up, tiles_ptr, width_n, width_k, num_experts, top_k,
    SAVE: tl.constexpr, GATHERED: tl.constexpr, TENSOR_MAP: tl.constexpr, FLATTEN: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.load(tiles_ptr), tl.cdiv(width_n, BLOCK_N)
    steps = tl.cdiv(width_k, BLOCK_K)
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
        for step in range(steps):
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
        store_rows(hidden, row, end, n, width_n, one * tl.sigmoid(one) * three, False)
        if SAVE:
            store_rows(gate, row, end, n, width_n, one, False)
            store_rows(up, row, end, n, width_n, three, False)


@triton.jit(do_not_specialize=["num_rows"])
def _gate_gradient(
    grad_ptr, gate_ptr, up_ptr, weights_ptr, grad_gate_ptr, grad_up_ptr, grad_weights_ptr,
    ends_ptr, num_rows, width, num_experts, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    end = tl.minimum(tl.load(ends_ptr + num_experts - 1), num_rows)
    weight = tl.full((ROWS,), 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(weights_ptr + row, mask=row < end, other=0.0).to(tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    dtype = gate_ptr.dtype.element_ty
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < end)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        hidden = silu * up
        products += grad * hidden
        grad *= weight[:, None]
        tl.store(grad_gate_ptr + at, (grad * up * (sigmoid + silu * (1 - sigmoid))).to(dtype), mask=inside)
        tl.store(grad_up_ptr + at, (grad * silu).to(dtype), mask=inside)
        tl.store(grad_ptr + at, (hidden * weight[:, None]).to(dtype), mask=inside)
    if WEIGHTED:
        tl.store(grad_weights_ptr + row, tl.sum(products, 1), mask=row < end)
