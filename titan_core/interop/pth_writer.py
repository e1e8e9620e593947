"""Writes a dict of tensors as torch.save would, region by region: the zip's places are known before a number is."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from titan_core.interop.boxes import Index, Shape, bytes_view
from titan_core.runtime.disk import WRITE_AT_ONCE

_ALIGNMENT = 64  # of every tensor's bytes, as torch.save has it, so that a memory-mapped load is aligned
_ARCHIVE = "archive"
_STORAGE_NAMES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
}


def writable(dtype: torch.dtype) -> bool:
    """Has torch.save's format a plain storage type for this dtype?"""
    return dtype in _STORAGE_NAMES


class PthWriter:
    """One file. Tensors are written whole, in the order of the index, each in any number of consecutive pieces."""

    def __init__(self, path: Path, index: Index) -> None:
        self._index = index
        self._file: IO[bytes] = path.open("wb", buffering=WRITE_AT_ONCE)
        self._entries: list[tuple[str, int, int, int]] = []  # name, offset of the header, size, crc
        self._entry(f"{_ARCHIVE}/data.pkl", pickle_of(index))
        self._entry(f"{_ARCHIVE}/byteorder", b"little")
        self._keys = {name: str(number) for number, name in enumerate(index)}
        self._open: tuple[str, int, int] | None = None

    def write(self, name: str, piece: Tensor) -> None:
        """Write the next piece of a tensor."""
        entry = f"{_ARCHIVE}/data/{self._keys[name]}"
        if self._open is None or self._open[0] != entry:
            self._end()
            shape, dtype = self._index[name]
            size = torch.Size(shape).numel() * dtype.itemsize
            self._open = (entry, self._begin(entry, size), size)
            self._crc = 0
        data = bytes_view(piece.contiguous())
        for start in range(0, len(data), WRITE_AT_ONCE):
            self._file.write(data[start : start + WRITE_AT_ONCE])
        self._crc = zlib.crc32(data, self._crc)

    def close(self) -> None:
        """Write the zip's directory."""
        self._end()
        self._entry(f"{_ARCHIVE}/version", b"3\n")
        start = self._file.tell()
        for name, offset, size, crc in self._entries:
            extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
            self._file.write(
                struct.pack(
                    "<4sHHHHHHIIIHHHHHII",
                    b"PK\x01\x02", 45, 45, 0, 0, 0, 33, crc, 0xFFFFFFFF, 0xFFFFFFFF,
                    len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF,
                )
            )  # fmt: skip
            self._file.write(name.encode() + extra)
        end, count = self._file.tell(), len(self._entries)
        self._file.write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, end - start, start))
        self._file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
        self._file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
        self._file.close()

    def _entry(self, name: str, data: bytes) -> None:
        offset = self._begin(name, len(data), zlib.crc32(data))
        self._file.write(data)
        self._entries.append((name, offset, len(data), zlib.crc32(data)))

    def _begin(self, name: str, size: int, crc: int = 0) -> int:
        """Write a local header whose data is aligned; return its offset."""
        offset = self._file.tell()
        fixed = offset + 30 + len(name) + 20 + 4
        padding = -fixed % _ALIGNMENT
        extra = struct.pack("<HHQQ", 1, 16, size, size) + struct.pack("<HH", 0x4246, padding) + bytes(padding)
        self._file.write(
            struct.pack(
                "<4sHHHHHIIIHH", b"PK\x03\x04", 45, 0, 0, 0, 33, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra)
            )
        )
        self._file.write(name.encode() + extra)
        return offset

    def _end(self) -> None:
        """Close the tensor that is being written: its checksum goes into its header."""
        if self._open is None:
            return
        name, offset, size = self._open
        end = self._file.tell()
        self._file.seek(offset + 14)
        self._file.write(struct.pack("<I", self._crc))
        self._file.seek(end)
        self._entries.append((name, offset, size, self._crc))
        self._open = None


class _StorageType:
    def __init__(self, name: str) -> None:
        self.name = name


class _Place:
    """A tensor in the pickle: a call of torch's constructor on a storage that lies elsewhere in the zip."""

    def __init__(self, key: str, shape: Shape, dtype: torch.dtype) -> None:
        self.key, self.shape, self.dtype = key, shape, dtype


class _StorageRef:
    def __init__(self, pid: tuple[Any, ...]) -> None:
        self.pid = pid


# Python's own pickler, not the one in C: it can write the name of a class without having it.
_PythonPickler: Any = pickle._Pickler  # pyright: ignore[reportAttributeAccessIssue]


class _Pickler(_PythonPickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, _StorageRef) else None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _StorageType):
            self.write(b"ctorch\n" + obj.name.encode() + b"\n")
            return
        if isinstance(obj, _Place):
            numel = torch.Size(obj.shape).numel()
            pid = ("storage", _StorageType(_STORAGE_NAMES[obj.dtype]), obj.key, "cpu", numel)
            stride = torch.empty(obj.shape, device="meta").stride()
            arguments = (_StorageRef(pid), 0, tuple(obj.shape), tuple(stride), False, OrderedDict())
            self.write(b"ctorch._utils\n_rebuild_tensor_v2\n")
            self.save(arguments)
            self.write(pickle.REDUCE)
            return
        super().save(obj, save_persistent_id)


def pickle_of(index: Index) -> bytes:
    """Return the `data.pkl` of a dict of tensors whose storages are numbered in order."""
    buffer = io.BytesIO()
    tree = {name: _Place(str(i), shape, dtype) for i, (name, (shape, dtype)) in enumerate(index.items())}
    _Pickler(buffer, protocol=2).dump(tree)
    return buffer.getvalue()
