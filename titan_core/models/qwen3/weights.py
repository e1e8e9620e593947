"""Qwen3, dense and mixtures of experts, in Hugging Face folders.

Hugging Face rotates halves of a head, titan neighbours: the rows of wq and wk change places, and with them the scales
of the norms between projection and rotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_core.declare import hf_decoder
from titan_core.declare.hf_config import Config
from titan_core.declare.weights import Drop, Rotary, Rule, Weights
from titan_core.models.qwen3.flavors import HEAD_NORMS, QwenSizes
from titan_core.runtime.errors import UsageError


def hf_rules(sizes: QwenSizes) -> list[Rule]:
    """Map to the names of `Qwen3ForCausalLM` or `Qwen3MoeForCausalLM`."""
    old = "rotary frequencies, which titan computes from the sizes"
    links = hf_decoder.links(sizes, hf_decoder.grouped_query((Rotary(sizes.head_dim),), HEAD_NORMS))
    if sizes.num_experts:
        links += hf_decoder.mixture(sizes)
    return [*links, Drop("model.layers.{layer}.self_attn.rotary_emb.inv_freq", old)]


def read_config(config: Mapping[str, Any]) -> QwenSizes:
    """Return the sizes that a `config.json` of Qwen3 says. Raises `UsageError` for what titan's Qwen3 is not."""
    read = Config(config)
    read.only(hidden_act="silu", attention_bias=False, use_sliding_window=False)
    if read.rope_type() != "default":
        message = f"the rotation's scaling is `{read.rope_type()}`, and titan's Qwen3 computes none"
        raise UsageError(message, where=read.name)
    common = hf_decoder.read_sizes(read, norm_eps=1e-6, rope_theta=10000.0, max_seq_len=32768)
    mixed = read.tree.get("model_type") == "qwen3_moe"
    experts = _read_experts(read) if mixed else {}
    default = 128 if not mixed else common["dim"] // common["n_heads"]
    heads = {"n_kv_heads": hf_decoder.read_kv_heads(read), "head_dim": read.integer("head_dim", default)}
    return read.sizes(QwenSizes, **common, **heads, **experts)


def _read_experts(read: Config) -> dict[str, Any]:
    read.only(decoder_sparse_step=1, mlp_only_layers=[])
    return {
        "num_experts": read.integer(read.first("num_local_experts", "num_experts"), 128),
        "top_k": read.integer("num_experts_per_tok", 8),
        "expert_dim": read.integer("moe_intermediate_size", 768),
        "normalise_scores": read.boolean("norm_topk_prob", False),
    }


def write_config(sizes: QwenSizes) -> dict[str, Any]:
    """Return the `config.json` of a `Qwen3ForCausalLM`, or a `Qwen3MoeForCausalLM`, of these sizes."""
    windows = {"use_sliding_window": False, "sliding_window": None}
    if not sizes.num_experts:
        return {**hf_decoder.write_sizes(sizes, "Qwen3ForCausalLM", "qwen3", None), **windows}
    unlike = [name for name, plain in _PLAIN.items() if getattr(sizes, name) != plain]
    if unlike:
        message = f"Qwen3's own mixtures have no {', '.join(unlike)}, and this model does: transformers cannot run it"
        raise UsageError(message, tip="keep it as a DCP checkpoint")
    return {
        **hf_decoder.write_sizes(sizes, "Qwen3MoeForCausalLM", "qwen3_moe", None),
        **windows,
        "num_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.expert_dim,
        "norm_topk_prob": sizes.normalise_scores,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


_PLAIN = {
    "num_shared_experts": 0, "score": "softmax", "route_scale": 1.0, "score_before_experts": False, "num_groups": 1,
    "score_bias": False,
}  # fmt: skip

WEIGHTS = Weights(
    model_types=("qwen3", "qwen3_moe"), read_config=read_config, write_config=write_config, rules=hf_rules
)
