"""Triton kernels of `linear_cross_entropy.py`: logits to losses and, in place, to their gradient; and its scaling.

A program takes one row and passes over it twice: once for the largest logit and the sum of exponentials, once to write
softmax - onehot. 3 * N*V numbers move at most. With 32 warps a program fills a Hopper multiprocessor, so that the rows
at work (132 of 256 KB in bf16, at a vocabulary of 128,256) stay in 50 MB of L2 until their second pass: 2 * N*V then.
"""
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_kernels.launch import num_programs
from titan_kernels.linear_cross_entropy import IGNORE

SCALED, WAVES = 8192, 4  # numbers a step of the scaling, and programs a multiprocessor
# Untuned: never measured on a GPU. A thread holds STEPS times eight numbers, each two 16-byte loads in fp32, one in
# bf16. Every column of a tile has its own largest number and sum, in its thread: threads meet once a row, not a tile.
STEPS, COLUMNS_OF_WARP, MOST_WARPS = 2, 256, 32
LOG2_E = 1.4426950408889634
SMALLEST = -3.0e38  # not -inf: exp2(-inf + inf) is NaN


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor, scale: Tensor | None, slope: bool) -> Tensor:
    """Launch one program a row; `logits_NV` needs contiguous rows."""
    num_rows, vocabulary = logits_NV.shape
    losses = logits_NV.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        warps = min(MOST_WARPS, max(4, triton.next_power_of_2(vocabulary) // (STEPS * COLUMNS_OF_WARP)))
        _cross_entropy[(num_rows,)](
            logits_NV, labels_N, losses if scale is None else scale, losses, vocabulary, logits_NV.stride(0),
            IGNORE=IGNORE, SLOPE=slope, SCALED=scale is not None, STEPS=STEPS, COLUMNS=COLUMNS_OF_WARP * warps,
            LOG2=LOG2_E, LEAST=SMALLEST, num_warps=warps,
        )  # fmt: skip
    return losses


def scale_(x: Tensor, factor: Tensor) -> None:
    """Launch x *= factor, a scalar on the device; nothing is read or written where it is 1."""
    if x.numel():
        programs = min(triton.cdiv(x.numel(), SCALED), WAVES * num_programs(x))
        _scale[(programs,)](x, factor, x.numel(), BLOCK=SCALED, num_warps=8)


@triton.jit
def _scale(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < size:
            at = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + at, mask=at < size).to(tl.float32) * factor
            tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < size)
            start += tl.num_programs(0).to(tl.int64) * BLOCK


@triton.jit
def _cross_entropy(
    logits_ptr, labels_ptr, scale_ptr, losses_ptr, vocabulary, stride, IGNORE: tl.constexpr, SLOPE: tl.constexpr,
    SCALED: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr, LOG2: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    scale = tl.load(scale_ptr).to(tl.float32) if SCALED else 1.0
    row_ptr = logits_ptr + row * stride
    column = tl.arange(0, STEPS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if label == IGNORE:
        tl.store(losses_ptr + row, 0.0)
        if SLOPE:
            zeros = tl.zeros((STEPS, COLUMNS), logits_ptr.dtype.element_ty)
            for start in range(0, vocabulary, STEPS * COLUMNS):
                tl.store(row_ptr + start + column, zeros, mask=start + column < vocabulary)
    else:
        inside = (label >= 0) & (label < vocabulary)
        own = tl.load(row_ptr + label, mask=inside, other=float("nan")).to(tl.float32)
        largest = tl.full((COLUMNS,), LEAST, tl.float32)
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, vocabulary, STEPS * COLUMNS):
            mask = start + column < vocabulary
            x = tl.load(row_ptr + start + column, mask=mask, other=-float("inf"), eviction_policy="evict_last")
            x = x.to(tl.float32) * LOG2
            before = largest
            largest = tl.maximum(before, tl.max(x, 0))
            total = total * tl.exp2(before - largest) + tl.sum(tl.exp2(x - largest[None, :]), 0)
        highest = tl.max(largest, 0)
        log_total = highest + tl.log2(tl.sum(total * tl.exp2(largest - highest), 0))
        tl.store(losses_ptr + row, (log_total / LOG2 - own) * scale)
        if SLOPE:
            for start in range(0, vocabulary, STEPS * COLUMNS):
                mask = start + column < vocabulary
                x = tl.load(row_ptr + start + column, mask=mask, other=0.0, eviction_policy="evict_first")
                slope = tl.exp2(x.to(tl.float32) * LOG2 - log_total) - tl.where(start + column == label, 1.0, 0.0)
                slope = (slope * scale).to(logits_ptr.dtype.element_ty)
                tl.store(row_ptr + start + column, slope, mask=mask, cache_modifier=".cs")
