"""One save: every rank writes its part aside, all agree that it is there, and the main rank commits."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from titan_core.checkpoint.agreement import Ranks
from titan_core.checkpoint.manifest import Manifest
from titan_core.checkpoint.reader import quiet_dcp
from titan_core.checkpoint.storage import MANIFEST, Storage
from titan_core.checkpoint.writer import Writer
from titan_core.runtime.errors import CheckpointError

SHARED = "shared.json"


def rank_file(rank: int) -> str:
    """Return the name of a rank's own JSON in a step."""
    return f"ranks/{rank}.json"


@dataclass(frozen=True)
class Snapshot:
    """What is saved: tensors by their DCP names; JSON that is the same on every rank; JSON of this rank; and small
    files that belong to the step (name -> content), from the main rank."""

    tensors: dict[str, Tensor]
    shared: dict[str, Any]
    own: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)

    def texts(self, rank: int) -> dict[str, bytes]:
        """Return the files that this rank writes besides its tensors."""
        own = {rank_file(rank): json.dumps(self.own).encode()}
        return own if rank else {**own, SHARED: json.dumps(self.shared).encode(), **self.files}


def write_step(
    storage: Storage,
    ranks: Ranks,
    step: int,
    tensors: Mapping[str, Tensor],
    texts: Mapping[str, bytes],
    metrics: Mapping[str, float],
) -> Manifest:
    """Write a step and commit it; returns the manifest (whole on the main rank only).

    If anything fails on any rank, every rank raises the same `CheckpointError`, and nothing of the step is left.
    """
    root = storage.root
    try:
        ranks.agree(lambda: storage.begin(step) if ranks.is_main else None, root)
        writer = Writer(storage, storage.pending(step), ranks.rank)
        ranks.agree(lambda: _write_tensors(writer, tensors, ranks), root)
        ranks.agree(lambda: _write_texts(writer, texts), root)
        manifest = Manifest(step, ranks.size, dict(metrics))
        for pieces, files in ranks.gather_to_main((writer.pieces, writer.files), root):
            manifest.pieces.update(pieces)
            manifest.files.update(files)
        ranks.agree(lambda: commit(writer, manifest) if ranks.is_main else None, root)
    except Exception:
        if ranks.is_main:
            with contextlib.suppress(*storage.errors):  # what failed first is what the user must know
                storage.abandon(step)
        raise
    return manifest


def _write_tensors(writer: Writer, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Let DCP plan who writes what and write it; it tells every rank which one failed."""
    try:
        with quiet_dcp():
            dcp.save(dict(tensors), storage_writer=writer, process_group=ranks.group, no_dist=ranks.size == 1)
    except dcp.api.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            raise cause from None
        message = f"saving failed on rank {rank}: {type(cause).__name__}: {cause}"
        raise CheckpointError(message, where=writer.storage.root) from error


def _write_texts(writer: Writer, texts: Mapping[str, bytes]) -> None:
    for name, content in texts.items():
        writer.write_file(name, content)


def commit(writer: Writer, manifest: Manifest) -> None:
    """Look that every rank's files have arrived where this rank's are, then write the manifest and commit."""
    storage, folder = writer.storage, writer.folder
    for name, size in manifest.sizes().items():
        found = storage.size(f"{folder}/{name}")
        if found != size:
            state = "is not there" if found is None else f"has {found} bytes"
            raise CheckpointError(
                f"`{name}` was written with {size} bytes, but {state}",
                where=storage.root,
                tip="checkpoint.folder must be one place that every rank sees, and whole files must arrive there",
            )
    with storage.open(f"{folder}/{MANIFEST}", "wb") as file:
        file.write(manifest.to_json())
    storage.commit(manifest.step)
