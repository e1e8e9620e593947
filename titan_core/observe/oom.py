"""Out of memory: leave a snapshot, say what happened and what would help."""

from __future__ import annotations

import contextlib
import json
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from titan_core.config.schema import Config
from titan_core.observe.memory import live_tensors, write_snapshot
from titan_core.runtime.errors import RunFailed

GIB = 1 << 30
# Allocators that do not raise torch.OutOfMemoryError: torch's on a CPU, the CUDA driver, and its libraries
_SIGNS = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
_UNITS = {"bytes": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB, "TiB": 1 << 40}


@contextlib.contextmanager
def explain_out_of_memory(config: Config, rank: int, *, images: bool = False) -> Iterator[None]:
    """Turn an out-of-memory error of the block into a `RunFailed` with a report; never swallows it.

    `images` says that samples have a size in pixels, not a length in tokens.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _report(config, rank, error, images) from error
    except RuntimeError as error:
        if any(sign in str(error) for sign in _SIGNS):
            raise _report(config, rank, error, images) from error
        raise


def _report(config: Config, rank: int, error: BaseException, images: bool) -> RunFailed:
    on_host = isinstance(error, MemoryError) or "CPUAllocator" in str(error)
    on_gpu = not on_host and torch.cuda.is_available() and torch.cuda.is_initialized()
    where = _snapshot(config, rank, error, on_gpu)
    message = f"rank {rank} is out of memory{_place(error)}: {_asked(error)}; {_held(on_gpu)}"
    return RunFailed(message, where=where, tip="cheaper: " + "; ".join(_cheaper(config, on_gpu, images)[:3]))


def _snapshot(config: Config, rank: int, error: BaseException, on_gpu: bool) -> str:
    """Write what lies in memory and return where, or why it could not be written."""
    folder = Path(config.job.dump_folder) / config.profiling.save_memory_snapshot_folder
    path = folder / f"out-of-memory-rank{rank}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"error": str(error), "tensors": live_tensors()}, indent=1))
        if on_gpu:
            write_snapshot(folder / "out-of-memory", rank, torch.device("cuda"))
    except OSError as failed:
        return f"the snapshot could not be written: {failed.strerror}"
    return str(path)


def _place(error: BaseException) -> str:
    """Name the innermost of our own lines that the error passed through."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "titan_core" in Path(f.filename).parts]
    ours = [frame for frame in ours if Path(frame.filename) != Path(__file__)]
    if not ours:
        return ""
    parts = Path(ours[-1].filename).parts
    return f" in {ours[-1].name} ({'/'.join(parts[parts.index('titan_core') :])}:{ours[-1].lineno})"


def _asked(error: BaseException) -> str:
    found = re.search(r"tried to allocate ([\d.]+) ?([KMGT]iB|bytes|B)\b", str(error), re.IGNORECASE)
    if found is None or found[2] not in _UNITS:
        return str(error).strip().split("\n")[0] or type(error).__name__
    return f"it asked for {float(found[1]) * _UNITS[found[2]] / GIB:.2f} GiB more"


def _held(on_gpu: bool) -> str:
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        tensors = torch.cuda.memory_allocated() / GIB
        return f"tensors hold {tensors:.2f} GiB, {free / GIB:.2f} of {total / GIB:.2f} GiB are free"
    memory = psutil.virtual_memory()
    resident = psutil.Process().memory_info().rss / GIB
    return f"it holds {resident:.2f} GiB, {memory.available / GIB:.2f} of {memory.total / GIB:.2f} GiB are free"


def _cheaper(config: Config, on_gpu: bool, images: bool) -> list[str]:
    """List settings that need less, those that do not change the result first."""
    training = config.training
    size = training.local_batch_size
    ways = []
    if size > 1:  # a divisor, so that the global batch still divides
        ways.append(f"--training.local_batch_size {max(n for n in range(1, size) if size % n == 0)}")
    if config.activation_checkpoint.mode != "full":
        ways.append("--activation_checkpoint.mode full")
    ways.append("more ranks, over which FSDP shards")
    if on_gpu and not training.enable_cpu_offload:
        ways.append("--training.enable_cpu_offload")
    if images:
        ways.append(f"--training.img_size {training.img_size // 2}")
    elif training.seq_len > 512:
        ways.append(f"--training.seq_len {training.seq_len // 2}")
    return ways
