"""Qwen3 in Hugging Face folders.

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
    """Map to the names of `Qwen3ForCausalLM`."""
    old = "rotary frequencies, which titan computes from the sizes"
    links = hf_decoder.links(sizes, (Rotary(sizes.head_dim),), head_norms=HEAD_NORMS)
    return [*links, Drop("model.layers.{layer}.self_attn.rotary_emb.inv_freq", old)]


def read_config(config: Mapping[str, Any]) -> QwenSizes:
    """Return the sizes that a `config.json` of Qwen3 says. Raises `UsageError` for what titan's Qwen3 is not."""
    read = Config(config)
    read.only(hidden_act="silu", attention_bias=False, use_sliding_window=False)
    if read.rope_type() != "default":
        message = f"the rotation's scaling is `{read.rope_type()}`, and titan's Qwen3 computes none"
        raise UsageError(message, where=read.name)
    common = hf_decoder.read_sizes(read, norm_eps=1e-6, rope_theta=10000.0, max_seq_len=32768)
    return read.sizes(QwenSizes, **common, head_dim=read.integer("head_dim", 128))


def write_config(sizes: QwenSizes) -> dict[str, Any]:
    """Return the `config.json` of a `Qwen3ForCausalLM` of these sizes."""
    common = hf_decoder.write_sizes(sizes, "Qwen3ForCausalLM", "qwen3", None)
    return {**common, "use_sliding_window": False, "sliding_window": None}


WEIGHTS = Weights(model_types=("qwen3",), read_config=read_config, write_config=write_config, rules=hf_rules)
