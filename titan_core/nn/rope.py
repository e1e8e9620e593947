"""Rotary position tables, with the frequency scaling of Llama 3 and YaRN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from titan_core.declare.rope import RopeScaling, Yarn


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | Yarn | None, device: torch.device) -> Tensor:
    """Return the angular frequencies (head_dim / 2), fp32; formed in fp64, so that devices agree."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    freqs = 1.0 / theta**exponents
    if isinstance(scaling, Yarn):
        freqs = _stretch_by_parts(freqs, theta, scaling)
    elif scaling is not None:
        freqs = _stretch(freqs, scaling)
    return freqs.float()


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


def _stretch_by_parts(freqs: Tensor, theta: float, scaling: Yarn) -> Tensor:
    pairs = freqs.shape[0]

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(scaling.original_max_seq_len / (2 * math.pi * times)) / math.log(theta)

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), 2 * pairs - 1)
    width = last - first or 0.001  # transformers' step where both are one
    ramp = ((torch.arange(pairs, dtype=torch.float64, device=freqs.device) - first) / width).clamp(0, 1)
    return freqs / scaling.factor * ramp + freqs * (1 - ramp)


def table(positions_T: Tensor, freqs_C: Tensor, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (T, head_dim / 2) in fp32, times `amplitude`, for integer positions (T) or (B, T)."""
    angles = positions_T.unsqueeze(-1).float() * freqs_C
    if amplitude == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * amplitude, angles.sin() * amplitude
