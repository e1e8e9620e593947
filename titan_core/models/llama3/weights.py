"""Llama 3 in foreign checkpoints: Hugging Face's names and config, Meta's names and params.

Hugging Face rotates halves of a head, Meta and titan rotate neighbours, so the rows of wq and wk change places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from titan_core.declare import hf_decoder
from titan_core.declare.hf_config import Config, read_llama3_scaling, write_llama3_scaling
from titan_core.declare.rope import RopeScaling
from titan_core.declare.weights import Drop, Link, Meta, MetaLayout, Part, Rotary, Rule, Split, Step, Weights
from titan_core.models.llama3.flavors import FLAVORS, LlamaSizes

_INV_FREQ = "rotary frequencies, which titan computes from the sizes"


def hf_rules(sizes: LlamaSizes) -> list[Rule]:
    """Map to the names of `LlamaForCausalLM`."""
    old = Drop("model.layers.{layer}.self_attn.rotary_emb.inv_freq", _INV_FREQ)
    return [*hf_decoder.links(sizes, hf_decoder.grouped_query((Rotary(sizes.head_dim),))), old]


def read_config(config: Mapping[str, Any]) -> LlamaSizes:
    """Return the sizes that a `config.json` of Llama says. Raises `UsageError` for what titan's Llama is not."""
    read = Config(config)
    read.only(hidden_act="silu", attention_bias=False, mlp_bias=False, pretraining_tp=1)
    common = hf_decoder.read_sizes(read, norm_eps=1e-6, rope_theta=10000.0, max_seq_len=2048)
    kv_heads = hf_decoder.read_kv_heads(read)
    sizes = read.sizes(LlamaSizes, **common, n_kv_heads=kv_heads, rope_scaling=read_llama3_scaling(read))
    read.only(head_dim=sizes.head_dim)
    return sizes


def write_config(sizes: LlamaSizes) -> dict[str, Any]:
    """Return the `config.json` of a `LlamaForCausalLM` of these sizes."""
    scaling = write_llama3_scaling(sizes.rope_scaling)
    return {**hf_decoder.write_sizes(sizes, "LlamaForCausalLM", "llama", scaling), "mlp_bias": False}


# ------------------------------------------------------------------------------------------------ Meta


def meta_rules(sizes: LlamaSizes, layout: MetaLayout) -> list[Rule]:
    """Map to the keys of Meta's files: row-parallel weights are cut along columns, norms are in every file."""
    rows, columns = Split(0, layout.parts), Split(1, layout.parts)
    again = [f"{number:02d}" for number in range(1, layout.parts)]

    def norm(name: str) -> Link:
        return Link(name, f"00/{name}", copies=tuple(f"{part}/{name}" for part in again))

    def cut(name: str, step: Step) -> Link:
        return Link(name, f"{{part}}/{name}", (step,))

    embedding = Split(layout.embedding_dim, layout.parts)
    layer = "layers.{layer}"
    rules: list[Rule] = [
        norm(f"{layer}.attention_norm.weight"),
        *_meta_qkv(sizes, layout),
        cut(f"{layer}.attention.wo.weight", columns),
        norm(f"{layer}.ffn_norm.weight"),
        cut(f"{layer}.feed_forward.w1.weight", rows),
        cut(f"{layer}.feed_forward.w2.weight", columns),
        cut(f"{layer}.feed_forward.w3.weight", rows),
        norm("norm.weight"),
        Drop("{part}/rope.freqs", _INV_FREQ),
        Drop(f"{{part}}/{layer}.attention.inner_attention.rope.freqs", _INV_FREQ),
    ]
    if sizes.tied:  # Meta stores the head of a tied model a second time
        assert layout.embedding_dim == 0
        head = Link("tok_embeddings.weight", "{part}/tok_embeddings.weight", (embedding,), ("{part}/output.weight",))
        return [head, *rules]
    return [cut("tok_embeddings.weight", embedding), *rules, cut("output.weight", rows)]


def _meta_qkv(sizes: LlamaSizes, layout: MetaLayout) -> Iterator[Rule]:
    """Three tensors, or one a part that has the part's queries, keys and values one below the other."""
    prefix = "layers.{layer}.attention"
    split = Split(0, layout.parts)
    query, key = (n * sizes.head_dim // layout.parts for n in (sizes.n_heads, sizes.n_kv_heads))
    total, starts = query + 2 * key, {"wq": 0, "wk": query, "wv": query + key}
    for name, start in starts.items():
        if layout.fused_qkv:
            yield Link(f"{prefix}.{name}.weight", f"{{part}}/{prefix}.wqkv.weight", (split, Part(0, start, total)))
        else:
            yield Link(f"{prefix}.{name}.weight", f"{{part}}/{prefix}.{name}.weight", (split,))


def read_params(params: Mapping[str, Any]) -> LlamaSizes:
    """Return the sizes that a `params.json` says.

    It does not say whether the head is tied, nor the scaling of the rotation beyond whether there is one: sizes of a
    named flavor get the flavor's.
    """
    read = Config(params, "params.json")
    dim, heads = read.integer("dim"), read.integer("n_heads")
    hidden = int(read.number("ffn_dim_multiplier", 1.0) * int(8 * dim / 3))
    unit = read.integer("multiple_of", 256)
    scaled = read.boolean("use_scaled_rope", False)
    sizes = read.sizes(
        LlamaSizes,
        dim=dim,
        n_layers=read.integer("n_layers"),
        n_heads=heads,
        n_kv_heads=read.integer("n_kv_heads", heads),
        ffn_dim=-(-hidden // unit) * unit,
        vocab_size=read.integer("vocab_size"),
        norm_eps=read.number("norm_eps", 1e-5),
        rope_theta=read.number("rope_theta", 10000.0),
        rope_scaling=RopeScaling() if scaled else None,
        max_seq_len=131072 if scaled else 8192,
    )
    for flavor in FLAVORS.values():
        if scaled and dataclasses.replace(flavor, tied=False, rope_scaling=RopeScaling()) == sizes:
            return flavor
    return sizes


def write_params(sizes: LlamaSizes) -> dict[str, Any]:
    """Return the `params.json` of these sizes."""
    return {
        "dim": sizes.dim,
        "n_layers": sizes.n_layers,
        "n_heads": sizes.n_heads,
        "n_kv_heads": sizes.n_kv_heads,
        "vocab_size": sizes.vocab_size,
        # Meta's rule rounds a multiple of 8/3 dim up to `multiple_of`: this pair gives any width
        "multiple_of": sizes.ffn_dim,
        "ffn_dim_multiplier": min(1.0, sizes.ffn_dim / int(8 * sizes.dim / 3)) if sizes.dim > 1 else 1.0,
        "norm_eps": sizes.norm_eps,
        "rope_theta": sizes.rope_theta,
        "use_scaled_rope": sizes.rope_scaling is not None,
    }


WEIGHTS = Weights(
    model_types=("llama",),
    read_config=read_config,
    write_config=write_config,
    rules=hf_rules,
    meta=Meta(meta_rules, read_params, write_params),
)
