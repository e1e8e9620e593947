"""The manifest: every file of a step with its size and hash, and every stored tensor piece with its own.

The pieces of a data file follow one another without gaps, so a rank that reads a piece can check just that piece, and a
full check of all pieces is a check of the file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from titan_core.checkpoint.storage import MANIFEST, Storage
from titan_core.runtime.errors import CheckpointError

VERSION = 1


def content_hash(data: bytes | memoryview) -> str:
    """Return the hash that manifests hold: the first 128 bits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:32]


@dataclass
class Manifest:
    """`files`: name -> (size, hash) of whole files; `pieces`: data file -> [(offset, length, hash)]."""

    step: int
    world_size: int
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    pieces: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)

    def piece(self, file: str, offset: int) -> tuple[int, str] | None:
        """Return (length, hash) of the piece at an offset."""
        for start, length, digest in self.pieces.get(file, ()):
            if start == offset:
                return length, digest
        return None

    @property
    def num_bytes(self) -> int:
        """Bytes of the step."""
        pieces = sum(length for pieces in self.pieces.values() for _, length, _ in pieces)
        return pieces + sum(size for size, _ in self.files.values())

    def to_json(self) -> bytes:
        """Write as JSON."""
        return json.dumps({"version": VERSION, **vars(self)}, indent=1).encode()


def read_manifest(storage: Storage, step_path: str) -> Manifest:
    """Read the manifest of a step; raises `CheckpointError` if it is missing or not one."""
    where = f"{storage.root}/{step_path}/{MANIFEST}"
    try:
        with storage.open(f"{step_path}/{MANIFEST}", "rb") as file:
            tree: dict[str, Any] = json.loads(file.read())
        if tree["version"] != VERSION:
            raise CheckpointError(
                f"this manifest has version {tree['version']}, this titan reads {VERSION}",
                where=where,
            )
        return Manifest(
            step=int(tree["step"]),
            world_size=int(tree["world_size"]),
            metrics=dict(tree["metrics"]),
            files={name: (int(size), str(digest)) for name, (size, digest) in tree["files"].items()},
            pieces={
                name: [(int(start), int(length), str(digest)) for start, length, digest in pieces]
                for name, pieces in tree["pieces"].items()
            },
        )
    except FileNotFoundError:
        tip = "it was not written to the end, or it is not a titan checkpoint"
        raise CheckpointError("the checkpoint has no manifest", where=where, tip=tip) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the manifest cannot be read: {error}", where=where) from error


def read_checked(storage: Storage, step_path: str, name: str, manifest: Manifest, check: bool) -> bytes:
    """Return a whole file of a step, checked against the manifest. Raises `CheckpointError`."""
    where = f"{storage.root}/{step_path}/{name}"
    try:
        with storage.open(f"{step_path}/{name}", "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise CheckpointError("a file of the checkpoint is missing", where=where) from None
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror or error}", where=where) from error
    if check and name in manifest.files:
        size, digest = manifest.files[name]
        if len(data) != size:
            message = f"the file has {len(data)} bytes, the manifest says {size}: it is truncated"
            raise CheckpointError(message, where=where)
        if content_hash(data) != digest:
            raise CheckpointError("the file's hash is not the manifest's: it is damaged", where=where)
    return data
