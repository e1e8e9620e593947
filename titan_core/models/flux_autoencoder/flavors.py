"""Flux's autoencoder: sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from titan_core.config.schema import Positive, PositiveFloat

Channels = Annotated[tuple[Positive, ...], Meta(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class AutoencoderSizes:
    """Everything that determines the shape and the arithmetic of the autoencoder.

    `channels` are those of each level, from the image inwards; each level but the first is half as large. Latents z
    are stored as `(z - shift) * scale`, which has about unit deviation.
    """

    in_channels: Positive = 3
    channels: Channels = (128, 256, 512, 512)
    blocks_per_level: Positive = 2
    latent_channels: Positive = 16
    groups: Positive = 32
    norm_eps: PositiveFloat = 1e-6
    scale: PositiveFloat = 0.3611
    shift: float = 0.1159

    def __post_init__(self) -> None:
        for width in self.channels:
            if width % self.groups:
                raise ValueError(f"{width} channels do not divide into {self.groups} groups")

    @property
    def factor(self) -> int:
        """How many pixels a side of a latent covers."""
        return 2 ** (len(self.channels) - 1)


FLAVORS = {"flux": AutoencoderSizes(), "tiny": AutoencoderSizes(channels=(16, 32), blocks_per_level=1, groups=8)}
