"""Flux: where it can be split."""

from __future__ import annotations

from titan_core.declare.sharding import Sharding

_STREAMS = ("img", "txt")
_HEADS = ("wq", "wk", "wv")

SHARDING = Sharding(
    openings=("img_in", "txt_in"),
    conditions=("time_in", "vector_in", "guidance_in"),
    modulations=("double_blocks.*.img_mod", "double_blocks.*.txt_mod", "single_blocks.*.mod", "final_layer.mod"),
    columns=(
        *(f"double_blocks.*.attention.{stream}.{name}" for stream in _STREAMS for name in _HEADS),
        *(f"double_blocks.*.{stream}_mlp.w1" for stream in _STREAMS),
        *(f"single_blocks.*.mix.{name}" for name in (*_HEADS, "w1")),
    ),
    rows=(
        *(f"double_blocks.*.attention.{stream}.wo" for stream in _STREAMS),
        *(f"double_blocks.*.{stream}_mlp.w2" for stream in _STREAMS),
        "single_blocks.*.mix.wo",
        "single_blocks.*.mix.w2",
    ),
    regions=(
        "double_blocks.*.attention",
        *(f"double_blocks.*.{stream}_mlp" for stream in _STREAMS),
        "single_blocks.*.mix",
    ),
    attentions=("double_blocks.*.attention.attend", "single_blocks.*.mix.attend"),
    outputs=("final_layer",),
)
BLOCKS = ("double_blocks.*", "single_blocks.*")
