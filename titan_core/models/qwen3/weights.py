"""Qwen3 in Hugging Face folders.

Hugging Face rotates halves of a head, titan neighbours: the rows of wq and wk change places, and with them the scales
of the norms between projection and rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_core.declare.hf_config import Config
from titan_core.declare.weights import Drop, Link, Rotary, Rule, Weights
from titan_core.models.qwen3.flavors import QwenSizes
from titan_core.runtime.errors import UsageError


def hf_rules(sizes: QwenSizes) -> list[Rule]:
    """Map to the names of `Qwen3ForCausalLM`."""
    ours, theirs, rotary = "layers.{layer}", "model.layers.{layer}", (Rotary(sizes.head_dim),)
    head = ("lm_head.weight",) if sizes.tied else ()
    rules: list[Rule] = [
        Link("tok_embeddings.weight", "model.embed_tokens.weight", optional_copies=head),
        Link(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"),
        Link(f"{ours}.attention.wq.weight", f"{theirs}.self_attn.q_proj.weight", rotary),
        Link(f"{ours}.attention.wk.weight", f"{theirs}.self_attn.k_proj.weight", rotary),
        Link(f"{ours}.attention.wv.weight", f"{theirs}.self_attn.v_proj.weight"),
        Link(f"{ours}.attention.wo.weight", f"{theirs}.self_attn.o_proj.weight"),
        Link(f"{ours}.attention.q_norm.weight", f"{theirs}.self_attn.q_norm.weight", rotary),
        Link(f"{ours}.attention.k_norm.weight", f"{theirs}.self_attn.k_norm.weight", rotary),
        Link(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        Link(f"{ours}.feed_forward.w1.weight", f"{theirs}.mlp.gate_proj.weight"),
        Link(f"{ours}.feed_forward.w2.weight", f"{theirs}.mlp.down_proj.weight"),
        Link(f"{ours}.feed_forward.w3.weight", f"{theirs}.mlp.up_proj.weight"),
        Link("norm.weight", "model.norm.weight"),
        Drop(f"{theirs}.self_attn.rotary_emb.inv_freq", "rotary frequencies, which titan computes from the sizes"),
    ]
    return rules if sizes.tied else [*rules, Link("output.weight", "lm_head.weight")]


def read_config(config: Mapping[str, Any]) -> QwenSizes:
    """Return the sizes that a `config.json` of Qwen3 says. Raises `UsageError` for what titan's Qwen3 is not."""
    read = Config(config)
    read.only(hidden_act="silu", attention_bias=False, use_sliding_window=False)
    if read.rope_type() != "default":
        message = f"the rotation's scaling is `{read.rope_type()}`, and titan's Qwen3 computes none"
        raise UsageError(message, where=read.name)
    heads = read.integer("num_attention_heads")
    return read.sizes(
        QwenSizes,
        dim=read.integer("hidden_size"),
        n_layers=read.integer("num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=read.integer("num_key_value_heads", heads),
        head_dim=read.integer("head_dim", 128),
        ffn_dim=read.integer("intermediate_size"),
        vocab_size=read.integer("vocab_size"),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        rope_theta=read.rope_theta(10000.0),
        max_seq_len=read.integer("max_position_embeddings", 32768),
        tied=read.boolean("tie_word_embeddings", False),
    )


def write_config(sizes: QwenSizes) -> dict[str, Any]:
    """Return the `config.json` of a `Qwen3ForCausalLM` of these sizes."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": sizes.dim,
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": sizes.n_heads,
        "num_key_value_heads": sizes.n_kv_heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.ffn_dim,
        "vocab_size": sizes.vocab_size,
        "rms_norm_eps": sizes.norm_eps,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": sizes.max_seq_len,
        "tie_word_embeddings": sizes.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }


WEIGHTS = Weights(model_types=("qwen3",), read_config=read_config, write_config=write_config, rules=hf_rules)
