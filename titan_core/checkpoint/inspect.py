"""Looking at a checkpoint from outside of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from titan_core.checkpoint.checkpointer import SHARED
from titan_core.checkpoint.manifest import read_checked, read_manifest
from titan_core.checkpoint.reader import Reader
from titan_core.checkpoint.storage import MANIFEST, open_storage
from titan_core.runtime.errors import CheckpointError


def find_step(path: str) -> str:
    """Return the step folder that a path means: itself, or the newest complete step of a checkpoint or run folder.

    Raises `CheckpointError` that says what is there instead.
    """
    path = path.rstrip("/")
    if re.search(r"(^|/)step-\d+$", path):
        root, _, folder = path.rpartition("/")
        read_manifest(open_storage(root or "."), folder)
        return path
    for place in (path, f"{path}/checkpoint"):
        steps = open_storage(place).steps()
        if steps:
            return f"{place}/step-{steps[-1]}"
    if "://" not in path and (Path(path) / MANIFEST).is_file():
        return path  # a step under another name
    if "://" not in path and not Path(path).exists():
        raise CheckpointError(f"there is nothing at `{path}`", tip="give a run folder or a step-N folder")
    raise CheckpointError(
        f"`{path}` holds no complete checkpoint",
        tip="give a run folder, its checkpoint folder, or one of its step-N folders",
    )


def read_shared(step_path: str, *, check: bool = True) -> dict[str, Any]:
    """Return the JSON state of a step: step, tokens, config, model sizes, data position."""
    storage, folder = _split(step_path)
    manifest = read_manifest(storage, folder)
    return json.loads(read_checked(storage, folder, SHARED, manifest, check))


def read_file(step_path: str, name: str) -> bytes | None:
    """Return a small file of a step, None if the step has no such file."""
    storage, folder = _split(step_path)
    manifest = read_manifest(storage, folder)
    return read_checked(storage, folder, name, manifest, True) if name in manifest.files else None


def tensor_index(step_path: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every stored tensor, from the metadata only."""
    storage, folder = _split(step_path)
    metadata = Reader(storage, folder, check=True).metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def verify(step_path: str) -> list[str]:
    """Read everything, check every hash, look for numbers that are not finite; return the problems."""
    storage, folder = _split(step_path)
    problems = []
    reader = Reader(storage, folder, check=True)
    for name in reader.manifest.files:
        try:
            read_checked(storage, folder, name, reader.manifest, True)
        except CheckpointError as error:
            problems.append(str(error))
    names = {(info.relative_path, info.offset): index.fqn for index, info in reader.metadata.storage_data.items()}
    for file, pieces in reader.manifest.pieces.items():
        for offset, length, _ in pieces:
            try:
                tensor = reader.read_piece(file, offset, length)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if tensor.is_floating_point() and not tensor.isfinite().all():
                problems.append(f"`{names.get((file, offset), file)}` has numbers that are not finite")
    return problems


def _split(step_path: str) -> tuple[Any, str]:
    root, _, folder = step_path.rstrip("/").rpartition("/")
    return open_storage(root or "."), folder
