"""The manifest: every file of a step with its size and hash, and every stored tensor piece with its own.

The pieces of a data file follow one another without gaps, so a rank that reads a piece can check just that piece, and a
full check of all pieces is a check of the file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import xxhash

from titan_core.checkpoint.storage import MANIFEST, Storage
from titan_core.runtime.errors import CheckpointError

VERSION = 2
# What parsing damaged or hostile JSON raises: nested too deep, or an infinity where an integer should be, too.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


def new_hash(version: int = VERSION) -> Any:
    """Return an empty hash of the kind that manifests of a version hold, of which the first 128 bits count.

    It finds damage and keeps off nobody who can write the manifest too, so it need not be cryptographic: XXH3 takes
    50 GB/s on one core where SHA-256 takes 1.4, which was a third of a conversion's CPU time. Version 1 had SHA-256.
    """
    return hashlib.sha256() if version == 1 else xxhash.xxh3_128()


def content_hash(data: bytes | memoryview, version: int = VERSION) -> str:
    """Return the hash of bytes that a manifest of a version holds."""
    digest = new_hash(version)
    digest.update(data)
    return digest.hexdigest()[:32]


@dataclass
class Manifest:
    """`files`: name -> (size, hash) of whole files; `pieces`: data file -> offset -> (length, hash)."""

    step: int
    world_size: int
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    pieces: dict[str, dict[int, tuple[int, str]]] = field(default_factory=dict)
    version: int = VERSION

    def sizes(self) -> dict[str, int]:
        """Return the bytes that every file of the step must have."""
        data = {name: sum(length for length, _ in pieces.values()) for name, pieces in self.pieces.items()}
        return data | {name: size for name, (size, _) in self.files.items()}

    def to_json(self) -> bytes:
        """Write as JSON, with a hash of itself."""
        pieces = {name: [(start, *rest) for start, rest in found.items()] for name, found in self.pieces.items()}
        tree = {**vars(self), "pieces": pieces}
        return _dump({**tree, "hash": content_hash(_dump(tree), self.version)})


def read_manifest(storage: Storage, step_path: str) -> Manifest:
    """Read the manifest of a step; raises `CheckpointError` if it is missing, damaged or not one."""
    where = f"{storage.root}/{step_path}/{MANIFEST}"
    try:
        with storage.open(f"{step_path}/{MANIFEST}", "rb") as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError):
        tip = "it was not written to the end, or it is not a titan checkpoint"
        raise CheckpointError("the checkpoint has no manifest", where=where, tip=tip) from None
    except storage.errors as error:
        raise CheckpointError(f"cannot read: {reason(error)}", where=where) from error
    try:
        return _parse(json.loads(data), where)
    except _MALFORMED as error:
        raise CheckpointError(f"the manifest is damaged: {error}", where=where) from error


def read_checked(storage: Storage, step_path: str, name: str, manifest: Manifest, check: bool) -> bytes:
    """Return a whole file of a step, checked against the manifest. Raises `CheckpointError`."""
    where = f"{storage.root}/{step_path}/{name}"
    try:
        with storage.open(f"{step_path}/{name}", "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise CheckpointError("a file of the checkpoint is missing", where=where) from None
    except storage.errors as error:
        raise CheckpointError(f"cannot read: {reason(error)}", where=where) from error
    if not check:
        return data
    if name not in manifest.files:
        raise CheckpointError("the manifest does not know this file", where=where)
    size, digest = manifest.files[name]
    if len(data) != size:
        message = f"the file has {len(data)} bytes, the manifest says {size}"
        raise CheckpointError(message + (": it is truncated" if len(data) < size else ""), where=where)
    if content_hash(data, manifest.version) != digest:
        raise CheckpointError("the file's hash is not the manifest's: it is damaged", where=where)
    return data


def read_json(storage: Storage, step_path: str, name: str, manifest: Manifest, check: bool) -> dict[str, Any]:
    """Return a JSON file of a step, checked. Raises `CheckpointError`."""
    data = read_checked(storage, step_path, name, manifest, check)
    where = f"{storage.root}/{step_path}/{name}"
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {error}", where=where) from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"not a JSON object but a {type(tree).__name__}", where=where)
    return tree


def reason(error: Exception) -> str:
    """Return what a failed read or write says of itself."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _parse(tree: dict[str, Any], where: str) -> Manifest:
    version = tree["version"]
    if version not in range(1, VERSION + 1):
        message = f"this manifest has version {version}, this titan reads 1 to {VERSION}"
        raise CheckpointError(message, where=where, tip="read it with the titan that wrote it")
    digest = tree.pop("hash")
    if digest != content_hash(_dump(tree), version):
        raise CheckpointError("the manifest does not have its own hash: it is damaged", where=where)
    for name in (*tree["files"], *tree["pieces"]):
        _refuse_outside(name, where)
    return Manifest(
        step=int(tree["step"]),
        world_size=int(tree["world_size"]),
        metrics=dict(tree["metrics"]),
        files={name: (int(size), str(digest)) for name, (size, digest) in tree["files"].items()},
        pieces={
            name: {int(start): (int(length), str(digest)) for start, length, digest in pieces}
            for name, pieces in tree["pieces"].items()
        },
        version=version,
    )


def _refuse_outside(name: str, where: str) -> None:
    """Raise `CheckpointError` for a name that leads out of the step's folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        message = f"the manifest names `{name}`, which lies outside of the checkpoint: refused"
        raise CheckpointError(message, where=where, tip="do not trust this checkpoint")


def _dump(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
