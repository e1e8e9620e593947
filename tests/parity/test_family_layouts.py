"""The layout never changes the result, for every family: what a family adds to Llama 3 meets each way to split."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.parity.layouts import Seen, assert_as_alone, first_steps
from tests.parity.test_layouts import ranks_of, settings_of
from tests.runs import tiny
from titan_core.config.layout import Layout
from titan_core.models import resolve
from titan_core.parallel import legal

QWEN = {"model.name": "qwen3", "model.args.head_dim": 6, "model.args.tied": False}
LLAMA4 = {"model.name": "llama4", "model.args.head_dim": 6, "model.args.chunk": 8, "model.args.global_every": 2}
MLA = {
    "model.name": "deepseek_v3",
    "model.args.n_kv_heads": None,
    "model.args.n_dense_layers": 9,
    "model.args.q_lora_rank": 12,
    "model.args.kv_lora_rank": 10,
    "model.args.qk_nope_dim": 6,
    "model.args.qk_rope_dim": 8,
    "model.args.v_dim": 7,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": QWEN,
    "qwen3 tied": {**QWEN, "model.args.tied": True},
    "llama4": LLAMA4,
    "llama4 packed": {**LLAMA4, "model.args.attention_mask": "block_causal"},
    "latent attention": MLA,
    "latent attention packed": {**MLA, "model.args.attention_mask": "block_causal", "model.args.q_lora_rank": 0},
}
LAYOUTS = {
    "fsdp": {"dp": 2},
    "tensor": {"tp": 2},
    "tensor, whole stream": {"tp": 2, "sp": False},
    "context": {"cp": 2},
    "context, ring": {"cp": 2, "cp_by": "alltoall"},
    "context, heads": {"cp": 2, "cp_by": "heads"},
    "pipeline": {"pp": 2},
    "ring x tensor": {"cp": 2, "tp": 2, "cp_by": "alltoall"},
    "pipeline x fsdp x tensor": {"pp": 2, "dp": 2, "tp": 2},
}


def models_of(layout: str) -> list[str]:
    """Return the models that meet a layout: tied and packed ones those where that makes a difference."""
    return [
        model
        for model in MODELS
        if (model != "qwen3 tied" or layout in ("fsdp", "tensor"))
        and (model != "latent attention packed" or layout in ("context", "context, ring", "context, heads"))
        and not (model == "llama4" and "cp" in LAYOUTS[layout])
    ]


@cache
def alone(model: str) -> Seen:
    with TemporaryDirectory() as folder:
        return first_steps(tiny(folder, **settings_of({}, MODELS[model])), 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_families_on_layouts(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    runs = {model: tiny(tmp_path / model, **settings_of(layout, MODELS[model])) for model in models_of(name)}
    assert_as_alone(runs, ranks_of(layout), alone)


def test_windows_over_several_ranks_need_documents(tmp_path: Path) -> None:
    def problems(model: str) -> list[str]:
        config = tiny(tmp_path, **settings_of(LAYOUTS["context"], MODELS[model])).config
        family, sizes = resolve(config.model)
        return [p.message for p in legal.problems(config, Layout.of(config.parallelism, 2), family, sizes)]

    assert problems("llama4") == ["attention within windows of 8 tokens over several ranks needs masks of documents"]
    assert problems("llama4 packed") == []
