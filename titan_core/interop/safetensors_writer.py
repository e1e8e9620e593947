"""Safetensors files of a checkpoint, written by any number of ranks: every place is known at the start."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from titan_core.interop.boxes import Index, Shape, Slab
from titan_core.interop.safetensors import INDEX_SUFFIX, NAMES
from titan_core.interop.stream import Job, Pieces, divide, job_limit
from titan_core.runtime.disk import UncachedReader, UncachedWriter
from titan_core.runtime.errors import CheckpointError


class SafetensorsSink:
    """A folder of `model-00001-of-0000N.safetensors`, or one `model.safetensors`, with an index and other files; `stem`
    stands for `model`. `max_shard` None is one file."""

    def __init__(
        self,
        folder: Path,
        index: Index,
        *,
        slab: int,
        max_shard: int | None,
        files: Mapping[str, bytes],
        stem: str = "model",
    ) -> None:
        self.folder = folder
        self._stem = stem
        self.files = files
        self._index = index
        self._total = sum(_bytes(*entry) for entry in index.values())
        self._headers: dict[str, bytes] = {}
        self._offsets: dict[str, int] = {}
        self.placed: dict[str, str] = {}
        jobs: list[Job] = []
        limit = job_limit(self._total)
        for file, names in _shards(index, max_shard, stem).items():
            self._headers[file] = _header(names, index)
            at = len(self._headers[file])
            for name in names:
                self.placed[name], self._offsets[name] = file, at
                at += _bytes(*index[name])
            for slabs, num_bytes in divide(names, index, slab, limit):
                jobs.append(Job(len(jobs), file, slabs, num_bytes))
        self.jobs: Sequence[Job] = jobs

    def prepare(self) -> None:
        """Make the files in their full length, with their headers."""
        for file, header in self._headers.items():
            size = len(header) + sum(_bytes(*self._index[name]) for name, at in self.placed.items() if at == file)
            with (self.folder / file).open("r+b" if (self.folder / file).exists() else "wb") as out:
                out.write(header)
                out.truncate(size)

    def path(self, job: Job) -> Path:
        """Return the file that a job writes into."""
        return self.folder / job.file

    def write(self, job: Job, pieces: Pieces) -> dict[str, Any]:
        """Write slabs to their places; the record has a hash of each."""
        hashes = []
        with UncachedWriter(self.path(job)) as file:
            for slab, chunks in pieces:
                digest = xxhash.xxh3_128()
                file.seek(self._offset(slab))
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
                hashes.append(digest.hexdigest())
        return {"hashes": hashes}

    def check(self, job: Job, record: dict[str, Any]) -> list[str]:
        """Read every slab again."""
        problems = []
        with UncachedReader(self.path(job)) as file:
            for slab, wanted in zip(job.slabs, record["hashes"], strict=True):
                digest = xxhash.xxh3_128()
                for chunk in file.read(self._offset(slab), slab.numel * self._index[slab.name][1].itemsize):
                    digest.update(chunk)
                if digest.hexdigest() != wanted:
                    problems.append(f"`{slab.name}` in {job.file} is not what was written")
        return problems

    def finish(self, records: dict[int, dict[str, Any]]) -> None:
        """Write the index, if there are several files, and the files beside the weights."""
        if len(self._headers) > 1:
            tree = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self.placed.items()))}
            (self.folder / f"{self._stem}{INDEX_SUFFIX}").write_text(json.dumps(tree, indent=2) + "\n")
        for name, content in self.files.items():
            (self.folder / name).write_bytes(content)

    def _offset(self, slab: Slab) -> int:
        shape, dtype = self._index[slab.name]
        return self._offsets[slab.name] + slab.first(shape) * dtype.itemsize


def _bytes(shape: Shape, dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _shards(index: Index, max_shard: int | None, stem: str) -> dict[str, list[str]]:
    """Return file -> names: in order, each file as full as it may be; a larger tensor has a file of its own."""
    groups: list[list[str]] = []
    size = 0
    for name, entry in index.items():
        num_bytes = _bytes(*entry)
        if not groups or (max_shard is not None and size + num_bytes > max_shard and size):
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _header(names: Sequence[str], index: Index) -> bytes:
    """Return a file's length field and header, padded so that the data is aligned to 8 bytes."""
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        shape, dtype = index[name]
        if dtype not in NAMES:
            raise CheckpointError(f"`{name}` is {dtype}, which safetensors cannot hold")
        end = at + _bytes(shape, dtype)
        tree[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
