"""The one switch between fast forms and plain torch: what a layer computes, by the best correct way at hand.

Every function here has a plain PyTorch form that runs anywhere and that the fast forms are tested against. The plain
form is what the compiler sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_core.nn import eager


def linear(x: Tensor, weight: Tensor, compute_dtype: torch.dtype | None, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` in `compute_dtype`, or in the dtype of the weight."""
    if compute_dtype is None or compute_dtype == weight.dtype:
        return F.linear(x if compute_dtype is None else x.to(compute_dtype), weight, _cast(bias, weight.dtype))
    if _compiling():
        return F.linear(x.to(compute_dtype), weight.to(compute_dtype), _cast(bias, compute_dtype))
    return eager.CastLinear.apply(x.to(compute_dtype), weight, bias)


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / rms(x) * weight`; fp32 arithmetic, result in the dtype of `x`."""
    if _compiling():
        return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)
    return eager.RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`."""
    return F.silu(gate) * up if _compiling() else eager.SwiGLU.apply(gate, up)


def rotate_pairs(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate neighbouring pairs of the last dimension by fp32 angles (RoPE, Su et al. 2021).

    `x_BTHC` is (B, T, heads, head width), the tables are (T, head width / 2) or (B, T, head width / 2).
    """
    if not _compiling():
        return eager.RotatePairs.apply(x_BTHC, torch.complex(cos_TC, sin_TC))
    x = x_BTHC.float().unflatten(-1, (-1, 2))
    a, b = x[..., 0], x[..., 1]
    cos, sin = cos_TC.unsqueeze(-2), sin_TC.unsqueeze(-2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x_BTHC.dtype)


def modulated_norm(x_BTD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor, eps: float) -> Tensor:
    """Return `norm(x) * (1 + scale) + shift`, with a layer norm that has no weights of its own (Peebles & Xie 2023)."""
    normed = F.layer_norm(x_BTD, (x_BTD.shape[-1],), eps=eps)
    return torch.addcmul(shift_B1D, normed, 1 + scale_B1D)


def gated_add(x_BTD: Tensor, gate_B1D: Tensor, more_BTD: Tensor) -> Tensor:
    """Return `x + gate * more`."""
    return torch.addcmul(x_BTD, gate_B1D, more_BTD)


def _compiling() -> bool:
    return torch.compiler.is_compiling()
