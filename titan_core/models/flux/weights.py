"""Flux in diffusers' folders and in Black Forest Labs' single files.

diffusers keeps query, key and value apart, as titan does; a file of Black Forest Labs has them in one tensor. The
halves of the last modulation, shift and scale, are the other way round in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from titan_core.declare.hf_config import Config
from titan_core.declare.weights import Link, Part, Rule, SingleFile, Step, SwapHalves, Weights
from titan_core.models.flux.flavors import FluxSizes, axes_of
from titan_core.runtime.errors import UsageError

CLASS = "FluxTransformer2DModel"
_HEADS = ("q", "k", "v")


def diffusers_rules(sizes: FluxSizes) -> list[Rule]:
    """Map to the names of `FluxTransformer2DModel`."""
    rules: list[Rule] = [*_both("img_in", "x_embedder"), *_both("txt_in", "context_embedder")]
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    embedders |= {"guidance_in": "guidance_embedder"} if sizes.guidance else {}
    for ours, theirs in embedders.items():
        rules += _both(f"{ours}.in_layer", f"time_text_embed.{theirs}.linear_1")
        rules += _both(f"{ours}.out_layer", f"time_text_embed.{theirs}.linear_2")
    if sizes.n_double:
        rules += _diffusers_double()
    if sizes.n_single:
        rules += _diffusers_single(sizes)
    rules += _both("final_layer.mod", "norm_out.linear", SwapHalves(0))
    return [*rules, *_both("final_layer.linear", "proj_out")]


def _diffusers_double() -> Iterator[Rule]:
    ours, theirs = "double_blocks.{layer}", "transformer_blocks.{layer}"
    yield from _both(f"{ours}.img_mod", f"{theirs}.norm1.linear")
    yield from _both(f"{ours}.txt_mod", f"{theirs}.norm1_context.linear")
    for head in _HEADS:
        yield from _both(f"{ours}.attention.img.w{head}", f"{theirs}.attn.to_{head}")
        yield from _both(f"{ours}.attention.txt.w{head}", f"{theirs}.attn.add_{head}_proj")
    for head in _HEADS[:2]:
        yield Link(f"{ours}.attention.img.{head}_norm.weight", f"{theirs}.attn.norm_{head}.weight")
        yield Link(f"{ours}.attention.txt.{head}_norm.weight", f"{theirs}.attn.norm_added_{head}.weight")
    yield from _both(f"{ours}.attention.img.wo", f"{theirs}.attn.to_out.0")
    yield from _both(f"{ours}.attention.txt.wo", f"{theirs}.attn.to_add_out")
    for stream, name in (("img", "ff"), ("txt", "ff_context")):
        yield from _both(f"{ours}.{stream}_mlp.w1", f"{theirs}.{name}.net.0.proj")
        yield from _both(f"{ours}.{stream}_mlp.w2", f"{theirs}.{name}.net.2")


def _diffusers_single(sizes: FluxSizes) -> Iterator[Rule]:
    ours, theirs = "single_blocks.{layer}", "single_transformer_blocks.{layer}"
    yield from _both(f"{ours}.mod", f"{theirs}.norm.linear")
    for head in _HEADS:
        yield from _both(f"{ours}.mix.w{head}", f"{theirs}.attn.to_{head}")
    for head in _HEADS[:2]:
        yield Link(f"{ours}.mix.{head}_norm.weight", f"{theirs}.attn.norm_{head}.weight")
    yield from _both(f"{ours}.mix.w1", f"{theirs}.proj_mlp")
    yield from _joined_out(sizes, ours, f"{theirs}.proj_out")


def _joined_out(sizes: FluxSizes, ours: str, theirs: str) -> Iterator[Rule]:
    """Both libraries multiply what attention and MLP gave, side by side, by one matrix."""
    width = sizes.dim + sizes.mlp_dim
    yield Link(f"{ours}.mix.wo.weight", f"{theirs}.weight", (Part(1, 0, width),))
    yield Link(f"{ours}.mix.w2.weight", f"{theirs}.weight", (Part(1, sizes.dim, width),))
    yield Link(f"{ours}.mix.w2.bias", f"{theirs}.bias")


def single_file_rules(sizes: FluxSizes) -> list[Rule]:
    """Map to the names of `flux1-dev.safetensors` and `flux1-schnell.safetensors`."""
    rules: list[Rule] = []
    for name in ("img_in", "txt_in", "final_layer.linear"):
        rules += _both(name, name)
    for name in ("time_in", "vector_in", *(("guidance_in",) if sizes.guidance else ())):
        rules += [*_both(f"{name}.in_layer", f"{name}.in_layer"), *_both(f"{name}.out_layer", f"{name}.out_layer")]
    rules += _both("final_layer.mod", "final_layer.adaLN_modulation.1")
    if sizes.n_double:
        for stream in ("img", "txt"):
            rules += _file_stream(sizes, stream)
    if sizes.n_single:
        rules += _file_single(sizes)
    return rules


def _file_stream(sizes: FluxSizes, stream: str) -> Iterator[Rule]:
    block = "double_blocks.{layer}"
    ours, theirs = f"{block}.attention.{stream}", f"{block}.{stream}_attn"
    yield from _both(f"{block}.{stream}_mod", f"{block}.{stream}_mod.lin")
    for number, head in enumerate(_HEADS):
        yield from _both(f"{ours}.w{head}", f"{theirs}.qkv", Part(0, number * sizes.dim, 3 * sizes.dim))
    yield Link(f"{ours}.q_norm.weight", f"{theirs}.norm.query_norm.scale")
    yield Link(f"{ours}.k_norm.weight", f"{theirs}.norm.key_norm.scale")
    yield from _both(f"{ours}.wo", f"{theirs}.proj")
    yield from _both(f"{block}.{stream}_mlp.w1", f"{block}.{stream}_mlp.0")
    yield from _both(f"{block}.{stream}_mlp.w2", f"{block}.{stream}_mlp.2")


def _file_single(sizes: FluxSizes) -> Iterator[Rule]:
    block, rows = "single_blocks.{layer}", 3 * sizes.dim + sizes.mlp_dim
    yield from _both(f"{block}.mod", f"{block}.modulation.lin")
    for number, name in enumerate(("wq", "wk", "wv", "w1")):
        yield from _both(f"{block}.mix.{name}", f"{block}.linear1", Part(0, number * sizes.dim, rows))
    yield Link(f"{block}.mix.q_norm.weight", f"{block}.norm.query_norm.scale")
    yield Link(f"{block}.mix.k_norm.weight", f"{block}.norm.key_norm.scale")
    yield from _joined_out(sizes, block, f"{block}.linear2")


def _both(ours: str, theirs: str, *steps: Step) -> Sequence[Link]:
    """Link weight and bias."""
    return [Link(f"{ours}.{name}", f"{theirs}.{name}", steps) for name in ("weight", "bias")]


# ---------------------------------------------------------------------------------------------- sizes


def read_config(config: Mapping[str, Any]) -> FluxSizes:
    """Return the sizes that a `config.json` of diffusers says. Raises `UsageError` for what titan's Flux is not."""
    read = Config(config)
    in_channels = read.integer("in_channels", 64)
    read.only(patch_size=1, out_channels=in_channels)
    heads, width = read.integer("num_attention_heads", 24), read.integer("attention_head_dim", 128)
    axes = config.get("axes_dims_rope", [16, 56, 56])
    if not isinstance(axes, list | tuple) or len(axes) != 3 or not all(type(n) is int and n > 0 for n in axes):
        raise UsageError(f"`axes_dims_rope` cannot be {axes!r}", where=read.name, tip="three positive integers")
    return read.sizes(
        FluxSizes,
        in_channels=in_channels,
        vector_dim=read.integer("pooled_projection_dim", 768),
        context_dim=read.integer("joint_attention_dim", 4096),
        dim=heads * width,
        n_heads=heads,
        n_double=read.integer("num_layers", 19),
        n_single=read.integer("num_single_layers", 38),
        axes_dim=tuple(axes),
        guidance=read.boolean("guidance_embeds", False),
    )


def write_config(sizes: FluxSizes) -> dict[str, Any]:
    """Return the `config.json` of a `FluxTransformer2DModel` of these sizes."""
    fixed = {"mlp_ratio": 4.0, "rope_theta": 10000.0, "norm_eps": 1e-6}
    for name, value in fixed.items():
        if getattr(sizes, name) != value:
            raise UsageError(
                f"diffusers has no word for {name} {getattr(sizes, name)}", tip=f"it computes {value} only"
            )
    return {
        "_class_name": CLASS,
        "attention_head_dim": sizes.head_dim,
        "axes_dims_rope": list(sizes.axes_dim),
        "guidance_embeds": sizes.guidance,
        "in_channels": sizes.in_channels,
        "joint_attention_dim": sizes.context_dim,
        "num_attention_heads": sizes.n_heads,
        "num_layers": sizes.n_double,
        "num_single_layers": sizes.n_single,
        "out_channels": None,
        "patch_size": 1,
        "pooled_projection_dim": sizes.vector_dim,
    }


def read_shapes(shapes: Mapping[str, tuple[int, ...]]) -> FluxSizes | None:
    """Return the sizes that the tensors of a single file say; the rotation's axes are taken to be the usual ones."""
    needed = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight")
    norms = [name for name in shapes if name.endswith("norm.query_norm.scale")]
    if not norms or not all(len(shapes.get(name, ())) == 2 for name in needed):
        return None
    width, (dim, in_channels) = shapes[norms[0]][0], shapes["img_in.weight"]
    if width == 0 or dim % width:
        return None
    mlp = shapes.get("double_blocks.0.img_mlp.0.weight", (4 * dim,))[0]
    return FluxSizes(
        in_channels=in_channels,
        vector_dim=shapes["vector_in.in_layer.weight"][1],
        context_dim=shapes["txt_in.weight"][1],
        dim=dim,
        n_heads=dim // width,
        mlp_ratio=mlp / dim,
        n_double=_count(shapes, "double_blocks"),
        n_single=_count(shapes, "single_blocks"),
        axes_dim=axes_of(width),
        guidance="guidance_in.in_layer.weight" in shapes,
    )


def _count(shapes: Mapping[str, tuple[int, ...]], blocks: str) -> int:
    numbers = [int(found.group(1)) for name in shapes if (found := re.match(rf"{blocks}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


WEIGHTS = Weights(
    model_types=(CLASS,),
    read_config=read_config,
    write_config=write_config,
    rules=diffusers_rules,
    single=SingleFile(single_file_rules, read_shapes),
    library="diffusers",
)
