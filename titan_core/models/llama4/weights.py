"""Llama 4's text model in Hugging Face folders. Both sides rotate neighbours: no row changes its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_core.declare import hf_decoder
from titan_core.declare.hf_config import Config, read_llama3_scaling, write_llama3_scaling
from titan_core.declare.hf_decoder import OURS, THEIRS
from titan_core.declare.weights import Composite, Link, Part, Rule, Transpose, Weights
from titan_core.models.llama4.flavors import Llama4Sizes, Temperature
from titan_core.runtime.errors import UsageError


def hf_rules(sizes: Llama4Sizes) -> list[Rule]:
    """Map to the names of `Llama4ForCausalLM`."""
    rules = hf_decoder.links(sizes, hf_decoder.grouped_query(()), mlp="feed_forward")
    return [*rules, *_mixture(sizes)] if sizes.num_experts else rules


def _mixture(sizes: Llama4Sizes) -> list[Rule]:
    """Map experts: theirs are (expert, in, out), and gate and up lie side by side in one tensor."""
    ours, theirs, width = f"{OURS}.moe", f"{THEIRS}.feed_forward", sizes.expert_dim
    turned = Transpose(1, 2)
    return [
        Link(f"{ours}.router.gate.weight", f"{theirs}.router.weight"),
        Link(f"{ours}.experts.w1.weight", f"{theirs}.experts.gate_up_proj", (turned, Part(2, 0, 2 * width))),
        Link(f"{ours}.experts.w3.weight", f"{theirs}.experts.gate_up_proj", (turned, Part(2, width, 2 * width))),
        Link(f"{ours}.experts.w2.weight", f"{theirs}.experts.down_proj", (turned,)),
        *hf_decoder.swiglu(f"{ours}.shared_experts", f"{theirs}.shared_expert"),
    ]


def read_config(config: Mapping[str, Any]) -> Llama4Sizes:
    """Return the sizes that a `config.json` of Llama 4's text says. Raises `UsageError` for what titan's is not."""
    read = Config(config)
    read.only(hidden_act="silu", attention_bias=False)
    layers = read.integer("num_hidden_layers")
    tuned = bool(config.get("attn_temperature_tuning", True))  # published as 4
    temperature = Temperature(read.number("attn_scale", 0.1), int(read.number("floor_scale", 8192)))
    common = hf_decoder.read_sizes(
        read, norm_eps=1e-5, rope_theta=500000.0, max_seq_len=131072, ffn_dim="intermediate_size_mlp"
    )
    sizes = read.sizes(
        Llama4Sizes,
        **common,
        n_kv_heads=hf_decoder.read_kv_heads(read),
        head_dim=read.integer("head_dim", 128),
        rope_scaling=read_llama3_scaling(read),
        global_every=read.integer("no_rope_layer_interval", 4),
        chunk=read.integer("attention_chunk_size") if config.get("attention_chunk_size") else None,
        qk_norm=read.boolean("use_qk_norm", True),
        temperature=temperature if tuned else None,
        **_read_experts(read, layers),
    )
    rotated = [0 if sizes.is_global(layer) else 1 for layer in range(layers)]
    if config.get("no_rope_layers") != []:  # as published: every layer that is not global
        read.only(no_rope_layers=rotated)
    read.only(layer_types=_layer_types(sizes))
    return sizes


def _read_experts(read: Config, layers: int) -> dict[str, Any]:
    """Return the sizes of mixtures; none if no layer is one. `moe_layers` says more than the step."""
    mixed, step = read.tree.get("moe_layers"), read.integer("interleave_moe_layer_step", 1)
    if mixed == []:
        return {}
    if mixed is not None:
        step = mixed[0] + 1 if isinstance(mixed, list) and type(mixed[0]) is int else step
        if mixed != list(range(step - 1, layers, step)):
            message = f"`moe_layers` is {mixed}, and titan computes mixtures in every n-th layer only"
            raise UsageError(message, where=read.name)
    return {
        "num_experts": read.integer("num_local_experts", 16),
        "top_k": read.integer("num_experts_per_tok", 1),
        "expert_dim": read.integer("intermediate_size", 8192),
        "moe_every": step,
    }


def _layer_types(sizes: Llama4Sizes) -> list[str]:
    return ["full_attention" if sizes.is_global(i) else "chunked_attention" for i in range(sizes.n_layers)]


def write_config(sizes: Llama4Sizes) -> dict[str, Any]:
    """Return the `config.json` of a `Llama4ForCausalLM` of these sizes."""
    if sizes.num_experts:
        unlike = [f"{name} {getattr(sizes, name)}" for name, own in _OWN.items() if getattr(sizes, name) != own]
        if unlike:
            message = f"Llama 4 has no {', '.join(unlike)}, and this model does: transformers cannot run it"
            raise UsageError(message, tip="keep it as a DCP checkpoint")
    temperature = sizes.temperature or Temperature()
    scaling = write_llama3_scaling(sizes.rope_scaling)
    return {
        **hf_decoder.write_sizes(sizes, "Llama4ForCausalLM", "llama4_text", scaling),
        "intermediate_size_mlp": sizes.ffn_dim,
        **_write_experts(sizes),
        "no_rope_layers": [0 if sizes.is_global(i) else 1 for i in range(sizes.n_layers)],
        "no_rope_layer_interval": sizes.global_every,
        "layer_types": _layer_types(sizes),
        "attention_chunk_size": sizes.chunk,
        "use_qk_norm": sizes.qk_norm,
        "attn_temperature_tuning": sizes.temperature is not None,
        "attn_scale": temperature.scale,
        "floor_scale": temperature.floor,
    }


def _write_experts(sizes: Llama4Sizes) -> dict[str, Any]:
    if not sizes.num_experts:
        return {"moe_layers": []}
    return {
        "num_local_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.top_k,
        "intermediate_size": sizes.expert_dim,
        "interleave_moe_layer_step": sizes.moe_every,
        "moe_layers": [layer for layer in range(sizes.n_layers) if sizes.is_mixture(layer)],
    }


_OWN = {
    "num_shared_experts": 1, "score": "sigmoid", "score_before_experts": True, "normalise_scores": False,
    "route_scale": 1.0, "num_groups": 1, "score_bias": False,
}  # fmt: skip

WEIGHTS = Weights(
    model_types=("llama4_text",),
    read_config=read_config,
    write_config=write_config,
    rules=hf_rules,
    composite=Composite(
        model_types=("llama4",),
        config="text_config",
        prefix="language_model.",
        others=("vision_model.", "multi_modal_projector."),
    ),
)
