"""Files written and read past the page cache: any place, any length, several writers, and where that cannot be."""

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titan_core.runtime import disk

CONTENT = os.urandom(40_000)
CUTS = (0, 1, 4095, 4096, 9000, 16384, 16385, 40_000)


@pytest.mark.parametrize("way", ["uncached", "cached", "refused"])
def test_runs_of_any_place_and_length(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_BLOCK", 8192)
    if way == "cached":
        monkeypatch.setattr(disk, "_UNCACHED", 0)
    if way == "refused":  # a file system that opens such files and then wants other blocks
        opened: list[int] = []

        def uncached(path: Path, flags: int) -> int:
            opened.append(os.open(path, flags))
            return opened[-1]

        def refusing(plain: Callable[..., int]) -> Callable[..., int]:
            def call(handle: int, *rest: Any) -> int:
                if handle in opened:
                    opened.remove(handle)  # once: the number may be that of the file that is opened instead
                    raise OSError(errno.EINVAL, "Invalid argument")
                return plain(handle, *rest)

            return call

        monkeypatch.setattr(disk, "_open_uncached", uncached)
        for name in ("pwrite", "preadv"):
            monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    path = tmp_path / "file"
    path.write_bytes(bytes(len(CONTENT)))
    runs = list(itertools.pairwise(CUTS))
    with disk.UncachedWriter(path) as odd, disk.UncachedWriter(path) as even:
        for number, (start, end) in enumerate(runs):
            file = odd if number % 2 else even
            file.seek(start)
            for at in range(start, end, 3000):
                file.write(CONTENT[at : min(at + 3000, end)])
    assert path.read_bytes() == CONTENT
    with disk.UncachedReader(path) as file:
        for start, end in [*runs, *reversed(runs)]:
            assert b"".join(bytes(part) for part in file.read(start, end - start)) == CONTENT[start:end]
        assert b"".join(bytes(part) for part in file.read(39_990, 100)) == CONTENT[39_990:]
        assert list(file.read(50_000, 10)) == []


def test_a_new_file_is_emptied_first(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    with disk.UncachedWriter(path, new=True) as file:
        file.write(CONTENT)
    assert path.read_bytes() == CONTENT
