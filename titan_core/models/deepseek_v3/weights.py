"""DeepSeek-V2 and V3 in Hugging Face folders. Both sides rotate neighbours: no row changes its place."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from titan_core.declare import hf_decoder
from titan_core.declare.hf_config import Config, read_yarn, write_yarn
from titan_core.declare.hf_decoder import OURS, THEIRS
from titan_core.declare.weights import Drop, Link, Rule, Weights
from titan_core.models.deepseek_v3.flavors import DeepSeekSizes
from titan_core.runtime.errors import UsageError

_PREDICTS = "it predicts a second token ahead, which the model of these sizes does not"


def hf_rules(sizes: DeepSeekSizes) -> list[Rule]:
    """Map to the names of `DeepseekV3ForCausalLM` or `DeepseekV2ForCausalLM`."""
    rules = hf_decoder.links(sizes, _attention(sizes))
    if sizes.n_dense_layers < sizes.n_layers:
        rules += hf_decoder.mixture(sizes)
    old = "rotary frequencies, which titan computes from the sizes"
    rules.append(Drop(f"{THEIRS}.self_attn.rotary_emb.inv_freq", old))
    if not sizes.num_mtp_layers:
        names = (rule.theirs for rule in _predicting(sizes, 0))
        repeated = (f"{_mtp_name(sizes, 0)}.{name}.weight" for name in _REPEATED.values())
        return [*rules, *(Drop(name, _PREDICTS) for name in (*names, *repeated))]
    for depth in range(sizes.num_mtp_layers):
        rules += _predicting(sizes, depth)
    return [_repeated(rule, sizes) for rule in rules]


def _attention(sizes: DeepSeekSizes, ours: str = OURS, theirs: str = THEIRS) -> list[Rule]:
    ours, theirs = f"{ours}.attention", f"{theirs}.self_attn"
    names = {"wkv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wo": "o_proj"}
    if sizes.q_lora_rank:
        names |= {"wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj"}
    else:
        names["wq"] = "q_proj"
    return [Link(f"{ours}.{name}.weight", f"{theirs}.{their}.weight") for name, their in names.items()]


# tables of ours, and where each layer that predicts repeats them
_REPEATED = {"tok_embeddings.weight": "embed_tokens", "output.weight": "shared_head.head"}


def _mtp_name(sizes: DeepSeekSizes, depth: int) -> str:
    """Return the name of a layer that predicts a further token: they go on counting after the last."""
    return f"model.layers.{sizes.n_layers + depth}"


def _predicting(sizes: DeepSeekSizes, depth: int) -> list[Rule]:
    """Map a layer that predicts a further token: V3's checkpoints have one, transformers' model has not."""
    ours, theirs = f"mtp.{depth}", _mtp_name(sizes, depth)
    names = {
        "embedding_norm": "enorm", "hidden_norm": "hnorm", "proj": "eh_proj", "norm": "shared_head.norm",
        "block.attention_norm": "input_layernorm", "block.ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    rules: list[Rule] = [Link(f"{ours}.{name}.weight", f"{theirs}.{their}.weight") for name, their in names.items()]
    rules += _attention(sizes, f"{ours}.block", theirs)
    if sizes.is_mixture(sizes.n_layers + depth):
        return rules + hf_decoder.mixture(sizes, f"{ours}.block.moe", f"{theirs}.mlp")
    return rules + hf_decoder.swiglu(f"{ours}.block.feed_forward", f"{theirs}.mlp")


def _repeated(rule: Rule, sizes: DeepSeekSizes) -> Rule:
    """Add the copies of a table that layers that predict have: they share the model's embedding and head."""
    if isinstance(rule, Drop) or rule.ours not in _REPEATED:
        return rule
    names = _REPEATED.values() if sizes.tied else (_REPEATED[rule.ours],)
    layers = [_mtp_name(sizes, depth) for depth in range(sizes.num_mtp_layers)]
    return dataclasses.replace(rule, copies=tuple(f"{layer}.{name}.weight" for layer in layers for name in names))


def held(sizes: DeepSeekSizes, names: Collection[str]) -> DeepSeekSizes:
    """Leave out layers that predict where a folder has none: transformers saves a model without, its config with."""
    there = f"{_mtp_name(sizes, 0)}.eh_proj.weight" in names
    return sizes if there else dataclasses.replace(sizes, num_mtp_layers=0)


def read_config(config: Mapping[str, Any]) -> DeepSeekSizes:
    """Return the sizes that a `config.json` of DeepSeek says. Raises `UsageError` for what titan's DeepSeek is not."""
    v3 = config.get("model_type") != "deepseek_v2"
    read = Config({**(_DEFAULTS_V3 if v3 else _DEFAULTS_V2), **config})
    read.only(hidden_act="silu", attention_bias=False, mlp_bias=False, moe_layer_freq=1, rope_interleave=True)
    common = hf_decoder.read_sizes(read, norm_eps=1e-6, rope_theta=10000.0, max_seq_len=4096 if v3 else 2048)
    read.only(num_key_value_heads=common["n_heads"])
    return read.sizes(
        DeepSeekSizes,
        **common,
        n_dense_layers=min(_count(read, "first_k_dense_replace"), common["n_layers"]),
        q_lora_rank=_count(read, "q_lora_rank"),
        kv_lora_rank=read.integer("kv_lora_rank"),
        qk_nope_dim=read.integer("qk_nope_head_dim"),
        qk_rope_dim=read.integer("qk_rope_head_dim"),
        v_dim=read.integer("v_head_dim"),
        rope_scaling=read_yarn(read),
        num_experts=read.integer("n_routed_experts"),
        top_k=read.integer("num_experts_per_tok"),
        expert_dim=read.integer("moe_intermediate_size"),
        num_shared_experts=_count(read, "n_shared_experts"),
        route_scale=read.number("routed_scaling_factor"),
        num_mtp_layers=_count(read, "num_nextn_predict_layers"),
        **(_read_gate_v3(read) if v3 else _read_gate_v2(read)),
    )


# transformers' defaults; `save_pretrained` writes all, older files leave some out
_DEFAULTS: dict[str, Any] = {
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128
}  # fmt: skip
_DEFAULTS_V3 = _DEFAULTS | {
    "first_k_dense_replace": 3, "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
    "n_shared_experts": 1, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
}  # fmt: skip
_DEFAULTS_V2 = _DEFAULTS | {
    "first_k_dense_replace": 0, "n_routed_experts": 64, "moe_intermediate_size": 1407, "n_shared_experts": 2,
    "routed_scaling_factor": 1.0, "topk_method": "greedy", "norm_topk_prob": False,
}  # fmt: skip


def _count(read: Config, key: str) -> int:
    """Return a number that may be none: 0 or null."""
    return read.integer(key) if read.tree.get(key) else 0


def _read_gate_v3(read: Config) -> dict[str, Any]:
    read.only(scoring_func="sigmoid", topk_method="noaux_tc")
    return {
        "score": "sigmoid",
        "score_bias": True,
        "group_score": "top2",
        "num_groups": read.integer("n_group"),
        "top_groups": read.integer("topk_group"),
        "normalise_scores": read.boolean("norm_topk_prob", True),
    }


def _read_gate_v2(read: Config) -> dict[str, Any]:
    read.only(scoring_func="softmax", norm_topk_prob=False)  # with a sum of scores divided out, transformers disagrees
    gate = {"score": "softmax", "score_bias": False, "group_score": "max", "normalise_scores": False}
    method = read.tree.get("topk_method")
    if method == "greedy":
        return {**gate, "num_groups": 1, "top_groups": 1}
    if method != "group_limited_greedy":
        raise UsageError(
            f"`topk_method` is {method!r}, and titan computes greedy and group_limited_greedy", where=read.name
        )
    return {**gate, "num_groups": read.integer("n_group"), "top_groups": read.integer("topk_group")}


def write_config(sizes: DeepSeekSizes) -> dict[str, Any]:
    """Return the `config.json` of a `DeepseekV3ForCausalLM`, or with softmax scores of a `DeepseekV2ForCausalLM`."""
    v3 = sizes.score == "sigmoid"
    name = "DeepSeek-V3" if v3 else "DeepSeek-V2"
    wanted: dict[str, Any] = {"score_bias": v3, "score_before_experts": False}
    if sizes.num_groups > 1:
        wanted["group_score"] = "top2" if v3 else "max"
    if not v3:
        wanted["normalise_scores"] = False
    unlike = [f"{field} {getattr(sizes, field)}" for field, own in wanted.items() if getattr(sizes, field) != own]
    if not sizes.num_shared_experts:
        unlike.append("num_shared_experts 0")
    if sizes.num_mtp_layers and not v3:
        unlike.append(f"num_mtp_layers {sizes.num_mtp_layers}")
    if unlike:
        message = f"{name} has no {', '.join(unlike)}, and this model does: transformers cannot run it"
        raise UsageError(message, tip="keep it as a DCP checkpoint")
    version = "3" if v3 else "2"
    return {
        **hf_decoder.write_sizes(
            sizes, f"DeepseekV{version}ForCausalLM", f"deepseek_v{version}", write_yarn(sizes.rope_scaling)
        ),
        "first_k_dense_replace": sizes.n_dense_layers,
        "moe_layer_freq": 1,
        "q_lora_rank": sizes.q_lora_rank or None,
        "kv_lora_rank": sizes.kv_lora_rank,
        "qk_nope_head_dim": sizes.qk_nope_dim,
        "qk_rope_head_dim": sizes.qk_rope_dim,
        "v_head_dim": sizes.v_dim,
        "n_routed_experts": sizes.num_experts,
        "n_shared_experts": sizes.num_shared_experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.expert_dim,
        "routed_scaling_factor": sizes.route_scale,
        "n_group": sizes.num_groups,
        "topk_group": sizes.top_groups,
        "norm_topk_prob": sizes.normalise_scores,
        "scoring_func": sizes.score,
        **(
            {"topk_method": "noaux_tc", "num_nextn_predict_layers": sizes.num_mtp_layers, "rope_interleave": True}
            if v3
            else {"topk_method": "greedy" if sizes.num_groups == 1 else "group_limited_greedy"}
        ),
    }


WEIGHTS = Weights(
    model_types=("deepseek_v3", "deepseek_v2"),
    read_config=read_config,
    write_config=write_config,
    rules=hf_rules,
    held=held,
    unscaled=("*.eh_proj.weight",),
)
