"""Triton kernel of `rotary.py`: 2 * B*T*H*C numbers move, and the tables once a token.

The input may be a view with any strides but for the last dimension, as the parts of a fused qkv product are.
"""
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # numbers a program, 32 a thread. Untuned: never measured on a GPU


def rotate(x_BTHC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor, back: bool) -> Tensor:
    """Launch the rotation of some heads of one token a program; the result is contiguous."""
    batch, tokens, heads, width = x_BTHC.shape
    out = x_BTHC.new_empty(x_BTHC.shape)
    if out.numel():
        columns = triton.next_power_of_2(width)
        rows = min(triton.next_power_of_2(heads), max(1, TILE // columns))
        _rotate[(batch * tokens, triton.cdiv(heads, rows))](
            x_BTHC, cos_BTC, sin_BTC, out, tokens, heads, width, *x_BTHC.stride()[:3],
            0 if cos_BTC.shape[0] == 1 else tokens * (width // 2),
            BACK=back, HEADS=rows, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens"])
def _rotate(
    x_ptr, cos_ptr, sin_ptr, out_ptr, tokens, heads, width, stride_b, stride_t, stride_h, table_stride_b,
    BACK: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, t = token // tokens, token % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    mask = (head < heads)[:, None] & (column < width)[None, :]
    x_at = b * stride_b + t * stride_t + head[:, None].to(tl.int64) * stride_h + column[None, :]
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    pair = tl.arange(0, COLUMNS // 2)
    at = b * table_stride_b + t * (width // 2) + pair
    cos = tl.load(cos_ptr + at, mask=pair < width // 2, other=0.0)[None, :]
    sin = tl.load(sin_ptr + at, mask=pair < width // 2, other=0.0)[None, :]
    if BACK:
        sin = -sin
    first, second = tl.split(tl.reshape(x, (HEADS, COLUMNS // 2, 2)))
    turned = tl.join(first * cos - second * sin, first * sin + second * cos)
    out = tl.reshape(turned, (HEADS, COLUMNS)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (token * heads + head[:, None]) * width + column[None, :], out, mask=mask)
