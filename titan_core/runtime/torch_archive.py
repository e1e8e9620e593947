"""The zip files of torch.save, laid out before a number is known: all that stands around the tensors' bytes."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]

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
    torch.complex64: "ComplexFloatStorage",
    torch.complex128: "ComplexDoubleStorage",
}


def has_storage_type(dtype: torch.dtype) -> bool:
    """Has torch.save's format a storage type of its own for this dtype? (float8 has not.)"""
    return dtype in _STORAGE_NAMES


def bytes_view(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _Entry:
    """A file of the zip: where its local header and its bytes begin, and its bytes, if they are no tensor's."""

    name: str
    offset: int
    data: int
    size: int
    content: bytes | None
    key: str

    def header(self, crc: int) -> bytes:
        """Return the local header, padded so that the data is aligned."""
        padding = self.data - self.offset - 30 - len(self.name) - 24
        extra = struct.pack("<HHQQHH", 1, 16, self.size, self.size, 0x4246, padding) + bytes(padding)
        whole = 0xFFFFFFFF  # the sizes are in the extra field
        fixed = struct.pack(
            "<4sHHHHHIIIHH", b"PK\x03\x04", 45, 0, 0, 0, 33, crc, whole, whole, len(self.name), len(extra)
        )
        return fixed + self.name.encode() + extra

    def listing(self, crc: int) -> bytes:
        """Return the entry in the directory."""
        extra = struct.pack("<HHQQQ", 1, 24, self.size, self.size, self.offset)
        whole = 0xFFFFFFFF
        fixed = struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            b"PK\x01\x02", 45, 45, 0, 0, 0, 33, crc, whole, whole, len(self.name), len(extra), 0, 0, 0, 0, whole,
        )  # fmt: skip
        return fixed + self.name.encode() + extra


class Archive:
    """One file: `offsets` says where each tensor's bytes go, `frame` gives all other bytes, `size` is the file's."""

    def __init__(self, index: Mapping[str, tuple[Shape, torch.dtype]], *, bare: bool = False) -> None:
        """Lay out a dict of tensors, or, if `bare`, a single tensor that is saved without a dict around it."""
        self.offsets: dict[str, int] = {}
        self._entries: list[_Entry] = []
        self._end = 0
        self._add("data.pkl", _pickle_of(index, bare))
        self._add("byteorder", b"little")
        for number, (name, (shape, dtype)) in enumerate(index.items()):
            self._add(f"data/{number}", None, torch.Size(shape).numel() * dtype.itemsize, name)
            self.offsets[name] = self._entries[-1].data
        self._add("version", b"3\n")
        self.size = self._end + len(self._directory({}))

    def frame(self, crcs: Mapping[str, int]) -> list[tuple[int, bytes]]:
        """Return all that is no tensor's bytes, as (offset, bytes) in order; `crcs` are the tensors' CRC-32.

        torch.load looks at no CRC: where something else guards the bytes, `crcs` may be empty.
        """
        found: list[tuple[int, bytes]] = []
        start, gathered = 0, b""
        for entry in self._entries:
            gathered += entry.header(_crc(entry, crcs))
            if entry.content is None:
                found.append((start, gathered))
                start, gathered = entry.data + entry.size, b""
            else:
                gathered += entry.content
        return [*found, (start, gathered + self._directory(crcs))]

    def _add(self, name: str, content: bytes | None, size: int = 0, key: str = "") -> None:
        name, size = f"{_ARCHIVE}/{name}", size if content is None else len(content)
        fixed = self._end + 30 + len(name) + 24
        data = fixed + -fixed % _ALIGNMENT
        self._entries.append(_Entry(name, self._end, data, size, content, key))
        self._end = data + size

    def _directory(self, crcs: Mapping[str, int]) -> bytes:
        listing = b"".join(entry.listing(_crc(entry, crcs)) for entry in self._entries)
        count, size = len(self._entries), len(listing)
        end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, self._end)
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, self._end + size, 1)
        return listing + end + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)


def _crc(entry: _Entry, crcs: Mapping[str, int]) -> int:
    return crcs.get(entry.key, 0) if entry.content is None else zlib.crc32(entry.content)


# ---------------------------------------------------------------------------------------------- the CRC of two parts

_POLYNOMIAL = 0xEDB88320  # CRC-32's, the lowest power in the highest bit


def joined_crc(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two runs of bytes from the CRC-32 of each; `length` is that of the second.

    Bytes behind a run multiply its remainder by x^8 each, modulo the polynomial.
    """
    power, square = 1 << 31, 1 << 23  # x^0 and x^8
    while length:
        if length & 1:
            power = _product(power, square)
        square = _product(square, square)
        length >>= 1
    return _product(power, first) ^ second


def _product(a: int, b: int) -> int:
    """Multiply two remainders."""
    found = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            found ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return found


# ---------------------------------------------------------------------------------------------- the pickle


class _Global:
    """Something that the pickle names."""

    def __init__(self, name: str, module: str = "torch") -> None:
        self.name, self.module = name, module


class _Place:
    """A tensor in the pickle: a call of torch's constructor on a storage that lies elsewhere in the zip."""

    def __init__(self, key: str, shape: Shape, dtype: torch.dtype) -> None:
        self.key, self.shape, self.dtype = key, tuple(shape), dtype

    def constructor(self) -> tuple[str, tuple[Any, ...]]:
        """Return the function of `torch._utils` and its arguments."""
        numel = torch.Size(self.shape).numel()
        strides, step = [], 1
        for length in reversed(self.shape):
            strides.insert(0, step)
            step *= max(length, 1)
        rest = (0, self.shape, tuple(strides), False, OrderedDict())
        if self.dtype in _STORAGE_NAMES:
            pid = ("storage", _Global(_STORAGE_NAMES[self.dtype]), self.key, "cpu", numel)
            return "_rebuild_tensor_v2", (_StorageRef(pid), *rest)
        storage = _Global("UntypedStorage", "torch.storage")
        pid = ("storage", storage, self.key, "cpu", numel * self.dtype.itemsize)
        return "_rebuild_tensor_v3", (_StorageRef(pid), *rest, _Global(str(self.dtype).removeprefix("torch.")))


class _StorageRef:
    def __init__(self, pid: tuple[Any, ...]) -> None:
        self.pid = pid


# Python's own pickler, not the one in C: it can write the name of a class without having it.
_PythonPickler: Any = pickle._Pickler  # pyright: ignore[reportAttributeAccessIssue]


class _Pickler(_PythonPickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, _StorageRef) else None

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, _Global):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, _Place):
            name, arguments = obj.constructor()
            self.save(_Global(name, "torch._utils"))
            self.save(arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def _pickle_of(index: Mapping[str, tuple[Shape, torch.dtype]], bare: bool) -> bytes:
    """Return the `data.pkl` of a dict of tensors whose storages are numbered in order, or of the only tensor."""
    buffer = io.BytesIO()
    tree = {name: _Place(str(i), shape, dtype) for i, (name, (shape, dtype)) in enumerate(index.items())}
    _Pickler(buffer, protocol=2).dump(next(iter(tree.values())) if bare else tree)
    return buffer.getvalue()
