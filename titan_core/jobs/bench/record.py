"""A benchmark's file, written while it goes on: one line of JSON for the device, then one for each row."""

from __future__ import annotations

import dataclasses
from typing import IO, Any

import msgspec

from titan_core.runtime.errors import UsageError


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


def check(path: str) -> None:
    """Refuse a file that cannot be written, before anything is measured."""
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise UsageError(f"`--save {path}`: {error.strerror}", tip="name a file that can be written") from None
