"""Out of memory: leave a snapshot, say what happened and what would help."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from titan_core.config.schema import Config
from titan_core.observe.memory import live_tensors
from titan_core.runtime.errors import RunFailed

_CPU_SIGNS = ("can't allocate memory", "not enough memory")


@contextlib.contextmanager
def explain_out_of_memory(config: Config, rank: int) -> Iterator[None]:
    """Turn an out-of-memory error of the block into a `RunFailed` with a report; never swallows it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _report(config, rank, error) from error
    except RuntimeError as error:
        if any(sign in str(error) for sign in _CPU_SIGNS):
            raise _report(config, rank, error) from error
        raise


def _report(config: Config, rank: int, error: BaseException) -> RunFailed:
    folder = Path(config.job.dump_folder) / config.profiling.save_memory_snapshot_folder
    path = folder / f"out-of-memory-rank{rank}.json"
    where = str(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"error": str(error), "tensors": live_tensors()}, indent=1))
    except OSError as failed:
        where = f"the snapshot could not be written: {failed.strerror}"
    training = config.training
    cheaper = []
    if training.local_batch_size > 1:
        cheaper.append(f"--training.local_batch_size {training.local_batch_size // 2}")
    if config.activation_checkpoint.mode != "full":
        cheaper.append("--activation_checkpoint.mode full")
    if training.seq_len > 512:
        cheaper.append(f"--training.seq_len {training.seq_len // 2}")
    cheaper.append("more ranks (--nproc), over which FSDP shards")
    first = str(error).strip().split("\n")[0] or type(error).__name__
    return RunFailed(f"rank {rank} is out of memory: {first}", where=where, tip="cheaper: " + "; ".join(cheaper[:3]))
