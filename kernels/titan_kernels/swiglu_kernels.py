"""Triton kernels of `swiglu.py`: 3 * N*F numbers move in the forward, 5 * N*F in the backward."""
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # numbers a program, 16 a thread: two 16-byte loads in bf16. Untuned: never measured on a GPU


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """Launch silu(gate) * up; the result is contiguous."""
    out = gate.new_empty(gate.shape)
    if out.numel():
        rows, (a, b) = _rows(gate, up)
        grid = (rows[0] * triton.cdiv(rows[1], BLOCK),)
        _forward[grid](a, b, out, *rows, a.stride(0), b.stride(0), BLOCK=BLOCK, num_warps=4)
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the gradients to gate and up."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if grad_gate.numel():
        rows, (g, a, b) = _rows(grad, gate, up)
        grid = (rows[0] * triton.cdiv(rows[1], BLOCK),)
        _backward[grid](
            g, a, b, grad_gate, grad_up, *rows, g.stride(0), a.stride(0), b.stride(0), BLOCK=BLOCK, num_warps=4
        )
    return grad_gate, grad_up


def _rows(*tensors: Tensor) -> tuple[tuple[int, int], list[Tensor]]:
    """Return the tensors as rows, with how many and how wide: one row where all are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        views = [x.view(1, -1) for x in tensors]
    else:
        views = [x.reshape(-1, x.shape[-1]) for x in tensors]
        views = [x if x.stride(-1) == 1 else x.contiguous() for x in views]
    return (views[0].shape[0], views[0].shape[1]), views


@triton.jit
def _at(width, BLOCK: tl.constexpr):
    """Return the row and the columns of this program."""
    blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    return row, (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit(do_not_specialize=["rows"])
def _forward(gate_ptr, up_ptr, out_ptr, rows, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    row, column = _at(width, BLOCK)
    mask = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, rows, width, grad_stride, gate_stride, up_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = _at(width, BLOCK)
    mask = column < width
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_gate_ptr + row * width + column, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)
    grad_up = grad * gate * sigmoid
    tl.store(grad_up_ptr + row * width + column, grad_up.to(grad_up_ptr.dtype.element_ty), mask=mask)
