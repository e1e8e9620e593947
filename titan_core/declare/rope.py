"""Sizes of rotary position embeddings that several families share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from titan_core.config.schema import NonNegativeFloat, Positive, PositiveFloat


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


@dataclass(frozen=True)
class Yarn:
    """Stretch of the low frequencies by parts (YaRN, Peng et al. 2023): those that turn more than `beta_fast` times
    within `original_max_seq_len` stay, those that turn less than `beta_slow` times are stretched by `factor`, between
    them it is blended.

    Attention gets sharper with the stretch, by `0.1 mscale_all_dim ln(factor) + 1` in queries and in keys (DeepSeek-V2,
    section 3.1.4). `mscale` says by how much for what rotates; with one of the two 0, that is as with `mscale` 1.
    """

    factor: PositiveFloat = 40.0
    original_max_seq_len: Positive = 4096
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: NonNegativeFloat = 1.0
    mscale_all_dim: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast} of rope_scaling is below beta_slow {self.beta_slow}")

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied with."""
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    @property
    def sharpness(self) -> float:
        """What attention scores are multiplied with."""
        return self._growth(self.mscale_all_dim) ** 2

    def _growth(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0
