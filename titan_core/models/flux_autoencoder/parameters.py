"""Flux's autoencoder: every parameter."""

from __future__ import annotations

from collections.abc import Iterator

from titan_core.declare.parameters import Attention, Constant, Normal, Parameter
from titan_core.models.flux_autoencoder.flavors import AutoencoderSizes


def parameters(sizes: AutoencoderSizes) -> tuple[Parameter, ...]:
    """List the parameters in the order of the module."""
    widths, last = sizes.channels, sizes.channels[-1]
    listed = [*_conv("encoder.conv_in", widths[0], sizes.in_channels)]
    for level, width in enumerate(widths):
        into = widths[max(level - 1, 0)]
        listed += _blocks(f"encoder.levels.{level}", into, width, sizes.blocks_per_level)
        if level + 1 < len(widths):
            listed += _conv(f"encoder.levels.{level}.resample", width, width)
    listed += _middle("encoder.middle", last)
    listed += [*_norm("encoder.norm_out", last), *_conv("encoder.conv_out", 2 * sizes.latent_channels, last)]
    listed += _conv("decoder.conv_in", last, sizes.latent_channels)
    listed += _middle("decoder.middle", last)
    for level, width in enumerate(widths[::-1]):
        into = widths[::-1][max(level - 1, 0)]
        listed += _blocks(f"decoder.levels.{level}", into, width, sizes.blocks_per_level + 1)
        if level + 1 < len(widths):
            listed += _conv(f"decoder.levels.{level}.resample", width, width)
    listed += [*_norm("decoder.norm_out", widths[0]), *_conv("decoder.conv_out", sizes.in_channels, widths[0])]
    return tuple(listed)


def attentions(sizes: AutoencoderSizes) -> tuple[Attention, ...]:
    """List the attention layers: one in each half, over the smallest level."""
    width = sizes.channels[-1]
    return (Attention(1, 1, width, width, causal=False),) * 2


def _blocks(prefix: str, into: int, out: int, count: int) -> Iterator[Parameter]:
    for number in range(count):
        yield from _block(f"{prefix}.blocks.{number}", into if number == 0 else out, out)


def _block(prefix: str, into: int, out: int) -> Iterator[Parameter]:
    yield from _norm(f"{prefix}.norm1", into)
    yield from _conv(f"{prefix}.conv1", out, into)
    yield from _norm(f"{prefix}.norm2", out)
    yield from _conv(f"{prefix}.conv2", out, out)
    if into != out:
        yield from _conv(f"{prefix}.shortcut", out, into, side=1)


def _middle(prefix: str, width: int) -> Iterator[Parameter]:
    yield from _block(f"{prefix}.first", width, width)
    yield from _norm(f"{prefix}.attention.norm", width)
    for name in ("wq", "wk", "wv", "wo"):
        yield from _conv(f"{prefix}.attention.{name}", width, width, side=1)
    yield from _block(f"{prefix}.second", width, width)


def _conv(name: str, out: int, into: int, side: int = 3) -> Iterator[Parameter]:
    shape = (out, into, side, side)
    yield Parameter(f"{name}.weight", shape, "hidden", Normal((into * side * side) ** -0.5))
    yield Parameter(f"{name}.bias", (out,), "bias", Constant(0.0))


def _norm(name: str, width: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (width,), "norm", Constant(1.0))
    yield Parameter(f"{name}.bias", (width,), "bias", Constant(0.0))
