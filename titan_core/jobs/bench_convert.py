"""`titan bench convert`: a Hugging Face folder into a checkpoint, beside a copy of its files and DCP's own way."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from titan_core.interop import stream
from titan_core.interop.boxes import Index, Shape
from titan_core.interop.mapping import work_out
from titan_core.interop.safetensors_writer import SafetensorsSink
from titan_core.jobs.export_files import hf_files
from titan_core.jobs.foreign import Opened, weights_of
from titan_core.models import family
from titan_core.runtime.errors import RunFailed
from titan_core.runtime.events import Listener, Note, silent

_MODEL = {"dim": 2048, "n_heads": 32, "n_kv_heads": 8, "ffn_dim": 8192, "vocab_size": 32000}
_LAYER_GB, _EMBEDDING_GB = 0.122, 0.262  # in bf16, of that model
_SHARDS = 12
# A hypervisor takes freed memory back after a moment: who runs at once would gain.
_SETTLE_SECONDS = 3.0


@dataclass(frozen=True)
class ConvertRow:
    """Medians over the rounds; CPU seconds are those of user and system together."""

    name: str
    wall_seconds: float
    cpu_seconds: float
    peak_gigabytes: float
    gigabytes_per_cpu_second: float


def run(
    *, gigabytes: float = 1.0, rounds: int = 3, folder: str | None = None, listener: Listener = silent
) -> list[ConvertRow]:
    """Copy and convert the same files in turn, each in a process of its own, the source in the page cache.

    `cp` does not wait for the disk, `cp+sync` does, and neither checks anything; titan does both.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="titan-bench-") as place:
        source, target = Path(place) / "source", Path(place) / "target"
        size = _write_source(source, gigabytes)
        dcp = Path(__file__).parent / "peers" / "dcp_converter.py"
        words = {
            "cp": ["cp", "-r"],
            "cp+sync": ["sh", "-c", 'cp -r "$1" "$2" && sync', "sh"],
            "dcp": [sys.executable, str(dcp)],
            "titan": [sys.executable, "-m", "titan_cli", "--quiet", "convert", "hf-to-dcp"],
        }
        taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in words}
        for number in range(rounds + 1):  # the first is warm-up
            order = list(words.items())
            for name, command in order if number % 2 else reversed(order):
                listener(Note(f"round {number}/{rounds}: {name}"))
                taken[name].append(_measure([*command, str(source), str(target)]))
                shutil.rmtree(target)
                os.sync()
                time.sleep(_SETTLE_SECONDS)
    medians = {n: [statistics.median(column) for column in zip(*rows[1:], strict=True)] for n, rows in taken.items()}
    return [ConvertRow(name, wall, cpu, peak, size / 1e9 / cpu) for name, (wall, cpu, peak) in medians.items()]


class _Random:
    """A source of the same random numbers for every tensor of its index."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._numbers = torch.randn(1 << 20).bfloat16()

    def read(self, name: str, start: Shape, size: Shape) -> Tensor:
        numel = torch.Size(size).numel()
        return self._numbers.repeat(-(-numel // self._numbers.numel()))[:numel].reshape(size)

    def locate(self, name: str, start: Shape, size: Shape) -> None:
        """Return None: the numbers are in no file."""


def _write_source(folder: Path, gigabytes: float) -> int:
    """Write a Llama of about that size under Hugging Face's names; returns the bytes of its tensors."""
    llama = family("llama3")
    layers = max(1, round((gigabytes - _EMBEDDING_GB) / _LAYER_GB))
    sizes = llama.sizes("debugmodel", **_MODEL, n_layers=layers, tied=False)
    mapping = work_out(weights_of(llama).rules(sizes), llama.parameters(sizes))
    source = _Random({name: (shape, torch.bfloat16) for name, shape in mapping.their_shapes.items()})
    files = hf_files(Opened("hf", str(folder), source, family=llama, sizes=sizes), source.index, None)
    folder.mkdir()
    limit = stream.slab_limit(1 << 30)
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in source.index.values())
    sink = SafetensorsSink(folder, source.index, slab=limit, max_shard=total // _SHARDS, files=files)
    sink.prepare()
    records: dict[int, dict[str, object]] = {}
    done = lambda job, record: records.update({job.number: record})  # noqa: E731
    stream.run(source, sink, sink.jobs, verify=False, done=done, progress=lambda _: None)
    sink.finish(records)
    return total


# A parent of its own: a child's peak memory is never less than its parent's was when it was started.
_PARENT = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
wall, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([wall, used.ru_utime + used.ru_stime, used.ru_maxrss]))
sys.stderr.buffer.write(done.stderr)
sys.exit(done.returncode)
"""


def _measure(command: list[str]) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and peak memory in GB of a command."""
    done = subprocess.run([sys.executable, "-S", "-c", _PARENT, *command], capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"`{' '.join(command[:3])}` failed: {' | '.join(done.stderr.strip().splitlines()[-3:])}")
    wall, cpu, peak = json.loads(done.stdout)
    return wall, cpu, peak * (1 if sys.platform == "darwin" else 1024) / 1e9
