"""Rotary position tables, with Llama 3's frequency scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titan_core.declare.rope import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Return the angular frequencies (head_dim / 2), fp32; formed in fp64, so that devices agree."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    freqs = 1.0 / theta**exponents
    return (freqs if scaling is None else _stretch(freqs, scaling)).float()


def _stretch(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    wavelengths = 2 * math.pi / freqs
    low = scaling.original_max_seq_len / scaling.low_freq_factor
    high = scaling.original_max_seq_len / scaling.high_freq_factor
    if low == high:
        return torch.where(wavelengths > low, freqs / scaling.factor, freqs)
    blend = (scaling.original_max_seq_len / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * freqs / scaling.factor + blend * freqs
    freqs = torch.where(wavelengths > low, freqs / scaling.factor, freqs)
    return torch.where((wavelengths <= low) & (wavelengths >= high), blended, freqs)


def table(positions_T: Tensor, freqs_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (T, head_dim / 2) in fp32 for integer positions (T) or (B, T)."""
    angles = positions_T.unsqueeze(-1).float() * freqs_C
    return angles.cos(), angles.sin()
