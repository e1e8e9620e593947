"""Forward and backward of small operations as one autograd function each, for eager mode.

Autograd's own graphs of these operations keep fp32 copies of their inputs and pass over memory once an operation. Here
each keeps just what its backward needs, in the dtype that it came in. The compiler does better still, so `ops` uses the
plain forms while compiling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class CastLinear(torch.autograd.Function):
    """`x @ w.T` computed in the dtype of x, with a weight of another dtype that is cast again in the backward.

    Keeping the cast weights instead would cost half the memory of the weights.
    """

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_ND, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x_ND, weight.to(x_ND.dtype), None if bias is None else bias.to(x_ND.dtype))

    @staticmethod
    def backward(ctx, grad_NF: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad_x = grad_NF @ weight.to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_NF.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_NF.flatten(0, -2).sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias


class RMSNorm(torch.autograd.Function):
    """`x / rms(x) * w` with fp32 arithmetic; keeps x and one number a row."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x_ND.float()
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x_ND, weight_D, inverse)
        return (x * inverse).mul_(weight_D).to(x_ND.dtype)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_ND, weight, inverse = ctx.saved_tensors
        normed = x_ND * inverse  # fp32: the row's number is
        product = grad_ND * normed
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        mean = product.mul_(weight).mean(-1, keepdim=True)
        grad_x = (grad_ND * weight.float()).sub_(normed.mul_(mean)).mul_(inverse)
        return grad_x.to(x_ND.dtype), grad_weight, None


class SwiGLU(torch.autograd.Function):
    """`silu(gate) * up`; keeps gate and up, not silu(gate)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


class RotatePairs(torch.autograd.Function):
    """Rotation of neighbouring pairs as a complex product; the backward rotates back, and nothing of x is kept."""

    @staticmethod
    def forward(ctx, x_BTHC: Tensor, turn_TC: Tensor) -> Tensor:
        ctx.save_for_backward(turn_TC)
        return _turn(x_BTHC, turn_TC)

    @staticmethod
    def backward(ctx, grad_BTHC: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (turn,) = ctx.saved_tensors
        return _turn(grad_BTHC, turn.conj()), None


def _turn(x_BTHC: Tensor, turn_TC: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_BTHC.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn_TC.unsqueeze(-2)).flatten(-2).to(x_BTHC.dtype)
