"""Sizes of rotary position embeddings that several families share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Stretch of the low frequencies beyond the original context (Llama 3.1): wavelengths shorter than
    `original_max_seq_len / high_freq_factor` stay, longer than `original_max_seq_len / low_freq_factor` are stretched
    by `factor`, between them it is blended."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
