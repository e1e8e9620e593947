"""What lies in memory: the allocator's history on a GPU, live tensors by size anywhere."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

_LARGEST = 200
_MAX_ENTRIES = 100_000
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def live_tensors() -> dict[str, Any]:
    """Return the process's resident bytes and its largest live tensors: shape, dtype, device, bytes, how many.

    It sees the tensors that Python knows, and gradients; not what only autograd holds.
    """
    groups: dict[tuple[str, str, str], list[int]] = {}
    seen: set[int] = set()
    for tensor in _tensors():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        key = (str(tuple(tensor.shape)), str(tensor.dtype), str(tensor.device))
        groups.setdefault(key, []).append(storage.nbytes())
    rows = [
        {"shape": shape, "dtype": dtype, "device": device, "count": len(sizes), "bytes": sum(sizes)}
        for (shape, dtype, device), sizes in groups.items()
    ]
    rows.sort(key=lambda row: -row["bytes"])
    return {
        "resident_bytes": psutil.Process().memory_info().rss,
        "tensor_bytes": sum(row["bytes"] for row in rows),
        "largest": rows[:_LARGEST],
    }


def _tensors() -> Iterator[torch.Tensor]:
    """Yield plain dense tensors; a DTensor or another subclass holds its numbers in one of these."""
    for item in gc.get_objects():
        if type(item) not in _PLAIN:
            continue
        for tensor in (item, item.grad if item.is_leaf else None):
            if tensor is not None and type(tensor) in _PLAIN and tensor.layout == torch.strided:
                yield tensor


def start_history(device: torch.device) -> None:
    """Make a GPU's allocator record what it does."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES)


def stop_history(device: torch.device) -> None:
    """Make it stop."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(enabled=None)


def write_snapshot(folder: Path, rank: int, device: torch.device) -> Path:
    """Write a snapshot: a pickle for pytorch.org/memory_viz on a GPU, JSON of live tensors on a CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    if device.type == "cuda":
        path = folder / f"rank{rank}_memory_snapshot.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
    else:
        path = folder / f"rank{rank}_memory_snapshot.json"
        path.write_text(json.dumps(live_tensors(), indent=1))
    return path
