"""torch.save files as the target of a conversion: one `.pt`, or Meta's `consolidated.NN.pth`."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_core.interop.boxes import Index, Slab
from titan_core.interop.stream import Job, Pieces, divide, job_limit
from titan_core.runtime.disk import UncachedReader, UncachedWriter
from titan_core.runtime.errors import UsageError
from titan_core.runtime.torch_archive import Archive, has_storage_type, joined_crc


class PthSink:
    """Files of tensors: `contents` maps a file to the names in it, which are written without `prefixes[file]`.

    Every place in a file is known at the start; what stands around the tensors is written at the end, with their CRCs.
    """

    def __init__(
        self,
        folder: Path,
        index: Index,
        contents: Mapping[str, Sequence[str]],
        *,
        slab: int,
        prefixes: Mapping[str, str],
        files: Mapping[str, bytes],
    ) -> None:
        odd = [f"{name} ({dtype})" for name, (_, dtype) in index.items() if not has_storage_type(dtype)]
        if odd:
            raise UsageError(f"torch.save's format has no storage for {odd[0]}", tip="cast with --dtype")
        self.folder = folder
        self.files = files
        self._index = index
        self._prefixes = prefixes
        self._archives: dict[str, Archive] = {}
        jobs: list[Job] = []
        for file, names in contents.items():
            self._archives[file] = Archive({self._key(file, name): index[name] for name in names})
            for slabs, num_bytes in divide(names, index, slab, job_limit(self._archives[file].size)):
                jobs.append(Job(len(jobs), file, slabs, num_bytes))
        self.jobs: Sequence[Job] = jobs

    def prepare(self) -> None:
        """Make the files in their full length."""
        for file, archive in self._archives.items():
            with (self.folder / file).open("r+b" if (self.folder / file).exists() else "wb") as out:
                out.truncate(archive.size)

    def path(self, job: Job) -> Path:
        """Return the file that a job writes into."""
        return self.folder / job.file

    def write(self, job: Job, pieces: Pieces) -> dict[str, Any]:
        """Write slabs to their places; the record has the CRC of each."""
        crcs = []
        with UncachedWriter(self.path(job)) as file:
            for slab, chunks in pieces:
                crc = 0
                file.seek(self._offset(job.file, slab))
                for chunk in chunks:
                    crc = zlib.crc32(chunk, crc)
                    file.write(chunk)
                crcs.append(crc)
        return {"crc": crcs}

    def check(self, job: Job, record: dict[str, Any]) -> list[str]:
        """Read every slab again."""
        problems = []
        with UncachedReader(self.path(job)) as file:
            for slab, wanted in zip(job.slabs, record["crc"], strict=True):
                crc = 0
                for chunk in file.read(self._offset(job.file, slab), self._bytes(slab)):
                    crc = zlib.crc32(chunk, crc)
                if crc != wanted:
                    problems.append(f"`{slab.name}` in {job.file} is not what was written")
        return problems

    def finish(self, records: dict[int, dict[str, Any]]) -> None:
        """Write what stands around the tensors, and the files beside the weights."""
        crcs: dict[str, dict[str, int]] = {file: {} for file in self._archives}
        for job in self.jobs:  # a tensor's slabs come in the order in which they lie
            for slab, crc in zip(job.slabs, records[job.number]["crc"], strict=True):
                key, found = self._key(job.file, slab.name), crcs[job.file]
                found[key] = joined_crc(found.get(key, 0), crc, self._bytes(slab))
        for file, archive in self._archives.items():
            with (self.folder / file).open("r+b") as out:
                for offset, content in archive.frame(crcs[file]):
                    out.seek(offset)
                    out.write(content)
        for name, content in self.files.items():
            (self.folder / name).write_bytes(content)

    def _key(self, file: str, name: str) -> str:
        return name.removeprefix(self._prefixes.get(file, ""))

    def _bytes(self, slab: Slab) -> int:
        return slab.numel * self._index[slab.name][1].itemsize

    def _offset(self, file: str, slab: Slab) -> int:
        shape, dtype = self._index[slab.name]
        return self._archives[file].offsets[self._key(file, slab.name)] + slab.first(shape) * dtype.itemsize
