"""Reading tensors' bytes from files, exactly those that are asked for."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_core.interop.boxes import Shape, runs
from titan_core.runtime.errors import CheckpointError
from titan_core.runtime.torch_archive import bytes_view

_OPEN_FILES = 64


class ByteReader:
    """Reads ranges of files and counts the bytes; keeps a few files open. Any thread may use it."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self._open: OrderedDict[Path, Any] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`. Raises `CheckpointError` if the file is shorter or cannot be read."""
        buffer = bytearray(length)
        self.read_into(path, offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: Path, offset: int, target: memoryview) -> None:
        """Fill a buffer from a file."""
        done = 0
        try:
            file = self._file(path)
            while done < len(target):
                count = os.preadv(file.fileno(), [target[done:]], offset + done)
                if count == 0:
                    message = f"the file ends before byte {offset + len(target)}: it is truncated"
                    raise CheckpointError(message, where=str(path), tip="copy or download it again")
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot read: {error.strerror or error}", where=str(path)) from error
        with self._lock:
            self.bytes_read += done

    def region(self, path: Path, offset: int, shape: Shape, dtype: torch.dtype, start: Shape, size: Shape) -> Tensor:
        """Return a region of a tensor that is stored row by row at `offset`."""
        out = torch.empty(torch.Size(size).numel() * dtype.itemsize, dtype=torch.uint8)
        if out.numel():
            view = bytes_view(out)
            length, starts = runs(shape, start, size)
            step = length * dtype.itemsize
            for number, first in enumerate(starts):
                self.read_into(path, offset + first * dtype.itemsize, view[number * step : (number + 1) * step])
        return out.view(dtype).reshape(size)

    def _file(self, path: Path) -> Any:
        """Return an open file. A file that falls out of the cache is closed when its last reader is done."""
        with self._lock:
            if path not in self._open:
                self._open[path] = path.open("rb", buffering=0)
            self._open.move_to_end(path)
            file = self._open[path]
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return file


@dataclass(frozen=True)
class Run:
    """Bytes that follow one another in a file."""

    reader: ByteReader
    path: Path
    offset: int
    length: int

    def chunks(self, buffer: memoryview) -> Iterator[memoryview]:
        """Read them, a buffer at a time: what is yielded is overwritten by what comes next."""
        for at in range(0, self.length, len(buffer)):
            view = buffer[: min(len(buffer), self.length - at)]
            self.reader.read_into(self.path, self.offset + at, view)
            yield view


def locate(
    reader: ByteReader, path: Path, offset: int, shape: Shape, dtype: torch.dtype, start: Shape, size: Shape
) -> Run | None:
    """Return where a region of a tensor that is stored row by row at `offset` lies, None if not in one run."""
    length, starts = runs(shape, start, size)
    numel = torch.Size(size).numel()
    if length != numel or not numel:
        return None
    return Run(reader, path, offset + next(starts) * dtype.itemsize, numel * dtype.itemsize)


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file of a folder. Raises `CheckpointError` for a name or a link that leads out of it.

    The links of a Hugging Face cache, from `snapshots/REVISION/` to `blobs/` beside it, are its way to store files.
    """
    tip = "do not trust this checkpoint"
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise CheckpointError(f"the index names `{name}`, which is no file of the folder", where=str(folder), tip=tip)
    path, home = folder / name, folder.resolve()
    target = path.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if target.parent != home and (cache is None or target.parent != cache.resolve()):
        raise CheckpointError(
            f"`{name}` is a link that leads out of the folder, to {target}", where=str(folder), tip=tip
        )
    if not target.is_file():
        state = "is not a file" if target.exists() else "is missing"
        raise CheckpointError(f"`{name}` {state}", where=str(folder), tip="download or copy the whole folder")
    return path
