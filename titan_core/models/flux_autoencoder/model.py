"""Flux's autoencoder: images to latents an eighth as wide and high, and back (Rombach et al. 2022).

Shape letters: B batch, R image channels, H and W height and width, Z latent channels, h and w those of the latents,
C channels, T positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_core.models.flux_autoencoder.flavors import AutoencoderSizes

_MOST_LOG_VARIANCE, _LEAST_LOG_VARIANCE = 20.0, -30.0


class Autoencoder(nn.Module):
    """Pixels in [-1, 1] to latents of about unit deviation, and back."""

    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes)
        self.decoder = Decoder(sizes)

    @property
    def factor(self) -> int:
        """How many pixels a side of a latent covers."""
        return self.sizes.factor

    def moments(self, pixels_BRHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the latents, (B, Z, h, w) each, before they are scaled."""
        mean, log_variance = self.encoder(pixels_BRHW).chunk(2, 1)
        return mean, (0.5 * log_variance.clamp(_LEAST_LOG_VARIANCE, _MOST_LOG_VARIANCE)).exp()

    def scaled(self, latents_BZhw: Tensor) -> Tensor:
        """Return latents of about unit deviation."""
        return (latents_BZhw - self.sizes.shift) * self.sizes.scale

    def decode(self, latents_BZhw: Tensor) -> Tensor:
        """Return the pixels of scaled latents, (B, R, H, W), about in [-1, 1]."""
        return self.decoder(latents_BZhw / self.sizes.scale + self.sizes.shift)

    def forward(self, pixels_BRHW: Tensor) -> Tensor:
        """Encode and decode, by the means of the latents."""
        return self.decode(self.scaled(self.moments(pixels_BRHW)[0]))


class Encoder(nn.Module):
    """(B, R, H, W) to (B, 2 Z, h, w): means and logarithms of variances."""

    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        widths = sizes.channels
        self.conv_in = nn.Conv2d(sizes.in_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                sizes, widths[max(level - 1, 0)], width, sizes.blocks_per_level,
                None if level + 1 == len(widths) else Halve(width, width, 3, stride=2),
            )
            for level, width in enumerate(widths)
        )  # fmt: skip
        self.middle = Middle(sizes)
        self.norm_out = nn.GroupNorm(sizes.groups, widths[-1], sizes.norm_eps)
        self.conv_out = nn.Conv2d(widths[-1], 2 * sizes.latent_channels, 3, padding=1)

    def forward(self, x_BRHW: Tensor) -> Tensor:
        """Encode."""
        x = self.conv_in(x_BRHW)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """(B, Z, h, w) to (B, R, H, W)."""

    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        widths = sizes.channels[::-1]
        self.conv_in = nn.Conv2d(sizes.latent_channels, widths[0], 3, padding=1)
        self.middle = Middle(sizes)
        self.levels = nn.ModuleList(
            Level(
                sizes, widths[max(level - 1, 0)], width, sizes.blocks_per_level + 1,
                None if level + 1 == len(widths) else Double(width, width, 3, padding=1),
            )
            for level, width in enumerate(widths)
        )  # fmt: skip
        self.norm_out = nn.GroupNorm(sizes.groups, widths[-1], sizes.norm_eps)
        self.conv_out = nn.Conv2d(widths[-1], sizes.in_channels, 3, padding=1)

    def forward(self, z_BZhw: Tensor) -> Tensor:
        """Decode."""
        x = self.middle(self.conv_in(z_BZhw))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """Residual blocks at one resolution, then on to the next one."""

    def __init__(self, sizes: AutoencoderSizes, into: int, out: int, count: int, resample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(sizes, into if number == 0 else out, out) for number in range(count))
        self.resample = resample

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map to the next level."""
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return x_BCHW if self.resample is None else self.resample(x_BCHW)


class Halve(nn.Conv2d):
    """Half the height and width; what is missing at the right and bottom edge is zero."""

    def forward(self, x_BCHW: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Convolve with stride 2."""
        return super().forward(F.pad(x_BCHW, (0, 1, 0, 1)))


class Double(nn.Conv2d):
    """Twice the height and width."""

    def forward(self, x_BCHW: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Repeat and convolve."""
        return super().forward(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, sizes: AutoencoderSizes) -> None:
        super().__init__()
        width = sizes.channels[-1]
        self.first = Residual(sizes, width, width)
        self.attention = SpatialAttention(sizes, width)
        self.second = Residual(sizes, width, width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        return self.second(self.attention(self.first(x_BCHW)))


class Residual(nn.Module):
    """Two convolutions, each behind a group norm and SiLU, added to the input."""

    def __init__(self, sizes: AutoencoderSizes, into: int, out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(sizes.groups, into, sizes.norm_eps)
        self.conv1 = nn.Conv2d(into, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(sizes.groups, out, sizes.norm_eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = None if into == out else nn.Conv2d(into, out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, into, H, W) to (B, out, H, W)."""
        inner = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x_BCHW))))))
        return inner + (x_BCHW if self.shortcut is None else self.shortcut(x_BCHW))


class SpatialAttention(nn.Module):
    """One head; every position sees every other."""

    def __init__(self, sizes: AutoencoderSizes, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(sizes.groups, width, sizes.norm_eps)
        self.wq = nn.Conv2d(width, width, 1)
        self.wk = nn.Conv2d(width, width, 1)
        self.wv = nn.Conv2d(width, width, 1)
        self.wo = nn.Conv2d(width, width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Add attention to (B, C, h, w)."""
        normed = self.norm(x_BCHW)
        q_B1TC, k_B1TC, v_B1TC = (w(normed).flatten(2).mT.unsqueeze(1) for w in (self.wq, self.wk, self.wv))
        out_BTC = F.scaled_dot_product_attention(q_B1TC, k_B1TC, v_B1TC).squeeze(1)
        return x_BCHW + self.wo(out_BTC.mT.reshape(x_BCHW.shape))


def draw(mean_BZhw: Tensor, deviation_BZhw: Tensor, noise_BZhw: Tensor) -> Tensor:
    """Return latents drawn from their distribution."""
    return torch.addcmul(mean_BZhw, deviation_BZhw, noise_BZhw)
