"""Tiny runs on a GPU, and the same ones on a CPU to compare with.

Heads are 16 wide and every side is a multiple of 16: what flex attention, grouped products and float8 take.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.runs import tiny
from titan_core.config.load import Resolved, load
from titan_core.jobs import train
from titan_core.runtime.events import Event, StepDone

LLAMA: dict[str, Any] = {"model.args.dim": 64, "model.args.ffn_dim": 96, "training.seq_len": 64}
EXPERTS = {"model.args.num_experts": 8, "model.args.top_k": 2, "model.args.expert_dim": 48, "optimizer.lr": 3e-3}
MODELS: dict[str, dict[str, Any]] = {
    "llama3": LLAMA,
    "llama3 packed": {**LLAMA, "model.args.attention_mask": "block_causal"},
    "qwen3": {**LLAMA, "model.name": "qwen3", "model.args.head_dim": 16},
    "qwen3 experts": {**LLAMA, "model.name": "qwen3", "model.args.head_dim": 16, **EXPERTS},
    "llama4 packed": {
        **LLAMA,
        "model.name": "llama4",
        "model.args.head_dim": 16,
        "model.args.chunk": 32,
        "model.args.global_every": 2,
        "model.args.attention_mask": "block_causal",
    },
    "llama4 experts": {**LLAMA, "model.name": "llama4", "model.args.head_dim": 16, **EXPERTS, "model.args.top_k": 1},
    "deepseek_v3": {
        **LLAMA,
        **EXPERTS,
        "model.name": "deepseek_v3",
        "model.args.n_kv_heads": None,
        "model.args.n_dense_layers": 1,
        "model.args.q_lora_rank": 32,
        "model.args.kv_lora_rank": 32,
        "model.args.qk_nope_dim": 16,
        "model.args.qk_rope_dim": 16,
        "model.args.v_dim": 16,
    },
    "flux": {
        "model.args.dim": 64,
        "model.args.n_heads": 4,
        "model.args.axes_dim": "[4, 6, 6]",
        "model.args.n_double": 2,
        "model.args.n_single": 2,
        "model.args.in_channels": 192,
        "model.args.vector_dim": 16,
        "model.args.context_dim": 16,
        "model.args.zero_init": False,
        "encoder.max_t5_encoding_len": 8,
        "encoder.dtype": "float32",
        "training.img_size": 32,
        "training.local_batch_size": 8,
        "training.steps": 6,
        "lr_scheduler.warmup_steps": 2,
        "metrics.log_freq": 1,
        "checkpoint.enable": False,
        "validation.enable": False,
        "optimizer.lr": 1e-2,
    },
}
MODELS["deepseek_v3 packed"] = {**MODELS["deepseek_v3"], "model.args.attention_mask": "block_causal"}


def config(folder: Path | str, model: str, **changes: Any) -> Resolved:
    """Return the config of a tiny run; keyword `a__b=v` sets `a.b`."""
    settings = {**MODELS[model], **{key.replace("__", "."): value for key, value in changes.items()}}
    if model != "flux":
        return tiny(folder, **settings)
    settings["job.dump_folder"] = folder
    words = [(key, str(v).lower() if isinstance(v, bool) else str(v)) for key, v in settings.items() if v is not None]
    return load("flux_debug", words)


def steps(resolved: Resolved, device: str = "cuda", **options: Any) -> list[StepDone]:
    """Train in this process and return what is logged of each step."""
    found: list[StepDone] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            found.append(event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TITAN_DEVICE", device)
        train.run(resolved, listener=listen, **options)
    return found


def losses(resolved: Resolved, device: str = "cuda", **options: Any) -> list[float]:
    """Train in this process and return the loss of each step."""
    return [step.loss for step in steps(resolved, device, **options)]


@cache
def on_cpu(model: str) -> tuple[float, ...]:
    """Return the losses of the tiny run in fp32 on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        return tuple(losses(config(folder, model), "cpu"))


def assert_near(found: list[float], wanted: tuple[float, ...] | list[float], tolerance: float) -> None:
    """Assert that losses fall and are those wanted: at the first step to a tenth of the tolerance, as weights and data
    are the same, later to the tolerance, as each update adds to what rounding did."""
    assert found[0] == pytest.approx(wanted[0], rel=tolerance / 10), (found, wanted)
    assert found == pytest.approx(list(wanted), rel=tolerance), (found, wanted)
    assert found[-1] < found[0]
