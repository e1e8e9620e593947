"""Llama 4's text model in Hugging Face folders. Both sides rotate neighbours: no row changes its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_core.declare import hf_decoder
from titan_core.declare.hf_config import Config, read_llama3_scaling, write_llama3_scaling
from titan_core.declare.weights import Rule, Weights
from titan_core.models.llama4.flavors import Llama4Sizes, Temperature
from titan_core.runtime.errors import UsageError


def hf_rules(sizes: Llama4Sizes) -> list[Rule]:
    """Map to the names of `Llama4ForCausalLM`."""
    return hf_decoder.links(sizes, hf_decoder.grouped_query(()), mlp="feed_forward")


def read_config(config: Mapping[str, Any]) -> Llama4Sizes:
    """Return the sizes that a `config.json` of Llama 4's text says. Raises `UsageError` for what titan's is not."""
    read = Config(config)
    read.only(hidden_act="silu", attention_bias=False)
    layers = read.integer("num_hidden_layers")
    _only_dense(read, layers)
    tuned = read.boolean("attn_temperature_tuning", True)
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
    )
    rotated = [0 if sizes.is_global(layer) else 1 for layer in range(layers)]
    read.only(no_rope_layers=rotated, layer_types=_layer_types(sizes))
    return sizes


def _only_dense(read: Config, layers: int) -> None:
    """Refuse layers that are mixtures of experts."""
    mixed = read.tree.get("moe_layers")
    if mixed is None:
        step = read.integer("interleave_moe_layer_step", 1)
        mixed = list(range(step - 1, layers, step))
    if mixed:
        message = f"{len(mixed)} of {layers} layers are mixtures of experts, and titan's llama4 has dense layers only"
        raise UsageError(message, where=read.name)


def _layer_types(sizes: Llama4Sizes) -> list[str]:
    return ["full_attention" if sizes.is_global(i) else "chunked_attention" for i in range(sizes.n_layers)]


def write_config(sizes: Llama4Sizes) -> dict[str, Any]:
    """Return the `config.json` of a `Llama4ForCausalLM` of these sizes."""
    temperature = sizes.temperature or Temperature()
    scaling = write_llama3_scaling(sizes.rope_scaling)
    return {
        **hf_decoder.write_sizes(sizes, "Llama4ForCausalLM", "llama4_text", scaling),
        "intermediate_size_mlp": sizes.ffn_dim,
        "moe_layers": [],
        "no_rope_layers": [0 if sizes.is_global(i) else 1 for i in range(sizes.n_layers)],
        "no_rope_layer_interval": sizes.global_every,
        "layer_types": _layer_types(sizes),
        "attention_chunk_size": sizes.chunk,
        "use_qk_norm": sizes.qk_norm,
        "attn_temperature_tuning": sizes.temperature is not None,
        "attn_scale": temperature.scale,
        "floor_scale": temperature.floor,
    }


WEIGHTS = Weights(model_types=("llama4_text",), read_config=read_config, write_config=write_config, rules=hf_rules)
