"""Decoder-only families in Hugging Face folders: the names and config keys that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from titan_core.declare.hf_config import Config
from titan_core.declare.weights import Link, Rule, Step


def links(sizes: Any, rotary: tuple[Step, ...], *, mlp: str = "mlp", head_norms: Sequence[str] = ()) -> list[Rule]:
    """Map to the names of a `...ForCausalLM`: `rotary` is what becomes of rows that are rotated, `mlp` its MLP's name.

    `head_norms` lie between projection and rotation, so their scales follow the rows.
    """
    ours, theirs = "layers.{layer}", "model.layers.{layer}"
    head = ("lm_head.weight",) if sizes.tied else ()
    rules: list[Rule] = [
        Link("tok_embeddings.weight", "model.embed_tokens.weight", optional_copies=head),
        Link(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"),
        Link(f"{ours}.attention.wq.weight", f"{theirs}.self_attn.q_proj.weight", rotary),
        Link(f"{ours}.attention.wk.weight", f"{theirs}.self_attn.k_proj.weight", rotary),
        Link(f"{ours}.attention.wv.weight", f"{theirs}.self_attn.v_proj.weight"),
        Link(f"{ours}.attention.wo.weight", f"{theirs}.self_attn.o_proj.weight"),
        *(Link(f"{ours}.attention.{n}.weight", f"{theirs}.self_attn.{n}.weight", rotary) for n in head_norms),
        Link(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight"),
        Link("norm.weight", "model.norm.weight"),
    ]
    mixed = {sizes.is_mixture(layer) for layer in range(sizes.n_layers)}
    if False in mixed:
        rules += swiglu(f"{ours}.feed_forward", f"{theirs}.{mlp}")
    return rules if sizes.tied else [*rules, Link("output.weight", "lm_head.weight")]


def swiglu(ours: str, theirs: str, steps: tuple[Step, ...] = ()) -> list[Rule]:
    """Map an MLP, or with steps something like it."""
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    return [Link(f"{ours}.{name}.weight", f"{theirs}.{their}.weight", steps) for name, their in names.items()]


def read_sizes(
    read: Config, *, norm_eps: float, rope_theta: float, max_seq_len: int, ffn_dim: str = "intermediate_size"
) -> dict[str, Any]:
    """Return the sizes that every decoder has. The numbers are transformers' defaults, `ffn_dim` is a key."""
    heads = read.integer("num_attention_heads")
    return {
        "dim": read.integer("hidden_size"),
        "n_layers": read.integer("num_hidden_layers"),
        "n_heads": heads,
        "n_kv_heads": read.integer("num_key_value_heads", heads),
        "ffn_dim": read.integer(ffn_dim),
        "vocab_size": read.integer("vocab_size"),
        "norm_eps": read.number("rms_norm_eps", norm_eps),
        "rope_theta": read.rope_theta(rope_theta),
        "max_seq_len": read.integer("max_position_embeddings", max_seq_len),
        "tied": read.boolean("tie_word_embeddings", False),
    }


def write_sizes(sizes: Any, architecture: str, model_type: str, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Return the keys that every decoder's `config.json` has."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": sizes.dim,
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": sizes.n_heads,
        "num_key_value_heads": sizes.n_kv_heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.ffn_dim,
        "vocab_size": sizes.vocab_size,
        "rms_norm_eps": sizes.norm_eps,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": sizes.max_seq_len,
        "tie_word_embeddings": sizes.tied,
        "hidden_act": "silu",
        "attention_bias": False,
    }
