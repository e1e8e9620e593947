"""`silu(gate) * up` (Shazeer 2020), forward and backward in one pass each.

Shapes: N rows, F width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_kernels.launch import runs_triton


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`; fp32 arithmetic rounded once, in the dtype of the inputs. Keeps gate and up.

    The two may be halves of one tensor: only their last dimension must be contiguous.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu() needs two tensors alike; got {gate.dtype} {tuple(gate.shape)} and {up.dtype} {tuple(up.shape)}"
        )
    return torch.ops.titan_kernels.swiglu(gate, up)


def reference_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain torch."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


@torch.library.custom_op("titan_kernels::swiglu", mutates_args=())
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    if runs_triton(gate):
        from titan_kernels import swiglu_kernels

        return swiglu_kernels.forward(gate, up)
    return reference_swiglu(gate, up)


@_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("titan_kernels::swiglu_backward", mutates_args=())
def _gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if runs_triton(gate):
        from titan_kernels import swiglu_kernels

        return swiglu_kernels.backward(grad, gate, up)
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    g, x, y = (tensor.to(wide) for tensor in (grad, gate, up))
    sigmoid = torch.sigmoid(x)
    grad_gate = g * y * sigmoid * (1 + x * (1 - sigmoid))
    return grad_gate.to(gate.dtype), (g * x * sigmoid).to(up.dtype)


@_gradients.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.titan_kernels.swiglu_backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_backward, setup_context=_save)
