"""torch.save's zip files, read without torch.load: the directory, the pickle through an allow-list, then byte ranges.

Nothing that such a file names is imported or called. Tensors must lie in the file as one run each, which is how weights
are saved; anything else in the pickle than dicts, lists and plain values is refused.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_core.interop.boxes import Index, Shape
from titan_core.interop.files import ByteReader, Run, inside, locate
from titan_core.interop.safetensors import Stored, some
from titan_core.runtime.errors import CheckpointError

_MOST_PICKLE = 100_000_000
_TIP = "copy or download it again"
_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}


class PthSource:
    """The tensors of one file."""

    def __init__(self, path: str | Path, reader: ByteReader | None = None) -> None:
        self.reader = reader or ByteReader()
        self.stored = read_pth(Path(path), self.reader)
        self.index: Index = {name: (s.shape, s.dtype) for name, s in self.stored.items()}

    def read(self, name: str, start: Shape, size: Shape) -> Tensor:
        """Return a region of a tensor."""
        stored = self.stored[name]
        return self.reader.region(stored.path, stored.offset, stored.shape, stored.dtype, start, size)

    def locate(self, name: str, start: Shape, size: Shape) -> Run | None:
        """Return where a region lies."""
        stored = self.stored[name]
        return locate(self.reader, stored.path, stored.offset, stored.shape, stored.dtype, start, size)


class MetaSource(PthSource):
    """The files `consolidated.NN.pth` of a folder, as `NN/key`."""

    def __init__(self, folder: str | Path, reader: ByteReader | None = None) -> None:
        self.reader = reader or ByteReader()
        home = Path(folder)
        names = sorted(path.name for path in home.glob("consolidated.*.pth"))
        self.parts = len(names)
        wanted = [f"consolidated.{number:02d}.pth" for number in range(self.parts)]
        if names != wanted or not names:
            lost = [name for name in wanted if name not in names] or ["consolidated.00.pth"]
            raise CheckpointError(
                f"of the parts {some(names) or 'none'} are there, missing: {lost[0]}", where=str(home)
            )
        self.stored: dict[str, Stored] = {}
        for number, name in enumerate(names):
            found = read_pth(inside(home, name), self.reader)
            self.stored.update({f"{number:02d}/{key}": stored for key, stored in found.items()})
        self.index: Index = {name: (s.shape, s.dtype) for name, s in self.stored.items()}


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class _Saved:
    """What the pickle says of a tensor."""

    storage: _Storage
    offset: int
    shape: Shape
    stride: Shape


def read_pth(path: Path, reader: ByteReader) -> dict[str, Stored]:
    """Return the tensors of a file by their keys; nested dicts are joined with dots. Raises `CheckpointError`."""
    where = str(path)
    entries = _directory(path)
    pickles = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError("this is a zip file, but not one that torch.save wrote", where=where)
    prefix = pickles[0].removesuffix("data.pkl")
    offset, size = _place(path, reader, entries[pickles[0]])
    if size > _MOST_PICKLE:
        raise CheckpointError(f"the pickle claims {size} bytes", where=where, tip="do not trust this file")
    byteorder = entries.get(f"{prefix}byteorder")
    if byteorder is not None and reader.read(path, *_place(path, reader, byteorder)).strip() != b"little":
        raise CheckpointError("the file was written on a big-endian machine", where=where)
    tree = _unpickle(reader.read(path, offset, size), where)
    found: dict[str, Stored] = {}
    for name, saved in _flatten(tree, "", where):
        found[name] = _locate(path, reader, entries, prefix, name, saved)
    if not found:
        raise CheckpointError("the file holds no tensors", where=where)
    return found


def _directory(path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the zip's entries: stored as they are, none twice, none beyond the end of the file."""
    try:
        with zipfile.ZipFile(path) as file:
            infos = file.infolist()
    except (zipfile.BadZipFile, OSError, struct.error, ValueError) as error:
        with path.open("rb") as file:
            old = file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04")
        what = (
            "an old torch.save file, which only a full unpickler reads" if old else f"damaged or no zip file: {error}"
        )
        tip = "load it with an old torch and weights_only, and save it again" if old else _TIP
        raise CheckpointError(f"this is {what}", where=str(path), tip=tip) from error
    found: dict[str, zipfile.ZipInfo] = {}
    size = path.stat().st_size
    for info in infos:
        if info.filename in found:
            raise CheckpointError(
                f"`{info.filename}` is in the zip twice", where=str(path), tip="do not trust this file"
            )
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise CheckpointError(
                f"`{info.filename}` is compressed or encrypted; torch.save does neither", where=str(path)
            )
        if info.header_offset + info.file_size > size:
            raise CheckpointError(f"`{info.filename}` ends beyond the file: truncated", where=str(path), tip=_TIP)
        found[info.filename] = info
    return found


def _place(path: Path, reader: ByteReader, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Return where an entry's bytes are: behind its local header, which has its own lengths of name and extra."""
    header = reader.read(path, info.header_offset, 30)
    if header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"`{info.filename}` has no local header: damaged", where=str(path), tip=_TIP)
    name, extra = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name + extra, info.file_size


def _locate(
    path: Path, reader: ByteReader, entries: dict[str, zipfile.ZipInfo], prefix: str, name: str, saved: _Saved
) -> Stored:
    where, dtype = str(path), saved.storage.dtype
    entry = entries.get(f"{prefix}data/{saved.storage.key}")
    if entry is None:
        raise CheckpointError(f"the numbers of `{name}` are not in the file", where=where, tip=_TIP)
    if entry.file_size != saved.storage.numel * dtype.itemsize:
        message = f"`{name}` claims {saved.storage.numel} numbers, the file has {entry.file_size} bytes for it"
        raise CheckpointError(message, where=where, tip="do not trust this file")
    plain = tuple(math.prod(saved.shape[i + 1 :]) for i in range(len(saved.shape)))
    moves = [(s, p) for n, s, p in zip(saved.shape, saved.stride, plain, strict=True) if n > 1]
    if any(stride != wanted for stride, wanted in moves):
        raise CheckpointError(f"`{name}` does not lie row by row in the file (strides {saved.stride})", where=where)
    if saved.offset < 0 or saved.offset + math.prod(saved.shape) > saved.storage.numel:
        raise CheckpointError(f"`{name}` reaches beyond its storage", where=where, tip="do not trust this file")
    offset, _ = _place(path, reader, entry)
    return Stored(path, offset + saved.offset * dtype.itemsize, saved.shape, dtype)


class _Unpickler(pickle.Unpickler):
    """Knows OrderedDict, the tensor constructors and storage types, as values that are never called for real."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
            return _saved
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise CheckpointError(f"the pickle wants to run `{module}.{name}`, which no weights need: refused")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(numel) is not int:
            raise CheckpointError(f"the pickle refers to something that is no storage: {kind!r}")
        return _Storage(dtype, str(key), numel)


def _saved(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> _Saved:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise CheckpointError("a tensor in the pickle is malformed")
    return _Saved(storage, offset, tuple(shape), tuple(stride))


def _parameter(saved: Any, *_: Any) -> Any:
    return saved


def _unpickle(data: bytes, where: str) -> Any:
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except CheckpointError as error:
        raise CheckpointError(error.message, where=where, tip="do not trust this file") from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise CheckpointError(f"the pickle is damaged: {error}", where=where, tip=_TIP) from error


def _flatten(tree: Any, prefix: str, where: str) -> list[tuple[str, _Saved]]:
    """Return the tensors of nested dicts; other plain values carry no weights and are passed over."""
    if not isinstance(tree, dict):
        raise CheckpointError(f"the file holds a {type(tree).__name__}, not a dict of tensors", where=where)
    found: list[tuple[str, _Saved]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, _Saved):
            found.append((name, value))
        elif isinstance(value, dict):
            found += _flatten(value, f"{name}.", where)
        elif isinstance(value, list | tuple) and any(isinstance(item, _Saved) for item in value):
            raise CheckpointError(f"`{name}` is a list of tensors, which no state dict has", where=where)
    return found
