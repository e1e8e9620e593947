"""`titan bench train`: one training step of a small Llama on the CPU, beside other trainers, interleaved in one run.

Every trainer runs in processes of its own, several times in turn, on the same batches, in bf16 mixed precision with
fp32 weights, AdamW and clipping; what counts is the CPU time of a step, which other load on the machine hardly changes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_core.runtime.errors import RunFailed, UsageError
from titan_core.runtime.events import Listener, Note, silent

MODEL = {"vocab_size": 32000, "dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 1536}
BATCH, SEQ_LEN, LR = 4, 512, 1e-3
SCRIPTS = {
    "titan": "titan_trainer.py",
    "transformers": "transformers_trainer.py",
    "litgpt": "litgpt_pretrain.py",
    "torchtitan": "torchtitan_trainer.py",
}
NEEDS = {
    "transformers": "'transformers>=4.57,<5' accelerate torch",
    "litgpt": "litgpt==0.5.13 litdata requests torch",
    "torchtitan": "torchtitan==0.2.0 torchao 'setuptools<81' torch",
}


@dataclass
class Row:
    """What one trainer took: per step over all runs, without each run's first step."""

    name: str
    cpu_seconds: list[float] = field(default_factory=list)
    wall_seconds: list[float] = field(default_factory=list)
    first_step_seconds: list[float] = field(default_factory=list)
    peak_gigabytes: float = 0.0
    last_loss: float | None = None

    def summary(self) -> dict[str, Any]:
        """Return medians and spread."""
        return {
            "name": self.name,
            "cpu_seconds": statistics.median(self.cpu_seconds),
            "cpu_seconds_min": min(self.cpu_seconds),
            "cpu_seconds_max": max(self.cpu_seconds),
            "wall_seconds": statistics.median(self.wall_seconds),
            "first_step_seconds": statistics.median(self.first_step_seconds),
            "peak_gigabytes": self.peak_gigabytes,
            "last_loss": self.last_loss,
        }


def run(peers: dict[str, str], *, steps: int = 5, rounds: int = 2, listener: Listener = silent) -> list[dict[str, Any]]:
    """Run titan and `peers` (name -> Python of an environment that has it) in turn, and return a summary of each."""
    for name, python in peers.items():
        if name not in SCRIPTS:
            raise UsageError(f"no peer `{name}`", tip="one of " + ", ".join(list(SCRIPTS)[1:]))
        if not Path(python).exists():
            tip = f"python3 -m venv DIR && DIR/bin/pip install {NEEDS[name]}, then --peer {name}=DIR/bin/python"
            raise UsageError(f"no Python at `{python}`", where=f"--peer {name}", tip=tip)
    runners = {"titan": sys.executable, **peers}
    rows = {name: Row(name) for name in runners}
    with tempfile.TemporaryDirectory() as folder:
        data = _write_batches(Path(folder), steps)
        weights = _write_weights(Path(folder))
        for number in range(rounds):
            order = list(runners.items())
            for name, python in order if number % 2 == 0 else reversed(order):
                listener(Note(f"round {number + 1}/{rounds}: {name}"))
                _measure(rows[name], python, data, weights)
    return [row.summary() for row in rows.values()]


def _write_batches(folder: Path, steps: int) -> str:
    """Write the rows that all trainers read: the embedded text, in titan's tokens, as (steps, batch, length + 1)."""
    import numpy as np

    from titan_core.data import embedded
    from titan_core.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("")
    needed = steps * BATCH * (SEQ_LEN + 1)
    ids: list[int] = []
    for path in embedded.files("train"):
        ids += tokenizer.encode(embedded.text(path), add_bos=True, add_eos=True)
        if len(ids) >= needed:
            break
    path = folder / "batches.npy"
    np.save(path, np.asarray(ids[:needed], dtype=np.int32).reshape(steps, BATCH, SEQ_LEN + 1))
    return str(path)


def _write_weights(folder: Path) -> str:
    """Write the initial weights that all trainers start from, by titan's names, query and key rows in pairs."""
    import numpy as np
    import torch

    from titan_core.models import family
    from titan_core.parallel.materialise import materialise

    llama = family("llama3")
    sizes = llama.sizes("debugmodel", **MODEL, rope_scaling=None, max_seq_len=SEQ_LEN)
    with torch.device("meta"):
        model = llama.build(sizes)
    materialise(model, llama.parameters(sizes), 0, torch.device("cpu"))
    path = folder / "weights.npz"
    arrays: dict[str, Any] = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    np.savez(path, **arrays)
    return str(path)


def _measure(row: Row, python: str, data: str, weights: str) -> None:
    script = Path(__file__).parent / "peers" / SCRIPTS[row.name]
    job = json.dumps({"data": data, "weights": weights, "model": MODEL, "lr": LR})
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    done, peak = _run_child([python, str(script), job], env)
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    timed = [record for record in records if "cpu" in record]
    if done.returncode or len(timed) < 2:
        last = " | ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        raise RunFailed(f"{row.name} did not run: {last}", where=python, tip=_tip(row.name))
    row.cpu_seconds += [record["cpu"] for record in timed[1:]]
    row.wall_seconds += [record["wall"] for record in timed[1:]]
    row.first_step_seconds.append(timed[0]["wall"])
    row.peak_gigabytes = max(row.peak_gigabytes, peak)
    losses = [record["loss"] for record in records if "loss" in record]
    row.last_loss = losses[-1] if losses else None


def _run_child(words: Sequence[str], env: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a child under a parent of its own, whose accounting gives the child's peak memory in GB."""
    code = (
        "import resource, subprocess, sys; c = subprocess.run(sys.argv[1:]).returncode; "
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(c)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=env)
    peaks = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("peak ")]
    unit = 1 if sys.platform == "darwin" else 1024
    return done, float(peaks[-1]) * unit / 1e9 if peaks else 0.0


def _tip(name: str) -> str | None:
    return f"it needs: pip install {NEEDS[name]}" if name in NEEDS else None
