"""Small training runs for tests: a tiny Llama on the embedded text, in this process or on forked ranks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from tests.ranks import apart, run_ranks
from titan_core.config.load import Resolved, load
from titan_core.jobs import train
from titan_core.runtime import distributed
from titan_core.runtime.events import Event, StepDone

TINY = {
    "model.args.dim": "32",
    "model.args.n_layers": "2",
    "model.args.n_heads": "4",
    "model.args.n_kv_heads": "2",
    "model.args.ffn_dim": "48",
    "training.seq_len": "32",
    "training.local_batch_size": "4",
    "training.global_batch_size": "8",
    "training.mixed_precision_param": "float32",
    "training.steps": "6",
    "lr_scheduler.warmup_steps": "2",
    "metrics.log_freq": "1",
    "checkpoint.enable": "false",
    "validation.enable": "false",
    "optimizer.lr": "1e-2",
}


def tiny(folder: Path | str, **changes: Any) -> Resolved:
    """Return a config of the tiny run; keyword `a__b=v` sets `a.b`, and with None leaves out what the tiny run sets."""
    settings = {**TINY, "job.dump_folder": str(folder)}
    settings.update({key.replace("__", "."): value for key, value in changes.items()})
    if settings.get("compile.enable"):
        importlib.import_module("torch._inductor.compile_fx")  # once here instead of in each rank: a second
    words = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in settings.items()}
    return load("llama3_debugmodel", [(key, words[key]) for key, value in settings.items() if value is not None])


def losses(resolved: Resolved, ranks: int = 1, **options: Any) -> list[float]:
    """Train and return the loss of every step; all ranks must report the same."""
    if ranks == 1 and resolved.config.compile.enable:
        return apart(_train, resolved, options, timeout=300)  # the compiler computes with fake tensors
    if ranks == 1:
        return _train(resolved, options)
    everyone = run_ranks(_train, ranks, resolved, options)
    assert all(one == everyone[0] for one in everyone)
    return everyone[0]


def _train(resolved: Resolved, options: dict[str, Any]) -> list[float]:
    found: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            found.append(event.loss)

    train.run(resolved, listener=listen, **options)
    if distributed.ranks_from_environment()[1] > 1 and not found:
        return _from_main(resolved)
    return found


def _from_main(resolved: Resolved) -> list[float]:
    """Read what the main rank logged: only that one has a listener."""
    import json

    path = Path(resolved.config.job.dump_folder) / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    start = max(i for i, r in enumerate(records) if r["event"] in ("started", "resumed"))
    return [record["loss"] for record in records[start:] if record["event"] == "stepdone"]


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Are two tensors equal within a tolerance relative to their largest number?"""
    return (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())
