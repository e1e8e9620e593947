"""Text that every machine with Python has: the source and docs of the standard library.

It makes the first run possible without network, account or download. It differs between Python versions, so its
fingerprint is part of a run's data position.
"""

from __future__ import annotations

import hashlib
import os
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
    found: list[tuple[str, ...]] = []
    for folder, inner, names in os.walk(root):
        inner[:] = set(inner) - _LEFT_OUT  # not entered: site-packages may hold a hundred times as many files
        above = Path(folder).relative_to(root).parts
        found += [(*above, name) for name in names if name.endswith(".py")]
    held_out = split == "validation"
    return tuple(root.joinpath(*parts) for parts in sorted(found) if _is_held_out("/".join(parts)) == held_out)


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] % 20 == 0


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
