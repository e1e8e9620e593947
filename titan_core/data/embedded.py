"""Text that every machine with Python has: the source and docs of the standard library.

It makes the first run possible without network, account or download. It differs between Python versions, so its
fingerprint is part of a run's data position.
"""

from __future__ import annotations

import hashlib
import sysconfig
from functools import cache
from pathlib import Path
from typing import Literal

_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "lib2to3",
    "__pycache__",
}
Split = Literal["train", "validation"]


@cache
def files(split: Split) -> tuple[Path, ...]:
    """Return the files of a split, in a fixed order; one file in twenty, by a hash of its name, is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(relative.parts):
            held_out = hashlib.sha256(relative.as_posix().encode()).digest()[0] % 20 == 0
            if held_out == (split == "validation"):
                found.append(path)
    return tuple(found)


def text(path: Path) -> str:
    """Return a file's text; the few bytes that are not UTF-8 are replaced."""
    return path.read_text(encoding="utf-8", errors="replace")


@cache
def fingerprint(split: Split) -> str:
    """Return a hash of the names and sizes of a split's files."""
    digest = hashlib.sha256()
    for path in files(split):
        digest.update(f"{path.name}:{path.stat().st_size};".encode())
    return digest.hexdigest()[:16]
