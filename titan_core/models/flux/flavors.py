"""Flux: sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from msgspec import Meta

from titan_core.config.schema import NonNegative, Positive, PositiveFloat

Axes = Annotated[tuple[Positive, ...], Meta(min_length=3, max_length=3)]


@dataclass(frozen=True, kw_only=True)
class FluxSizes:
    """Everything that determines the shape and the arithmetic of a Flux.

    Images come as rows of `in_channels` numbers: 2 x 2 latents of `in_channels / 4` channels. Texts come as rows of
    `context_dim` numbers and one vector of `vector_dim`. `axes_dim` are the widths of a head that are rotated by a
    row's three coordinates. `guidance` says that the model takes the strength of its guidance as an input (distilled).
    """

    in_channels: Positive = 64
    vector_dim: Positive = 768
    context_dim: Positive = 4096
    dim: Positive = 3072
    n_heads: Positive = 24
    mlp_ratio: PositiveFloat = 4.0
    n_double: NonNegative = 19
    n_single: NonNegative = 38
    axes_dim: Axes = (16, 56, 56)
    rope_theta: PositiveFloat = 10000.0
    norm_eps: PositiveFloat = 1e-6
    guidance: bool = False
    zero_init: bool = True
    """Blocks start as the identity and the output as zero (Peebles & Xie 2023); false: all starts at random."""

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide dim {self.dim}")
        if sum(self.axes_dim) != self.head_dim or any(width % 2 for width in self.axes_dim):
            raise ValueError(
                f"axes_dim {list(self.axes_dim)} are not even numbers with the sum {self.head_dim}, a head"
            )
        if self.in_channels % 4:
            raise ValueError(f"in_channels {self.in_channels} is not a multiple of 4: an image row is 2 x 2 latents")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.n_heads

    @property
    def mlp_dim(self) -> int:
        """Width inside of an MLP."""
        return int(self.dim * self.mlp_ratio)


def axes_of(head_dim: int) -> tuple[int, int, int]:
    """Return the usual share of a head that each coordinate rotates: about an eighth, and halves of the rest."""
    first = head_dim // 8 // 2 * 2 or 2
    first += (head_dim - first) // 2 % 2 * 2
    return first, (head_dim - first) // 2, (head_dim - first) // 2


_DEV = FluxSizes(guidance=True)

FLAVORS = {
    "flux-dev": _DEV,
    "flux-schnell": replace(_DEV, guidance=False),
    "flux-debug": replace(_DEV, guidance=False, dim=1536, n_heads=12, n_double=2, n_single=2),
    "debugmodel": FluxSizes(
        in_channels=192, vector_dim=128, context_dim=128, dim=256, n_heads=4, n_double=2, n_single=3,
        axes_dim=axes_of(64),
    ),
}  # fmt: skip
