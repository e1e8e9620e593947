"""Flux's autoencoder in diffusers' folders (`AutoencoderKL`) and in Black Forest Labs' `ae.safetensors`.

Attention is made of 1 x 1 convolutions in the latter, as here, and of matrices in the former. Levels of the decoder are
counted from the smallest here and in diffusers, from the largest in the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from titan_core.declare.hf_config import Config
from titan_core.declare.weights import Link, Rule, SingleFile, Squeeze, Step, Weights
from titan_core.models.flux_autoencoder.flavors import AutoencoderSizes
from titan_core.runtime.errors import UsageError

CLASS = "AutoencoderKL"


@dataclass(frozen=True)
class _Names:
    """How one side calls the parts: levels (by half, number and how many there are), blocks and middle."""

    level: dict[str, str]
    blocks: str
    resample: dict[str, str]
    shortcut: str
    middle: tuple[str, str, str]
    attention: dict[str, str]
    norm_out: str
    reversed_decoder: bool
    steps: tuple[Step, ...]


_DIFFUSERS = _Names(
    level={"encoder": "encoder.down_blocks", "decoder": "decoder.up_blocks"},
    blocks="resnets",
    resample={"encoder": "downsamplers.0.conv", "decoder": "upsamplers.0.conv"},
    shortcut="conv_shortcut",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    attention={"norm": "group_norm", "wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0"},
    norm_out="conv_norm_out",
    reversed_decoder=False,
    steps=(Squeeze(3), Squeeze(2)),
)
_FILE = _Names(
    level={"encoder": "encoder.down", "decoder": "decoder.up"},
    blocks="block",
    resample={"encoder": "downsample.conv", "decoder": "upsample.conv"},
    shortcut="nin_shortcut",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    attention={"norm": "norm", "wq": "q", "wk": "k", "wv": "v", "wo": "proj_out"},
    norm_out="norm_out",
    reversed_decoder=True,
    steps=(),
)


def _rules(sizes: AutoencoderSizes, names: _Names) -> list[Rule]:
    found: list[Rule] = []
    for half, extra in (("encoder", 0), ("decoder", 1)):
        found += [*_both(f"{half}.conv_in", f"{half}.conv_in"), *_both(f"{half}.conv_out", f"{half}.conv_out")]
        found += _both(f"{half}.norm_out", f"{half}.{names.norm_out}")
        found += _middle(half, names)
        widths = sizes.channels if half == "encoder" else sizes.channels[::-1]
        for level, width in enumerate(widths):
            number = len(widths) - 1 - level if names.reversed_decoder and half == "decoder" else level
            ours, theirs = f"{half}.levels.{level}", f"{names.level[half]}.{number}"
            for block in range(sizes.blocks_per_level + extra):
                changes = block == 0 and widths[max(level - 1, 0)] != width
                found += _residual(f"{ours}.blocks.{block}", f"{theirs}.{names.blocks}.{block}", changes, names)
            if level + 1 < len(widths):
                found += _both(f"{ours}.resample", f"{theirs}.{names.resample[half]}")
    return found


def _middle(half: str, names: _Names) -> Iterator[Link]:
    first, attention, second = names.middle
    yield from _residual(f"{half}.middle.first", f"{half}.{first}", False, names)
    yield from _residual(f"{half}.middle.second", f"{half}.{second}", False, names)
    for ours, theirs in names.attention.items():
        link = f"{half}.middle.attention.{ours}", f"{half}.{attention}.{theirs}"
        yield Link(f"{link[0]}.weight", f"{link[1]}.weight", () if ours == "norm" else names.steps)
        yield Link(f"{link[0]}.bias", f"{link[1]}.bias")


def _residual(ours: str, theirs: str, changes: bool, names: _Names) -> Iterator[Link]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield from _both(f"{ours}.{name}", f"{theirs}.{name}")
    if changes:
        yield from _both(f"{ours}.shortcut", f"{theirs}.{names.shortcut}")


def _both(ours: str, theirs: str) -> Iterator[Link]:
    for name in ("weight", "bias"):
        yield Link(f"{ours}.{name}", f"{theirs}.{name}")


def diffusers_rules(sizes: AutoencoderSizes) -> list[Rule]:
    """Map to the names of `AutoencoderKL`."""
    return _rules(sizes, _DIFFUSERS)


def single_file_rules(sizes: AutoencoderSizes) -> list[Rule]:
    """Map to the names of `ae.safetensors`."""
    return _rules(sizes, _FILE)


def read_config(config: Mapping[str, Any]) -> AutoencoderSizes:
    """Return the sizes that a `config.json` of diffusers says. Raises `UsageError` for what this autoencoder is not."""
    read = Config(config)
    widths = config.get("block_out_channels")
    if not isinstance(widths, list | tuple) or not widths or not all(type(n) is int and n > 0 for n in widths):
        raise UsageError(f"`block_out_channels` cannot be {widths!r}", where=read.name, tip="a list of widths")
    same = len(widths)
    read.only(
        act_fn="silu",
        down_block_types=["DownEncoderBlock2D"] * same,
        up_block_types=["UpDecoderBlock2D"] * same,
        mid_block_add_attention=True,
        out_channels=config.get("in_channels", 3),
    )
    for key in ("use_quant_conv", "use_post_quant_conv"):
        if read.boolean(key, True):
            raise UsageError(f"`{key}` is on, and titan's autoencoder, as Flux's, has no such layer", where=read.name)
    return read.sizes(
        AutoencoderSizes,
        in_channels=read.integer("in_channels", 3),
        channels=tuple(widths),
        blocks_per_level=read.integer("layers_per_block", 1),
        latent_channels=read.integer("latent_channels", 4),
        groups=read.integer("norm_num_groups", 32),
        scale=read.number("scaling_factor", 0.18215),
        shift=float(config.get("shift_factor") or 0.0),
    )


def write_config(sizes: AutoencoderSizes) -> dict[str, Any]:
    """Return the `config.json` of an `AutoencoderKL` of these sizes."""
    same = len(sizes.channels)
    return {
        "_class_name": CLASS,
        "act_fn": "silu",
        "block_out_channels": list(sizes.channels),
        "down_block_types": ["DownEncoderBlock2D"] * same,
        "in_channels": sizes.in_channels,
        "latent_channels": sizes.latent_channels,
        "layers_per_block": sizes.blocks_per_level,
        "mid_block_add_attention": True,
        "norm_num_groups": sizes.groups,
        "out_channels": sizes.in_channels,
        "scaling_factor": sizes.scale,
        "shift_factor": sizes.shift,
        "up_block_types": ["UpDecoderBlock2D"] * same,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def read_shapes(shapes: Mapping[str, tuple[int, ...]]) -> AutoencoderSizes | None:
    """Return the sizes that the tensors of a single file say; groups, scale and shift are Flux's."""
    first = shapes.get("encoder.conv_in.weight")
    last = shapes.get("encoder.conv_out.weight")
    widths = []
    while (found := shapes.get(f"encoder.down.{len(widths)}.block.0.conv1.weight")) is not None:
        widths.append(found[0])
    if first is None or last is None or not widths:
        return None
    blocks = 0
    while f"encoder.down.0.block.{blocks}.conv1.weight" in shapes:
        blocks += 1
    return AutoencoderSizes(
        in_channels=first[1], channels=tuple(widths), blocks_per_level=blocks, latent_channels=last[0] // 2
    )


WEIGHTS = Weights(
    model_types=(CLASS,),
    read_config=read_config,
    write_config=write_config,
    rules=diffusers_rules,
    single=SingleFile(single_file_rules, read_shapes),
    library="diffusers",
)
