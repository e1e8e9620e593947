"""Decoder-only families in Hugging Face folders: the names and config keys that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from titan_core.declare.hf_config import Config
from titan_core.declare.weights import Link, Rule, Stack, Step

OURS, THEIRS = "layers.{layer}", "model.layers.{layer}"


def links(sizes: Any, attention: Sequence[Rule], *, mlp: str = "mlp") -> list[Rule]:
    """Map to the names of a `...ForCausalLM`, given the rules of its attention; `mlp` is its MLP's name."""
    head = ("lm_head.weight",) if sizes.tied else ()
    rules: list[Rule] = [
        Link("tok_embeddings.weight", "model.embed_tokens.weight", optional_copies=head),
        Link(f"{OURS}.attention_norm.weight", f"{THEIRS}.input_layernorm.weight"),
        *attention,
        Link(f"{OURS}.ffn_norm.weight", f"{THEIRS}.post_attention_layernorm.weight"),
        Link("norm.weight", "model.norm.weight"),
    ]
    mixed = {sizes.is_mixture(layer) for layer in range(sizes.n_layers)}
    if False in mixed:
        rules += swiglu(f"{OURS}.feed_forward", f"{THEIRS}.{mlp}")
    return rules if sizes.tied else [*rules, Link("output.weight", "lm_head.weight")]


def grouped_query(rotary: tuple[Step, ...], head_norms: Sequence[str] = ()) -> list[Rule]:
    """Map attention with grouped queries: `rotary` is what becomes of rows that are rotated.

    `head_norms` lie between projection and rotation, so their scales follow the rows.
    """
    ours, theirs = f"{OURS}.attention", f"{THEIRS}.self_attn"
    return [
        Link(f"{ours}.wq.weight", f"{theirs}.q_proj.weight", rotary),
        Link(f"{ours}.wk.weight", f"{theirs}.k_proj.weight", rotary),
        Link(f"{ours}.wv.weight", f"{theirs}.v_proj.weight"),
        Link(f"{ours}.wo.weight", f"{theirs}.o_proj.weight"),
        *(Link(f"{ours}.{norm}.weight", f"{theirs}.{norm}.weight", rotary) for norm in head_norms),
    ]


def mixture(sizes: Any, ours: str = f"{OURS}.moe", theirs: str = f"{THEIRS}.mlp") -> list[Rule]:
    """Map a mixture whose experts are modules of their own."""
    rules: list[Rule] = [
        Link(f"{ours}.router.gate.weight", f"{theirs}.gate.weight"),
        *swiglu(f"{ours}.experts", f"{theirs}.experts.{{expert}}", (Stack(),)),
    ]
    if sizes.score_bias:
        rules.append(Link(f"{ours}.router.expert_bias", f"{theirs}.gate.e_score_correction_bias"))
    if sizes.num_shared_experts:
        rules += swiglu(f"{ours}.shared_experts", f"{theirs}.shared_experts")
    return rules


def swiglu(ours: str, theirs: str, steps: tuple[Step, ...] = ()) -> list[Rule]:
    """Map an MLP, or with steps something like it."""
    names = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    return [Link(f"{ours}.{name}.weight", f"{theirs}.{their}.weight", steps) for name, their in names.items()]


def read_sizes(
    read: Config, *, norm_eps: float, rope_theta: float, max_seq_len: int, ffn_dim: str = "intermediate_size"
) -> dict[str, Any]:
    """Return the sizes that every decoder has. The numbers are transformers' defaults, `ffn_dim` is a key."""
    return {
        "dim": read.integer("hidden_size"),
        "n_layers": read.integer("num_hidden_layers"),
        "n_heads": read.integer("num_attention_heads"),
        "ffn_dim": read.integer(ffn_dim),
        "vocab_size": read.integer("vocab_size"),
        "norm_eps": read.number("rms_norm_eps", norm_eps),
        "rope_theta": read.rope_theta(rope_theta),
        "max_seq_len": read.integer("max_position_embeddings", max_seq_len),
        "tied": read.boolean("tie_word_embeddings", False),
    }


def read_kv_heads(read: Config) -> int:
    """Return the number of heads of keys and values: as many as of queries, if nothing is said."""
    return read.integer("num_key_value_heads", read.integer("num_attention_heads"))


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
