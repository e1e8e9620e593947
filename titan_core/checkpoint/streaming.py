"""A step written and read region by region, by ranks that never hold a whole model: what conversions use."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from titan_core.checkpoint.local import LocalStorage
from titan_core.checkpoint.manifest import Manifest, new_hash
from titan_core.checkpoint.places import split
from titan_core.checkpoint.reader import Reader
from titan_core.checkpoint.saving import commit
from titan_core.checkpoint.writer import Writer, piece_frame
from titan_core.runtime.disk import UncachedReader, UncachedWriter
from titan_core.runtime.errors import CheckpointError

Shape = tuple[int, ...]
Index = Mapping[str, tuple[Shape, torch.dtype]]
_KEEP = 256 << 20  # bytes of pieces kept for the next read


class StepSource:
    """The weights of a step as a source of regions, without `optimizer.*`. Pieces are checked when they are read."""

    def __init__(self, step_path: str, *, check: bool = True) -> None:
        storage, folder = split(step_path)
        self._reader = Reader(storage, folder, check=check)
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._gates: dict[tuple[str, int], threading.Lock] = {}
        self._lock = threading.Lock()
        self.index: Index = {}
        self._chunks: dict[str, list[tuple[Shape, Shape, str, int, int]]] = {}
        metadata = self._reader.metadata
        index: dict[str, tuple[Shape, torch.dtype]] = {}
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata) or name.startswith("optimizer."):
                continue
            index[name] = (tuple(entry.size), entry.properties.dtype)
            self._chunks[name] = [self._chunk(name, chunk) for chunk in entry.chunks]
        self.index = index

    def read(self, name: str, start: Shape, size: Shape) -> Tensor:
        """Return a region of a tensor. Raises `CheckpointError`."""
        shape, dtype = self.index[name]
        found = []
        for base, extent, file, offset, length in self._chunks[name]:
            low = tuple(max(a, b) for a, b in zip(start, base, strict=True))
            ends = zip(start, size, base, extent, strict=True)
            high = tuple(min(a + n, b + m) for a, n, b, m in ends)
            if all(a < b for a, b in zip(low, high, strict=True)):
                piece = self._piece(file, offset, length, extent, name)
                for dim, (a, b, at) in enumerate(zip(low, high, base, strict=True)):
                    piece = piece.narrow(dim, a - at, b - a)
                found.append((low, piece))
        if len(found) == 1 and tuple(found[0][1].shape) == tuple(size):
            return found[0][1]
        if sum(piece.numel() for _, piece in found) != torch.Size(size).numel():
            raise CheckpointError(f"the pieces of `{name}` {list(shape)} do not fill it", where=self._reader.step_path)
        out = torch.empty(size, dtype=dtype)
        for low, piece in found:
            target = out
            for dim, (at, base) in enumerate(zip(low, start, strict=True)):
                target = target.narrow(dim, at - base, piece.shape[dim])
            target.copy_(piece)
        return out

    def locate(self, name: str, start: Shape, size: Shape) -> None:
        """Return None: a piece is checked as a whole before a number of it is used."""

    def _chunk(self, name: str, chunk: ChunkStorageMetadata) -> tuple[Shape, Shape, str, int, int]:
        info = self._reader.metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
        if info is None:
            raise CheckpointError(f"the metadata does not say where `{name}` lies", where=self._reader.step_path)
        return tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length

    def _piece(self, file: str, offset: int, length: int, shape: Shape, name: str) -> Tensor:
        """Return a stored piece; several may be read at once, none twice at once."""
        key = (file, offset)
        with self._lock:
            gate = self._gates.setdefault(key, threading.Lock())
        with gate:
            kept = self._kept.get(key)
            if kept is not None:
                return kept
            with self._reader.open(file) as handle:
                piece = self._reader.read_piece(handle, file, offset, length)
            if tuple(piece.shape) != shape:
                message = f"a piece of `{name}` is {list(piece.shape)}, the metadata says {list(shape)}"
                raise CheckpointError(message, where=self._reader.step_path)
            with self._lock:
                while self._kept and sum(t.nbytes for t in self._kept.values()) + length > _KEEP:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[key] = piece
            return piece


class StepSink:
    """A step in a folder, written in jobs: each has a data file of its own, and the commit is that of any other step.

    `jobs` are (number, file, slabs, bytes); see `interop.stream`, which this serves.
    """

    def __init__(
        self, storage: LocalStorage, step: int, index: Index, jobs: Sequence[Any], texts: Mapping[str, bytes]
    ) -> None:
        self.storage = storage
        self.step = step
        self.jobs = jobs
        self._index = index
        self._texts = texts

    def prepare(self) -> None:
        """Nothing to make: every job makes its own file."""

    def path(self, job: Any) -> Path:
        """Return the job's data file."""
        return Path(self.storage.root) / self.storage.pending(self.step) / job.file

    def write(self, job: Any, pieces: Iterator[tuple[Any, Iterable[memoryview]]]) -> dict[str, Any]:
        """Write a data file; the record says where in it each slab lies, with its hash."""
        placed: list[tuple[int, int, str]] = []
        at = 0
        with UncachedWriter(self.path(job), new=True) as file:
            for slab, chunks in pieces:
                head, tail = piece_frame(slab.size, self._index[slab.name][1])
                start, digest = at, new_hash()
                for part in itertools.chain((head,), chunks, (tail,)):
                    digest.update(part)
                    file.write(part)
                    at += len(part)
                placed.append((start, at - start, digest.hexdigest()))
        return {"pieces": placed}

    def check(self, job: Any, record: dict[str, Any]) -> list[str]:
        """Read every slab again."""
        problems = []
        with UncachedReader(self.path(job)) as file:
            for slab, (offset, length, wanted) in zip(job.slabs, record["pieces"], strict=True):
                digest = new_hash()
                for part in file.read(offset, length):
                    digest.update(part)
                if digest.hexdigest() != wanted:
                    problems.append(f"`{slab.name}` in {job.file} is not what was written")
        return problems

    def finish(self, records: dict[int, dict[str, Any]]) -> None:
        """Write metadata and manifest, and commit."""
        writer = Writer(self.storage, self.storage.pending(self.step), 0)
        manifest = Manifest(self.step, 0)  # no rank has anything of its own in it
        entries = {name: _entry(shape, dtype) for name, (shape, dtype) in self._index.items()}
        results = []
        for job in self.jobs:
            hashes = manifest.pieces.setdefault(job.file, {})
            for slab, (offset, length, digest) in zip(job.slabs, records[job.number]["pieces"], strict=True):
                hashes[offset] = (length, digest)
                start = torch.Size(slab.start)
                entries[slab.name].chunks.append(ChunkStorageMetadata(start, torch.Size(slab.size)))
                info = _StorageInfo(job.file, offset, length)
                results.append(WriteResult(MetadataIndex(slab.name, start), length, info))
        writer.finish(Metadata(dict(entries)), [results])
        for name, content in self._texts.items():
            writer.write_file(name, content)
        manifest.files.update(writer.files)
        commit(writer, manifest)


def _entry(shape: Shape, dtype: torch.dtype) -> TensorStorageMetadata:
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
