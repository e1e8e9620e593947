"""One linear layer a group of rows: y = x @ weight[e].T for the rows of expert e (Gale et al. 2022, arXiv 2211.15841).

Shapes: R rows, E experts, O output width, I input width. `ends_E` (int32, on the device) says where each expert's rows
end; those of expert e are ends[e-1] to ends[e]. Rows after the last end belong to nobody: their results and gradients
are zero whatever they hold, NaN included. No size is read from the device, and nothing is compiled anew when only R or
the ends change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from titan_kernels.launch import runs_triton


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Return y_RO; x and weight have one dtype: bfloat16, float16, float32 (on the CPU also float64)."""
    check_groups("grouped_linear", x_RI, weight_EOI, ends_E)
    return torch.ops.titan_kernels.grouped_linear(x_RI, weight_EOI, ends_E)


def reference_grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """`grouped_linear` in plain torch: a product an expert."""
    return joined(
        [x_RI[rows] @ weight_EOI[expert].T for expert, rows in groups(ends_E, x_RI.shape[0])],
        x_RI,
        weight_EOI.shape[1],
    )


def reference_input_gradient(grad_RO: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Return the gradient of `grouped_linear` to x, in plain torch."""
    return joined(
        [grad_RO[rows] @ weight_EOI[expert] for expert, rows in groups(ends_E, grad_RO.shape[0])],
        grad_RO,
        weight_EOI.shape[2],
    )


def reference_weight_gradient(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    """Return the gradient of `grouped_linear` to the weight, in plain torch; zero for an expert without rows."""
    gradient = x_RI.new_zeros(ends_E.shape[0], grad_RO.shape[1], x_RI.shape[1])
    for expert, rows in groups(ends_E, x_RI.shape[0]):
        torch.mm(grad_RO[rows].T, x_RI[rows], out=gradient[expert])
    return gradient


def groups(ends_E: Tensor, num_rows: int) -> Iterator[tuple[int, slice]]:
    """Yield (expert, its rows) for the experts that have rows."""
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        end = min(end, num_rows)
        if end > start:
            yield expert, slice(start, end)
            start = end


def joined(parts: list[Tensor], like_RX: Tensor, width: int) -> Tensor:
    """Concatenate the results of the groups, and zeros for the rows after them."""
    left = like_RX.shape[0] - sum(part.shape[0] for part in parts)
    return torch.cat([*parts, like_RX.new_zeros(left, width)]) if left or len(parts) != 1 else parts[0]


def check_groups(name: str, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> None:
    """Raise ValueError unless rows, weights and ends fit together."""
    if x_RI.dim() != 2 or weight_EOI.dim() != 3 or x_RI.shape[1] != weight_EOI.shape[2]:
        raise ValueError(
            f"{name}() takes x (rows, in) and weight (experts, out, in); "
            f"got {tuple(x_RI.shape)} and {tuple(weight_EOI.shape)}"
        )
    if x_RI.dtype != weight_EOI.dtype:
        raise ValueError(f"{name}() takes x and weight of one dtype; got {x_RI.dtype} and {weight_EOI.dtype}")
    if ends_E.shape != weight_EOI.shape[:1] or ends_E.dtype != torch.int32:
        raise ValueError(
            f"{name}() takes one int32 end an expert, shape ({weight_EOI.shape[0]},); "
            f"got {ends_E.dtype} of shape {tuple(ends_E.shape)}"
        )


@torch.library.custom_op("titan_kernels::grouped_linear", mutates_args=())
def _grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    if runs_triton(x_RI):
        from titan_kernels import grouped_gemm_kernels

        return grouped_gemm_kernels.forward(x_RI.contiguous(), weight_EOI.contiguous(), ends_E)
    return reference_grouped_linear(x_RI, weight_EOI, ends_E)


@_grouped_linear.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])


@torch.library.custom_op("titan_kernels::grouped_input_gradient", mutates_args=())
def _input_gradient(grad_RO: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    if runs_triton(grad_RO):
        from titan_kernels import grouped_gemm_kernels

        return grouped_gemm_kernels.input_gradient(grad_RO.contiguous(), weight_EOI.contiguous(), ends_E)
    return reference_input_gradient(grad_RO, weight_EOI, ends_E)


@_input_gradient.register_fake
def _(grad_RO: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return grad_RO.new_empty(grad_RO.shape[0], weight_EOI.shape[2])


@torch.library.custom_op("titan_kernels::grouped_weight_gradient", mutates_args=())
def _weight_gradient(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    if runs_triton(grad_RO):
        from titan_kernels import grouped_gemm_kernels

        return grouped_gemm_kernels.weight_gradient(grad_RO.contiguous(), x_RI.contiguous(), ends_E)
    return reference_weight_gradient(grad_RO, x_RI, ends_E)


@_weight_gradient.register_fake
def _(grad_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(ends_E.shape[0], grad_RO.shape[1], x_RI.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_RI, weight_EOI, ends_E = ctx.saved_tensors
    ops, (to_x, to_weight, _) = torch.ops.titan_kernels, ctx.needs_input_grad
    grad_x = ops.grouped_input_gradient(grad_RO, weight_EOI, ends_E) if to_x else None
    return grad_x, ops.grouped_weight_gradient(grad_RO, x_RI, ends_E) if to_weight else None, None


_grouped_linear.register_autograd(_backward, setup_context=_save)
