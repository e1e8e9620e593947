"""Checkpoints: DCP files of tensors, JSON beside them, hashes over all, and a commit that is all or nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_core.checkpoint.checkpointer import Checkpointer, Loaded
    from titan_core.checkpoint.inspect import find_step, read_shared, tensor_index, verify
    from titan_core.checkpoint.reader import load_tensors
    from titan_core.checkpoint.saving import Snapshot

_WHERE = {
    "Checkpointer": "checkpointer",
    "Loaded": "checkpointer",
    "Snapshot": "saving",
    "find_step": "inspect",
    "read_shared": "inspect",
    "tensor_index": "inspect",
    "verify": "inspect",
    "load_tensors": "reader",
}
__all__ = [
    "Checkpointer",
    "Loaded",
    "Snapshot",
    "find_step",
    "load_tensors",
    "read_shared",
    "tensor_index",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"titan_core.checkpoint.{_WHERE[name]}"), name)
