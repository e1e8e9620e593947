"""Safetensors: headers read with every bound checked, and a folder of such files as a source."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_core.interop.boxes import Index, Shape
from titan_core.interop.files import ByteReader, Run, inside, locate
from titan_core.runtime.errors import CheckpointError

STEMS = ("model", "diffusion_pytorch_model")  # of the files of transformers and of diffusers
INDEX_SUFFIX = ".safetensors.index.json"
# The format's own limit; a header of Llama 405B's largest shard has 4 kB, one of DeepSeek-V3's 70 kB.
_MOST_HEADER = 100_000_000
_TIP = "copy or download it again"

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its bytes begin, and what they are."""

    path: Path
    offset: int
    shape: Shape
    dtype: torch.dtype


class SafetensorsSource:
    """The tensors of a folder's safetensors files, in the order of the files; or of one file."""

    def __init__(self, folder: str | Path, reader: ByteReader | None = None) -> None:
        self.folder = Path(folder)
        self.reader = reader or ByteReader()
        self.stored = _read_folder(self.folder, self.reader)
        self.index: Index = {name: (s.shape, s.dtype) for name, s in self.stored.items()}

    def read(self, name: str, start: Shape, size: Shape) -> Tensor:
        """Return a region of a tensor."""
        stored = self.stored[name]
        return self.reader.region(stored.path, stored.offset, stored.shape, stored.dtype, start, size)

    def locate(self, name: str, start: Shape, size: Shape) -> Run | None:
        """Return where a region lies."""
        stored = self.stored[name]
        return locate(self.reader, stored.path, stored.offset, stored.shape, stored.dtype, start, size)


def read_header(path: Path, reader: ByteReader) -> dict[str, Stored]:
    """Return the tensors of a file. Raises `CheckpointError` for a header that is not true."""
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(f"the file has {size} bytes: it is truncated", where=str(path), tip=_TIP)
    length = int.from_bytes(reader.read(path, 0, 8), "little")
    if length > min(size - 8, _MOST_HEADER):
        message = f"the header claims {length} bytes, the file has {size}: it is truncated, or not safetensors"
        raise CheckpointError(message, where=str(path), tip=_TIP)
    tree = parse_json(reader.read(path, 8, length), path)
    tree.pop("__metadata__", None)
    base, found, ranges = 8 + length, {}, []
    for name, entry in tree.items():
        shape, dtype, begin, end = _entry(name, entry, path)
        if end > size - base:
            message = f"`{name}` ends at byte {base + end}, the file at {size}: it is truncated, or the header lies"
            raise CheckpointError(message, where=str(path), tip=_TIP)
        found[name] = Stored(path, base + begin, shape, dtype)
        ranges.append((begin, end, name))
    _check_ranges(sorted(ranges), size - base, path)
    return found


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object in which no key comes twice. Raises `CheckpointError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"`{twice}` is there twice", where=str(path), tip="do not trust this file")
        return tree

    try:
        tree = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {error}", where=str(path), tip=_TIP) from error
    if not isinstance(tree, dict):
        raise CheckpointError(f"not a JSON object but a {type(tree).__name__}", where=str(path))
    return tree


def _entry(name: str, entry: Any, path: Path) -> tuple[Shape, torch.dtype, int, int]:
    """Read one tensor's entry in a header."""
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"the entry of `{name}` is malformed", where=str(path), tip=_TIP) from None
    if kind not in DTYPES:
        raise CheckpointError(f"`{name}` has the unknown dtype `{kind}`", where=str(path))
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise CheckpointError(f"the entry of `{name}` is malformed", where=str(path), tip=_TIP)
    needed = math.prod(shape) * DTYPES[kind].itemsize
    if end - begin != needed:
        message = f"`{name}` is {kind} {shape}, which takes {needed} bytes, but the header gives it {end - begin}"
        raise CheckpointError(message, where=str(path), tip="do not trust this file")
    return tuple(shape), DTYPES[kind], begin, end


def _check_ranges(ranges: list[tuple[int, int, str]], size: int, path: Path) -> None:
    """All bytes after the header belong to one tensor each."""
    position = 0
    for begin, end, name in ranges:
        if begin != position:
            what = (
                "overlaps another tensor" if begin < position else f"leaves {begin - position} bytes unused before it"
            )
            raise CheckpointError(f"`{name}` {what}", where=str(path), tip="do not trust this file")
        position = end
    if position != size:
        message = f"{size - position} bytes after the last tensor belong to nothing"
        raise CheckpointError(message, where=str(path), tip="do not trust this file")


def _read_folder(folder: Path, reader: ByteReader) -> dict[str, Stored]:
    """Return all tensors of a folder, by its index if it has one."""
    if folder.is_file():
        return read_header(folder, reader)
    for stem in STEMS:
        if (folder / f"{stem}{INDEX_SUFFIX}").exists():
            return _read_indexed(folder, f"{stem}{INDEX_SUFFIX}", reader)
    singles = [name for stem in STEMS if (folder / (name := f"{stem}.safetensors")).exists()]
    names = singles[:1] or sorted(p.name for p in folder.glob("*.safetensors"))
    if not names:
        raise CheckpointError("the folder holds no safetensors files", where=str(folder))
    found: dict[str, Stored] = {}
    for name in names:
        for key, stored in read_header(inside(folder, name), reader).items():
            if key in found:
                raise CheckpointError(f"`{key}` is in two files, {found[key].path.name} and {name}", where=str(folder))
            found[key] = stored
    return found


def _read_indexed(folder: Path, index: str, reader: ByteReader) -> dict[str, Stored]:
    where = inside(folder, index)
    try:
        data = where.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror}", where=str(where)) from error
    placed = parse_json(data, where).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise CheckpointError("the index has no `weight_map` of names to files", where=str(where), tip=_TIP)
    found: dict[str, Stored] = {}
    for file in dict.fromkeys(placed.values()):
        header = read_header(inside(folder, file), reader)
        strange = [key for key in header if placed.get(key) != file]
        if strange:
            message = f"{file} holds {len(strange)} tensors that the index does not place there: {some(strange)}"
            raise CheckpointError(message, where=str(where), tip="index and files are not of one checkpoint")
        found.update(header)
    lost = [key for key in placed if key not in found]
    if lost:
        message = f"the index places {len(lost)} tensors that are not in their files: {some(lost)}"
        raise CheckpointError(message, where=str(where), tip="index and files are not of one checkpoint")
    return found


def some(names: list[str], separator: str = ", ", most: int = 8) -> str:
    """Return the first names of a list."""
    return separator.join(names[:most]) + (f"{separator}... ({len(names)})" if len(names) > most else "")
