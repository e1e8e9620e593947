"""torch.save files as the target of a conversion: one `.pt`, or Meta's `consolidated.NN.pth`. A file is a job."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_core.interop.boxes import Index, bytes_view
from titan_core.interop.files import ByteReader
from titan_core.interop.pth import read_pth
from titan_core.interop.pth_writer import PthWriter, writable
from titan_core.interop.safetensors_writer import checksum
from titan_core.interop.stream import Job, Pieces, divide
from titan_core.runtime.errors import UsageError


class PthSink:
    """Files of tensors: `contents` maps a file to the names in it, which are written without `prefix_of(file)`."""

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
        odd = [f"{name} ({dtype})" for name, (_, dtype) in index.items() if not writable(dtype)]
        if odd:
            raise UsageError(f"torch.save's format has no storage for {odd[0]}", tip="cast with --dtype")
        self.folder = folder
        self.files = files
        self._index = index
        self._prefixes = prefixes
        self.jobs: Sequence[Job] = [
            Job(number, file, *next(divide(names, index, slab, 1 << 62)))
            for number, (file, names) in enumerate(contents.items())
        ]

    def prepare(self) -> None:
        """Nothing to make: a file is made by its job."""

    def write(self, job: Job, pieces: Pieces) -> dict[str, Any]:
        """Write a file; the record has a checksum of each slab."""
        path, prefix = self.folder / job.file, self._prefixes.get(job.file, "")
        names = dict.fromkeys(slab.name for slab in job.slabs)
        writer = PthWriter(path, {name.removeprefix(prefix): self._index[name] for name in names})
        sums = []
        for slab, tensor in pieces:
            writer.write(slab.name.removeprefix(prefix), tensor)
            sums.append(zlib.crc32(bytes_view(tensor)))
        writer.close()
        return {"crc": sums}

    def check(self, job: Job, record: dict[str, Any]) -> list[str]:
        """Read every slab again, where the file says that it is."""
        reader, problems = ByteReader(), []
        path, prefix = self.folder / job.file, self._prefixes.get(job.file, "")
        stored = read_pth(path, reader)
        at = {name: entry.offset for name, entry in stored.items()}
        for slab, wanted in zip(job.slabs, record["crc"], strict=True):
            name = slab.name.removeprefix(prefix)
            size = slab.numel * self._index[slab.name][1].itemsize
            if checksum(reader, path, at[name], size) != wanted:
                problems.append(f"`{name}` in {job.file} is not what was written")
            at[name] += size
        return problems

    def finish(self, records: dict[int, dict[str, Any]]) -> None:
        """Write the files beside the weights."""
        for name, content in self.files.items():
            (self.folder / name).write_bytes(content)
