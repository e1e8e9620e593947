"""A grouped linear layer over blocks of rows: y = x @ weight[expert of the block].T.

Shapes: R rows in B = R / block_rows blocks, E experts, O output width, I input width. All rows of a block share an
expert; blocks of one expert need not be neighbours. A block whose expert is not in [0, E) belongs to nobody: its
results and gradients are zero whatever its rows hold. DeepGEMM's contiguous GEMMs have this layout (m-indices).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from titan_kernels.launch import runs_triton


def contiguous_grouped_linear(x_RI: Tensor, weight_EOI: Tensor, expert_B: Tensor, block_rows: int = 128) -> Tensor:
    """Return y_RO; x and weight have one dtype. `expert_B` is int32; `block_rows` is a multiple of 16."""
    if (
        x_RI.dim() != 2
        or weight_EOI.dim() != 3
        or x_RI.shape[1] != weight_EOI.shape[2]
        or x_RI.dtype != weight_EOI.dtype
    ):
        raise ValueError(
            "contiguous_grouped_linear() takes x (rows, in) and weight (experts, out, in) of one dtype; got "
            f"{tuple(x_RI.shape)} of {x_RI.dtype} and {tuple(weight_EOI.shape)} of {weight_EOI.dtype}"
        )
    if block_rows % 16 or block_rows < 16 or x_RI.shape[0] != block_rows * expert_B.numel():
        raise ValueError(
            f"contiguous_grouped_linear() takes one expert a block of block_rows rows, a multiple of 16; "
            f"got {x_RI.shape[0]} rows, {expert_B.numel()} experts and block_rows={block_rows}"
        )
    if expert_B.dim() != 1 or expert_B.dtype != torch.int32:
        raise ValueError(f"contiguous_grouped_linear() takes experts as 1-d int32; got {expert_B.dtype}")
    return torch.ops.titan_kernels.contiguous_linear(x_RI, weight_EOI, expert_B, block_rows)


def reference_contiguous_grouped_linear(
    x_RI: Tensor, weight_EOI: Tensor, expert_B: Tensor, block_rows: int = 128
) -> Tensor:
    """`contiguous_grouped_linear` in plain torch: a product a run of blocks."""
    out = weight_EOI.shape[1]
    parts = [
        x_RI[rows] @ weight_EOI[expert].T if expert >= 0 else x_RI.new_zeros(rows.stop - rows.start, out)
        for expert, rows in runs(expert_B, weight_EOI.shape[0], block_rows)
    ]
    return torch.cat(parts) if parts else x_RI.new_zeros(0, out)


def reference_weight_gradient(
    grad_RO: Tensor, x_RI: Tensor, expert_B: Tensor, num_experts: int, block_rows: int
) -> Tensor:
    """Return the gradient to the weight, in plain torch."""
    gradient = x_RI.new_zeros(num_experts, grad_RO.shape[1], x_RI.shape[1])
    for expert, rows in runs(expert_B, num_experts, block_rows):
        if expert >= 0:
            gradient[expert].addmm_(grad_RO[rows].T, x_RI[rows])
    return gradient


def runs(expert_B: Tensor, num_experts: int, block_rows: int) -> Iterator[tuple[int, slice]]:
    """Yield (expert, its rows) for each run of neighbouring blocks of one expert; -1 for nobody's."""
    experts, lengths = torch.unique_consecutive(expert_B, return_counts=True)
    start = 0
    for expert, length in zip(experts.tolist(), lengths.tolist(), strict=True):
        rows = slice(start, start + length * block_rows)
        yield expert if 0 <= expert < num_experts else -1, rows
        start = rows.stop


@torch.library.custom_op("titan_kernels::contiguous_linear", mutates_args=())
def _linear(x_RI: Tensor, weight_EOI: Tensor, expert_B: Tensor, block_rows: int) -> Tensor:
    if runs_triton(x_RI):
        from titan_kernels import grouped_gemm_kernels

        return grouped_gemm_kernels.forward_blocks(x_RI.contiguous(), weight_EOI.contiguous(), expert_B, block_rows)
    return reference_contiguous_grouped_linear(x_RI, weight_EOI, expert_B, block_rows)


@_linear.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, expert_B: Tensor, block_rows: int) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])


@torch.library.custom_op("titan_kernels::contiguous_input_gradient", mutates_args=())
def _input_gradient(grad_RO: Tensor, weight_EOI: Tensor, expert_B: Tensor, block_rows: int) -> Tensor:
    if runs_triton(grad_RO):
        from titan_kernels import grouped_gemm_kernels

        return grouped_gemm_kernels.input_gradient_blocks(
            grad_RO.contiguous(), weight_EOI.contiguous(), expert_B, block_rows
        )
    return reference_contiguous_grouped_linear(grad_RO, weight_EOI.transpose(1, 2), expert_B, block_rows)


@_input_gradient.register_fake
def _(grad_RO: Tensor, weight_EOI: Tensor, expert_B: Tensor, block_rows: int) -> Tensor:
    return grad_RO.new_empty(grad_RO.shape[0], weight_EOI.shape[2])


@torch.library.custom_op("titan_kernels::contiguous_weight_gradient", mutates_args=())
def _weight_gradient(grad_RO: Tensor, x_RI: Tensor, expert_B: Tensor, num_experts: int, block_rows: int) -> Tensor:
    if runs_triton(grad_RO):
        from titan_kernels import grouped_gemm_kernels

        return grouped_gemm_kernels.weight_gradient_blocks(
            grad_RO.contiguous(), x_RI.contiguous(), expert_B, num_experts, block_rows
        )
    return reference_weight_gradient(grad_RO, x_RI, expert_B, num_experts, block_rows)


@_weight_gradient.register_fake
def _(grad_RO: Tensor, x_RI: Tensor, expert_B: Tensor, num_experts: int, block_rows: int) -> Tensor:
    return x_RI.new_empty(num_experts, grad_RO.shape[1], x_RI.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.block_rows = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x_RI, weight_EOI, expert_B = ctx.saved_tensors
    ops, block_rows, (to_x, to_weight, *_) = torch.ops.titan_kernels, ctx.block_rows, ctx.needs_input_grad
    grad_x = ops.contiguous_input_gradient(grad_RO, weight_EOI, expert_B, block_rows) if to_x else None
    if not to_weight:
        return grad_x, None, None, None
    num_experts = weight_EOI.shape[0]
    return grad_x, ops.contiguous_weight_gradient(grad_RO, x_RI, expert_B, num_experts, block_rows), None, None


_linear.register_autograd(_backward, setup_context=_save)
