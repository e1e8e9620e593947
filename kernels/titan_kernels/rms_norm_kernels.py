"""Triton kernels of `rms_norm.py`.

Bytes that must move, with e bytes a number: forward 2 * N*D*e, backward 3 * N*D*e. A program holds whole rows, walks
over the rows with a stride, and keeps its part of the weight's gradient in registers until its last row: one fp32 row
a program is written, and one more launch sums these in a fixed order.
"""
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_kernels.launch import num_programs

# 4096 numbers a tile are 32 a thread of four warps: four 16-byte loads in bf16. Measured on an H200 (torch 2.11, Triton
# 3.6), 16384 rows of 4096 and 8192: the backward with its loads three rows ahead 110 and 204 us, without 129 and 264.
TILE = 4096
FORWARD_WAVES, BACKWARD_WARPS = 8, 16  # programs, and warps of all programs, of a multiprocessor
AHEAD = tl.constexpr(3)
SUMMED = (64, 32)  # parts and columns of a tile of their sum


def forward(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Launch the norm; returns it and 1 / rms of each row, fp32."""
    num_rows, width = x_ND.shape
    out, inverse = torch.empty_like(x_ND), x_ND.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        rows, columns, warps = _tile(width, a_thread=32)
        grid = (min(triton.cdiv(num_rows, rows), FORWARD_WAVES * num_programs(x_ND)),)
        _forward[grid](x_ND, weight_D, out, inverse, num_rows, width, eps, ROWS=rows, COLUMNS=columns, num_warps=warps)
    return out, inverse


def backward(grad_ND: Tensor, x_ND: Tensor, weight_D: Tensor, inverse_N: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the gradients to x and weight."""
    num_rows, width = x_ND.shape
    if not num_rows:
        return torch.empty_like(x_ND), torch.zeros_like(weight_D)
    rows, columns, warps = _tile(width, a_thread=16)  # with 32 it took 167 registers of sm_90
    programs = min(triton.cdiv(num_rows, rows), max(1, BACKWARD_WARPS // warps) * num_programs(x_ND))
    grad_x, parts = torch.empty_like(x_ND), x_ND.new_empty(programs, width, dtype=torch.float32)
    _backward[(programs,)](
        grad_ND, x_ND, weight_D, inverse_N, grad_x, parts, num_rows, width,
        ROWS=rows, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    grad_weight = torch.empty_like(weight_D)
    _sum[(triton.cdiv(width, SUMMED[1]),)](
        parts, grad_weight, programs, width, ROWS=SUMMED[0], COLUMNS=SUMMED[1], num_warps=4
    )
    return grad_x, grad_weight


def _tile(width: int, a_thread: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and its warps, with `a_thread` numbers a thread where 32 warps suffice."""
    columns = triton.next_power_of_2(width)
    rows = max(1, TILE // columns)
    return rows, columns, min(32, max(4, rows * columns // (32 * a_thread)))


@triton.jit(do_not_specialize=["num_rows"])
def _forward(x_ptr, weight_ptr, out_ptr, inverse_ptr, num_rows, width, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for start in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        mask = (row < num_rows)[:, None] & inside[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
        out = x * inverse[:, None] * weight[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(inverse_ptr + row, inverse, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    grad_ptr, x_ptr, weight_ptr, inverse_ptr, grad_x_ptr, parts_ptr, num_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros((COLUMNS,), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=AHEAD):
        row = start + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        mask = (row < num_rows)[:, None] & inside[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        normed = x * inverse
        product = grad * normed
        part += tl.sum(product, 0)
        mean = tl.sum(product * weight[None, :], 1) / width
        grad_x = (grad * weight[None, :] - normed * mean[:, None]) * inverse
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(parts_ptr + tl.program_id(0) * width + column, part, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _sum(parts_ptr, out_ptr, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & (column < width)[None, :]
        total += tl.load(parts_ptr + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < width)
