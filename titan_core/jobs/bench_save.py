"""`titan bench save`: how long a background save keeps the training thread from its work, beside torch's own."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from titan_core.checkpoint import Checkpointer, Snapshot
from titan_core.config.schema import Checkpoint
from titan_core.jobs.bench_train import MODEL
from titan_core.models import family


@dataclass(frozen=True)
class SaveRow:
    """Seconds, medians: the call itself, the wait before the next update of the weights, the whole save."""

    name: str
    call_seconds: float
    wait_seconds: float
    total_seconds: float


def run(*, rounds: int = 3, work_seconds: float = 1.0) -> list[SaveRow]:
    """Save the full state of a 58M-parameter Llama in turn with `dcp.async_save` and with titan.

    Between the call and the update the thread computes for `work_seconds`, as forward and backward would; what the save
    takes from that time is not counted, what it makes the thread wait is.
    """
    state = _state()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    taken: dict[str, list[tuple[float, float, float]]] = {"dcp.async_save": [], "titan": []}
    with tempfile.TemporaryDirectory() as folder:
        config = Checkpoint(async_mode="async", keep_latest_k=1)
        checkpointer = Checkpointer(str(Path(folder) / "titan"), config)
        for number in range(rounds + 1):  # the first of each is warm-up
            taken["dcp.async_save"].append(_torch(state, Path(folder) / f"dcp-{number}", work_seconds))
            taken["titan"].append(_titan(checkpointer, state, number + 1, work_seconds))
    dist.destroy_process_group()
    return [
        SaveRow(name, *(statistics.median(column) for column in zip(*times[1:], strict=True)))
        for name, times in taken.items()
    ]


def _state() -> dict[str, Tensor]:
    llama = family("llama3")
    sizes = llama.sizes("debugmodel", **MODEL)
    names = {p.name: p.shape for p in llama.parameters(sizes)}
    kinds = ("", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
    return {f"{kind}{name}": torch.randn(shape) for kind in kinds for name, shape in names.items()}


def _torch(state: dict[str, Tensor], folder: Path, work_seconds: float) -> tuple[float, float, float]:
    began = time.perf_counter()
    future = dcp.async_save(dict(state), checkpoint_id=str(folder))
    called = time.perf_counter() - began
    _compute(work_seconds)
    result = getattr(future, "result", None)  # from torch 2.9 it may be a pair of futures
    (result or future.upload_completion.result)()  # pyright: ignore[reportAttributeAccessIssue]
    return called, 0.0, time.perf_counter() - began


def _titan(
    checkpointer: Checkpointer, state: dict[str, Tensor], step: int, work_seconds: float
) -> tuple[float, float, float]:
    began = time.perf_counter()
    checkpointer.save(step, Snapshot(state, {"step": step}, {}), blocking=False)
    called = time.perf_counter() - began
    _compute(work_seconds)
    before = time.perf_counter()
    checkpointer.wait_staged()
    waited = time.perf_counter() - before
    checkpointer.finish()
    return called, waited, time.perf_counter() - began


def _compute(seconds: float) -> None:
    """Multiply matrices, as a step would."""
    a = torch.randn(512, 512)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        a.mm(a)
