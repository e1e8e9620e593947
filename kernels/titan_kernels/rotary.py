"""Rotary position embedding: neighbouring pairs of a head turn by an angle of their position (Su et al. 2021).

Shapes: B batch, T tokens, H heads, C head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titan_kernels.launch import runs_triton


def rotate_pairs(x_BTHC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor) -> Tensor:
    """Return x with each pair (a, b) as (a cos - b sin, a sin + b cos); fp32 arithmetic, in the dtype of x, contiguous.

    The tables are fp32, (T, C / 2), or (B, T, C / 2) for positions that differ between the rows of a batch. The
    backward turns back, and keeps nothing of x.
    """
    batch, tokens, _, width = x_BTHC.shape
    cos, sin = (x if x.dim() == 3 else x[None] for x in (cos_BTC, sin_BTC))
    if cos.shape != sin.shape or cos.shape[0] not in (1, batch) or cos.shape[1:] != (tokens, width // 2) or width % 2:
        raise ValueError(
            f"rotate_pairs() needs tables of shape {(tokens, width // 2)} or {(batch, tokens, width // 2)} for x of "
            f"shape {tuple(x_BTHC.shape)}; got {tuple(cos_BTC.shape)} and {tuple(sin_BTC.shape)}"
        )
    return torch.ops.titan_kernels.rotate_pairs(x_BTHC, cos, sin, False)


def reference_rotate_pairs(x_BTHC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor, back: bool = False) -> Tensor:
    """`rotate_pairs` in plain torch; `back` turns by the opposite angle."""
    wide = torch.float64 if x_BTHC.dtype == torch.float64 else torch.float32
    pairs = x_BTHC.to(wide).unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_BTC.unsqueeze(-2), (-sin_BTC if back else sin_BTC).unsqueeze(-2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x_BTHC.dtype)


@torch.library.custom_op("titan_kernels::rotate_pairs", mutates_args=())
def _rotate(x_BTHC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor, back: bool) -> Tensor:
    if runs_triton(x_BTHC):
        from titan_kernels import rotary_kernels

        x = x_BTHC if x_BTHC.stride(-1) == 1 else x_BTHC.contiguous()
        return rotary_kernels.rotate(x, cos_BTC.contiguous(), sin_BTC.contiguous(), back)
    return reference_rotate_pairs(x_BTHC, cos_BTC, sin_BTC, back)


@_rotate.register_fake
def _(x_BTHC: Tensor, cos_BTC: Tensor, sin_BTC: Tensor, back: bool) -> Tensor:
    return x_BTHC.new_empty(x_BTHC.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.back = inputs[3]


def _backward(ctx: Any, grad_BTHC: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.titan_kernels.rotate_pairs(grad_BTHC, *ctx.saved_tensors, not ctx.back), None, None, None


_rotate.register_autograd(_backward, setup_context=_save)
