"""A benchmark's file, written while it goes on: one line of JSON for the device, then one for each row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import IO, Any

import msgspec

from titan_core.jobs.bench.case import Row
from titan_core.runtime.errors import UsageError

Key = tuple[str, ...]


class Record:
    """Appends values to a file, each as soon as it is known, so that a run that is cut off leaves what it measured."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Record:
        if self.path is not None:
            self._file = open(self.path, "ab")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, *values: Any) -> None:
        """Write dataclasses, without what is empty in them."""
        if self._file is None:
            return
        for value in values:
            known = {name: x for name, x in dataclasses.asdict(value).items() if x not in (None, "", [])}
            self._file.write(msgspec.json.encode(known, enc_hook=str) + b"\n")
        self._file.flush()


class _Line(msgspec.Struct):
    """What is compared of a line: a device, or a row of the device before it."""

    device: str | None = None
    reduced: bool = False
    operation: str = ""
    shape: str = ""
    part: str = ""
    dtype: str = ""
    backend: str = ""
    seconds: float | None = None


def key(row: Row | _Line) -> Key:
    """Return what makes two rows comparable."""
    return row.operation, row.shape, row.part, row.dtype, row.backend


def read(path: str) -> dict[tuple[str, bool], dict[Key, float]]:
    """Return the seconds that a file has, by (device, reduced) and row; of several, the last."""
    found: dict[tuple[str, bool], dict[Key, float]] = {}
    rows: dict[Key, float] = {}
    try:
        with open(path, "rb") as lines:
            for number, text in enumerate(lines, 1):
                line = _line(text, f"{path}:{number}")
                if line.device is not None:
                    rows = found.setdefault((line.device, line.reduced), {})
                elif line.seconds is not None:
                    rows[key(line)] = line.seconds
    except OSError as error:
        raise UsageError(f"`--compare {path}`: {error.strerror}", tip="a file that `--save` has written") from None
    return found


def _line(text: bytes, where: str) -> _Line:
    try:
        return msgspec.json.decode(text, type=_Line)
    except msgspec.DecodeError:
        raise UsageError("not a line of a benchmark", where=where, tip="a file that `--save` has written") from None


def of_this_device(saved: Mapping[tuple[str, bool], dict[Key, float]], device: str, reduced: bool) -> dict[Key, float]:
    """Return what was measured on a device; raises `UsageError` where all was measured elsewhere."""
    if (device, reduced) not in saved:
        others = ", ".join(name for name, _ in saved) or "no device"
        raise UsageError(f"`--compare` has times of {others}, and this is {device}", tip="compare on the same device")
    return saved[device, reduced]


def check(path: str) -> None:
    """Refuse a file that cannot be written, before anything is measured."""
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise UsageError(f"`--save {path}`: {error.strerror}", tip="name a file that can be written") from None
