"""Text files on disk as documents; large files are cut into pieces, so that one of them feeds many lanes."""

from __future__ import annotations

import bisect
import glob
import hashlib
import itertools
from pathlib import Path
from typing import BinaryIO

from titan_core.runtime.errors import DataError

FORMATS = {".txt": "text", ".md": "text", ".py": "text", ".json": "json", ".jsonl": "json",
           ".gz": "json", ".zst": "json", ".parquet": "parquet"}  # fmt: skip
# About 10,000 tokens. As one document, a book would be the next document of every lane: a batch of equal rows.
PIECE_BYTES = 1 << 15
# Looking into files costs a millisecond each on a shared disk: of many, this many are looked into, evenly spread.
_LOOKED_INTO = 1000
_SAMPLE_BYTES = 4096


class TextFiles:
    """Text files, each one document, or several of about `piece_bytes` that begin at line starts if it is larger."""

    def __init__(self, files: list[Path], piece_bytes: int = PIECE_BYTES) -> None:
        self._files = files
        self._piece = piece_bytes
        self._sizes = [file.stat().st_size for file in files]
        counts = (max(1, size // piece_bytes) for size in self._sizes)
        self._ends = list(itertools.accumulate(counts))
        self.fingerprint = f"text/{piece_bytes}/{fingerprint(files)}"

    def __len__(self) -> int:
        return self._ends[-1]

    def item(self, index: int) -> str:
        """Return one document; bytes that are not UTF-8 are replaced."""
        number = bisect.bisect_right(self._ends, index)
        before = self._ends[number - 1] if number else 0
        first, last = index == before, index == self._ends[number] - 1
        try:
            with self._files[number].open("rb") as file:
                start = 0 if first else self._cut(file, index - before)
                end = self._sizes[number] if last else self._cut(file, index - before + 1)
                file.seek(start)
                return file.read(end - start).decode("utf-8", errors="replace")
        except OSError as error:
            raise DataError(f"cannot read `{self._files[number]}`: {error.strerror}") from error

    def _cut(self, file: BinaryIO, number: int) -> int:
        """Return where piece `number` begins: the first line start in the half piece from its place on, or a
        character's. It depends on a few bytes only, so nothing is indexed, and no piece is empty.
        """
        place = number * self._piece
        file.seek(place)
        window = file.read(self._piece // 2)
        newline = window.find(b"\n")
        if newline >= 0:
            return place + newline + 1
        return place + next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)


def local_files(path: str, where: str) -> list[Path]:
    """Return the data files that a file, folder or glob names, sorted; hidden ones do not count."""
    place = Path(path)
    if place.is_dir():
        files = [p for p in sorted(place.rglob("*")) if p.is_file() and p.suffix in FORMATS and not _hidden(p, place)]
    elif place.is_file():
        files = [place]
    else:
        files = [Path(p) for p in sorted(glob.glob(path, recursive=True)) if Path(p).is_file()]
    if not files:
        kinds = ", ".join(FORMATS)
        what = "holds no data files" if place.is_dir() else "does not exist"
        raise DataError(f"`{path}` {what}", where=where, tip=f"titan reads {kinds}")
    if all(file.stat().st_size == 0 for file in files):
        raise DataError(f"`{path}` is empty", where=where)
    return files


def refuse_other_than_text(files: list[Path], where: str) -> None:
    """Raise `DataError` if a text file is compressed, binary, or in another encoding than UTF-8."""
    for file in _some(files):
        sample = _samples(file)[0]
        if file.suffix in (".gz", ".zst"):
            raise DataError(f"`{file}` is compressed text", where=where, tip="unpack it, or make it lines of JSON")
        text = sample.decode("utf-8", errors="replace")
        if 16 * (text.count("\ufffd") + text.count("\0")) > len(text) + 16:  # pages of the web have a few
            tip = "convert it (`iconv -t UTF-8`), or name the text files with a glob"
            raise DataError(f"`{file}` is not UTF-8 text", where=where, tip=tip)


def of_one_format(files: list[Path], path: str, where: str) -> tuple[str, list[Path]]:
    """Return the files' format, and the files without a read-me that lies beside tables.

    Raises `DataError` if they have several formats.
    """
    formats = {file: _format(file) for file in files}
    if set(formats.values()) != {"text"}:
        formats = {file: kind for file, kind in formats.items() if file.name != "README.md"}
    if len(set(formats.values())) > 1:
        mixed = ", ".join(sorted({file.suffix for file in formats}))
        raise DataError(f"`{path}` mixes formats: {mixed}", where=where, tip="name one of them, with a glob")
    return next(iter(formats.values())), list(formats)


def fingerprint(files: list[Path]) -> str:
    """Return a hash of the names and sizes of files, and of some bytes at the start, middle and end of some of them."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{_size(file)};".encode())
    for file in _some(files):
        for sample in _samples(file):
            digest.update(sample)
    return digest.hexdigest()[:16]


def _some(files: list[Path]) -> list[Path]:
    return files[:: -(-len(files) // _LOOKED_INTO)]


def _samples(file: Path) -> list[bytes]:
    """Return some bytes at the start, middle and end of a file."""
    last = max(0, _size(file) - _SAMPLE_BYTES)
    samples = []
    try:
        with file.open("rb") as opened:
            for place in (0, last // 2, last):
                opened.seek(place)
                samples.append(opened.read(_SAMPLE_BYTES))
    except OSError as error:
        raise DataError(f"cannot read `{file}`: {error.strerror}") from error
    return samples


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read `{file}`: {error.strerror}") from error


def _format(file: Path) -> str:
    """Return a file's format by its name; `a.txt.gz` is text, `a.json.gz` and `a.gz` are lines of JSON."""
    compressed = file.suffix in (".gz", ".zst")
    inner = Path(file.stem).suffix
    return FORMATS.get(inner if compressed and inner else file.suffix, FORMATS.get(file.suffix, "text"))


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
