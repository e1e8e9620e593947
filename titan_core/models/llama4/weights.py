"""Llama 4's text model in Hugging Face folders. Both sides rotate neighbours: no row changes its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_core.declare.hf_config import Config, read_llama3_scaling, write_llama3_scaling
from titan_core.declare.weights import Link, Rule, Weights
from titan_core.models.llama4.flavors import Llama4Sizes, Temperature
from titan_core.runtime.errors import UsageError


def hf_rules(sizes: Llama4Sizes) -> list[Rule]:
    """Map to the names of `Llama4ForCausalLM`."""
    ours, theirs = "layers.{layer}", "model.layers.{layer}"
    head = ("lm_head.weight",) if sizes.tied else ()
    rules: list[Rule] = [
        Link("tok_embeddings.weight", "model.embed_tokens.weight", optional_copies=head),
        Link(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"),
        Link(f"{ours}.attention.wq.weight", f"{theirs}.self_attn.q_proj.weight"),
        Link(f"{ours}.attention.wk.weight", f"{theirs}.self_attn.k_proj.weight"),
        Link(f"{ours}.attention.wv.weight", f"{theirs}.self_attn.v_proj.weight"),
        Link(f"{ours}.attention.wo.weight", f"{theirs}.self_attn.o_proj.weight"),
        Link(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        Link(f"{ours}.feed_forward.w1.weight", f"{theirs}.feed_forward.gate_proj.weight"),
        Link(f"{ours}.feed_forward.w2.weight", f"{theirs}.feed_forward.down_proj.weight"),
        Link(f"{ours}.feed_forward.w3.weight", f"{theirs}.feed_forward.up_proj.weight"),
        Link("norm.weight", "model.norm.weight"),
    ]
    return rules if sizes.tied else [*rules, Link("output.weight", "lm_head.weight")]


def read_config(config: Mapping[str, Any]) -> Llama4Sizes:
    """Return the sizes that a `config.json` of Llama 4's text says. Raises `UsageError` for what titan's is not."""
    read = Config(config)
    read.only(hidden_act="silu", attention_bias=False)
    layers, heads = read.integer("num_hidden_layers"), read.integer("num_attention_heads")
    _only_dense(read, layers)
    tuned = read.boolean("attn_temperature_tuning", True)
    temperature = Temperature(read.number("attn_scale", 0.1), int(read.number("floor_scale", 8192)))
    sizes = read.sizes(
        Llama4Sizes,
        dim=read.integer("hidden_size"),
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=read.integer("num_key_value_heads", heads),
        head_dim=read.integer("head_dim", 128),
        ffn_dim=read.integer("intermediate_size_mlp"),
        vocab_size=read.integer("vocab_size"),
        norm_eps=read.number("rms_norm_eps", 1e-5),
        rope_theta=read.rope_theta(500000.0),
        rope_scaling=read_llama3_scaling(read),
        max_seq_len=read.integer("max_position_embeddings", 131072),
        global_every=read.integer("no_rope_layer_interval", 4),
        chunk=read.integer("attention_chunk_size") if config.get("attention_chunk_size") else None,
        qk_norm=read.boolean("use_qk_norm", True),
        temperature=temperature if tuned else None,
        tied=read.boolean("tie_word_embeddings", False),
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
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "hidden_size": sizes.dim,
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": sizes.n_heads,
        "num_key_value_heads": sizes.n_kv_heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.ffn_dim,
        "intermediate_size_mlp": sizes.ffn_dim,
        "moe_layers": [],
        "vocab_size": sizes.vocab_size,
        "rms_norm_eps": sizes.norm_eps,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": write_llama3_scaling(sizes.rope_scaling),
        "max_position_embeddings": sizes.max_seq_len,
        "no_rope_layers": [0 if sizes.is_global(i) else 1 for i in range(sizes.n_layers)],
        "no_rope_layer_interval": sizes.global_every,
        "layer_types": _layer_types(sizes),
        "attention_chunk_size": sizes.chunk,
        "use_qk_norm": sizes.qk_norm,
        "attn_temperature_tuning": sizes.temperature is not None,
        "attn_scale": temperature.scale,
        "floor_scale": temperature.floor,
        "tie_word_embeddings": sizes.tied,
        "hidden_act": "silu",
        "attention_bias": False,
    }


WEIGHTS = Weights(model_types=("llama4_text",), read_config=read_config, write_config=write_config, rules=hf_rules)
