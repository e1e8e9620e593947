"""Root-mean-square norm over the last dimension, with a scale (Zhang & Sennrich 2019, arXiv 1910.07467).

Shapes: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titan_kernels.launch import runs_triton

WIDEST = 32768  # numbers of a row: a program holds one whole. Above 16,384 registers spill, in the backward above 8,192


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension; fp32 arithmetic, in the dtype of `x`.

    Keeps `x` and one fp32 number a row for the backward.
    """
    if weight_D.dim() != 1 or x.shape[-1:] != weight_D.shape:
        raise ValueError(
            f"rms_norm() needs one weight a column; got x {tuple(x.shape)}, weight {tuple(weight_D.shape)}"
        )
    if not 1 <= weight_D.shape[0] <= WIDEST:
        raise ValueError(f"rms_norm() takes rows of 1 to {WIDEST} numbers; got {weight_D.shape[0]}")
    return torch.ops.titan_kernels.rms_norm(x.reshape(-1, x.shape[-1]), weight_D, eps)[0].view(x.shape)


def reference_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch."""
    wide = _wide(x)
    inverse = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    return (x.to(wide) * inverse * weight_D.to(wide)).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("titan_kernels::rms_norm", mutates_args=())
def _forward(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if runs_triton(x_ND):
        from titan_kernels import rms_norm_kernels

        return rms_norm_kernels.forward(x_ND.contiguous(), weight_D.contiguous(), eps)
    wide = _wide(x_ND)
    inverse_N = torch.rsqrt(x_ND.to(wide).square().mean(-1) + eps)
    return (x_ND.to(wide) * inverse_N[:, None] * weight_D.to(wide)).to(x_ND.dtype), inverse_N


@_forward.register_fake
def _(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(x_ND.shape[0], dtype=_wide(x_ND))


@torch.library.custom_op("titan_kernels::rms_norm_backward", mutates_args=())
def _gradients(grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, inverse_N: Tensor) -> tuple[Tensor, Tensor]:
    if runs_triton(x_ND):
        from titan_kernels import rms_norm_kernels

        return rms_norm_kernels.backward(grad_ND.contiguous(), x_ND.contiguous(), weight_D.contiguous(), inverse_N)
    wide = _wide(x_ND)
    normed = x_ND.to(wide) * inverse_N[:, None]
    product = grad_ND.to(wide) * normed
    mean = (product * weight_D.to(wide)).mean(-1, keepdim=True)
    grad_x = (grad_ND.to(wide) * weight_D.to(wide) - normed * mean) * inverse_N[:, None]
    return grad_x.to(x_ND.dtype), product.sum(0).to(weight_D.dtype)


@_gradients.register_fake
def _(grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, inverse_N: Tensor) -> tuple[Tensor, Tensor]:
    return x_ND.new_empty(x_ND.shape), weight_D.new_empty(weight_D.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_ND: Tensor | None, _inverse: None) -> tuple[Tensor | None, Tensor | None, None]:
    if grad_ND is None:
        return None, None, None
    return *torch.ops.titan_kernels.rms_norm_backward(grad_ND, *ctx.saved_tensors), None


_forward.register_autograd(_backward, setup_context=_save)
