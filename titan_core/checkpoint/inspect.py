"""Looking at a checkpoint from outside of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from titan_core.checkpoint.agreement import explain
from titan_core.checkpoint.manifest import read_checked, read_json, read_manifest
from titan_core.checkpoint.places import open_storage, split
from titan_core.checkpoint.reader import Reader
from titan_core.checkpoint.saving import SHARED
from titan_core.checkpoint.storage import MANIFEST
from titan_core.runtime.errors import CheckpointError


def find_step(path: str) -> str:
    """Return the step folder that a path means: itself, or the newest complete step of a checkpoint or run folder.

    Raises `CheckpointError` that says what is there instead.
    """
    path = path.rstrip("/")
    local = "://" not in path
    if local and (Path(path) / MANIFEST).is_file():
        return path
    if re.search(r"(^|/)step-\d+$", path) and (not local or Path(path).exists()):
        read_manifest(*split(path))
        return path
    for place in (path, f"{path}/checkpoint"):
        steps = _steps(place)
        if steps:
            return f"{place}/step-{steps[-1]}"
    if local and not Path(path).exists():
        beside = _steps(str(Path(path).parent))[-8:]
        tip = (
            f"complete steps there: {', '.join(map(str, beside))}" if beside else "give a run folder or a step-N folder"
        )
        raise CheckpointError(f"there is nothing at `{path}`", tip=tip)
    raise CheckpointError(
        f"`{path}` holds no complete checkpoint",
        tip="give a run folder, its checkpoint folder, or one of its step-N folders",
    )


def _steps(place: str) -> list[int]:
    storage = open_storage(place)
    try:
        return storage.steps()
    except storage.errors as error:
        raise explain(error, place) from error


def read_shared(step_path: str, *, check: bool = True) -> dict[str, Any]:
    """Return the JSON state of a step: step, tokens, config, model sizes, data position."""
    storage, folder = split(step_path)
    manifest = read_manifest(storage, folder)
    return read_json(storage, folder, SHARED, manifest, check)


def read_file(step_path: str, name: str) -> bytes | None:
    """Return a small file of a step, None if the step has no such file."""
    storage, folder = split(step_path)
    manifest = read_manifest(storage, folder)
    return read_checked(storage, folder, name, manifest, True) if name in manifest.files else None


def tensor_index(step_path: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every stored tensor, from the metadata only."""
    storage, folder = split(step_path)
    metadata = Reader(storage, folder, check=True).metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def verify(step_path: str) -> list[str]:
    """Read everything, check every size and hash, look for numbers that are not finite; return the problems."""
    storage, folder = split(step_path)
    try:
        reader = Reader(storage, folder, check=True)
    except CheckpointError as error:
        return [str(error)]
    problems = _tensors_without_a_hash(reader)
    for name, size in reader.manifest.sizes().items():
        try:
            if name in reader.manifest.files:
                read_checked(storage, folder, name, reader.manifest, True)
            elif (found := storage.size(f"{folder}/{name}")) not in (size, None):
                problems.append(f"`{name}` has {found} bytes, the manifest says {size}")
        except CheckpointError as error:
            problems.append(str(error))
    names = {(info.relative_path, info.offset): index.fqn for index, info in reader.metadata.storage_data.items()}
    for name in reader.manifest.pieces:
        problems += _problems_of_pieces(reader, name, names)
    return problems


def _tensors_without_a_hash(reader: Reader) -> list[str]:
    """Return what the metadata points to and the manifest does not know."""
    pieces = reader.manifest.pieces
    entries = reader.metadata.storage_data.items()
    lost = [index.fqn for index, info in entries if info.offset not in pieces.get(info.relative_path, {})]
    return [f"the manifest does not know where `{name}` lies" for name in lost]


def _problems_of_pieces(reader: Reader, file_name: str, names: dict[tuple[str, int], str]) -> list[str]:
    """Read every tensor of a data file."""
    problems = []
    try:
        with reader.open(file_name) as file:
            for offset, (length, _) in reader.manifest.pieces[file_name].items():
                name = names.get((file_name, offset), file_name)
                try:
                    tensor = reader.read_piece(file, file_name, offset, length)
                except CheckpointError as error:
                    problems.append(f"`{name}`: {error}")
                    continue
                if tensor.is_floating_point() and not tensor.float().isfinite().all():
                    problems.append(f"`{name}` has numbers that are not finite")
    except CheckpointError as error:  # the file itself
        problems.append(str(error))
    return problems
