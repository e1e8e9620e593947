"""Sizes of rotary position embeddings that several families share."""

from __future__ import annotations

from dataclasses import dataclass

from titan_core.config.schema import Positive, PositiveFloat


@dataclass(frozen=True)
class RopeScaling:
    """Stretch of the low frequencies beyond the original context (Llama 3.1): wavelengths shorter than
    `original_max_seq_len / high_freq_factor` stay, longer than `original_max_seq_len / low_freq_factor` are stretched
    by `factor`, between them it is blended."""

    factor: PositiveFloat = 8.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_seq_len: Positive = 8192

    def __post_init__(self) -> None:
        if self.high_freq_factor < self.low_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise ValueError(f"high_freq_factor {high} of rope_scaling is below low_freq_factor {low}")
