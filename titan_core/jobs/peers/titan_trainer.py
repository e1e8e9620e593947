"""Trains the benchmark's Llama with titan's own trainer; prints one JSON line a step."""

import json
import os
import sys
import tempfile
import time

START = time.perf_counter()
import numpy as np  # noqa: E402
import torch  # noqa: E402

from titan_core.config.load import load  # noqa: E402
from titan_core.data.loader import Batch  # noqa: E402
from titan_core.runtime import distributed  # noqa: E402
from titan_core.runtime.events import Event, StepDone, silent  # noqa: E402
from titan_core.runtime.host_memory import keep_freed_memory  # noqa: E402
from titan_core.training.build import build  # noqa: E402
from titan_core.training.trainer import Trainer  # noqa: E402

job = json.loads(sys.argv[1])
batches = np.load(job["data"])


class Batches:
    """The batches in order, in place of the loader."""

    rows = 0
    wait_seconds = 0.0

    def __init__(self) -> None:
        self._left = iter(batches.astype(np.int64))

    def __next__(self) -> Batch:
        rows = torch.from_numpy(next(self._left))
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), torch.zeros(0, dtype=torch.int32))


LAST = {"cpu": time.process_time(), "wall": time.perf_counter()}


def report(event: Event) -> None:
    """Print what a step took."""
    if isinstance(event, StepDone):
        line = {
            "step": event.step,
            "loss": event.loss,
            "cpu": time.process_time() - LAST["cpu"],
            "wall": time.perf_counter() - LAST["wall"],
            "since_start": time.perf_counter() - START,
        }
        print(json.dumps(line), flush=True)
        LAST["cpu"], LAST["wall"] = time.process_time(), time.perf_counter()


with tempfile.TemporaryDirectory() as folder:
    settings = {
        "job.dump_folder": folder,
        **{f"model.args.{name}": str(size) for name, size in job["model"].items()},
        "model.args.rope_scaling": "none",
        "optimizer.lr": str(job["lr"]),
        "lr_scheduler.warmup_steps": "0",
        "lr_scheduler.decay_ratio": "0.0",
        "training.local_batch_size": str(batches.shape[1]),
        "training.seq_len": str(batches.shape[2] - 1),
        "training.steps": str(batches.shape[0]),
        "metrics.log_freq": "1",
        "checkpoint.enable": "false",
        "validation.enable": "false",
        "activation_checkpoint.mode": "none",
    }
    config = load("llama3_debugmodel", list(settings.items())).config
    keep_freed_memory()
    parts = build(config, distributed.start(device="cpu"), silent)
    with torch.no_grad():
        for name, array in np.load(job["weights"]).items():
            parts.parameters[name].copy_(torch.from_numpy(array))
    parts.loader = Batches()  # pyright: ignore[reportAttributeAccessIssue]
    LAST["cpu"], LAST["wall"] = time.process_time(), time.perf_counter()
    Trainer(parts, None, report).fit()
sys.stdout.flush()
os._exit(0)
