"""Tar files in webdataset's layout: members of one name and several endings are one sample (`0001.jpg`, `0001.txt`).

The headers are read once, so that samples can be read in any order, as a resume and a shuffle want it. A file that is
cut off or damaged gives what comes before the damage.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_core.data.pictures import IMAGE_ENDINGS, Picture, Problem
from titan_core.runtime.errors import DataError
from titan_core.runtime.events import Listener, Warned

_BLOCK = 512  # of tar: headers begin at multiples of it


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Sample:
    image: _Member
    caption: _Member


class TarFiles:
    """The samples of tar files that have an image and a caption, by the endings of their members."""

    def __init__(self, files: Sequence[Path], image: str, caption: str, where: str, listener: Listener) -> None:
        self._files = list(files)
        endings = IMAGE_ENDINGS if image == "jpg" else (f".{image}",)
        self._samples: list[list[_Sample]] = []
        for file in files:
            members, damage = _members(file)
            if damage is not None:
                listener(Warned(f"{file} is damaged after {len(members)} members, which are used: {damage}"))
            self._samples.append(_pair(members, endings, f".{caption}"))
        self._ends = list(itertools.accumulate(map(len, self._samples)))
        if not self._ends or self._ends[-1] == 0:
            tip = f"members NAME.{image} and NAME.{caption} make a sample; data.image_key and caption_key say others"
            raise DataError("no sample in the tar files", where=where, tip=tip)
        digest = hashlib.sha256()
        for file, samples in zip(files, self._samples, strict=True):
            digest.update(f"{file.name};{file.stat().st_size};{len(samples)};".encode())
        self.fingerprint = f"tar/{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return self._ends[-1]

    def item(self, index: int) -> Picture | Problem:
        """Read a sample."""
        number = bisect.bisect_right(self._ends, index)
        sample = self._samples[number][index - (self._ends[number - 1] if number else 0)]
        where = f"{self._files[number]}, member {sample.image.name}"
        try:
            with self._files[number].open("rb") as file:
                image, caption = (_read(file, member) for member in (sample.image, sample.caption))
            return Picture(image, caption.decode("utf-8").strip(), where)
        except (OSError, UnicodeDecodeError, EOFError) as error:
            return Problem(f"cannot be read: {error}", where)


def _read(file, member: _Member) -> bytes:
    file.seek(member.offset)
    content = file.read(member.size)
    if len(content) != member.size:
        raise EOFError("the file ends in the middle of it")
    return content


def _members(path: Path) -> tuple[list[_Member], str | None]:
    """Return the files in a tar, and what is wrong with the rest of it."""
    found: list[_Member] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isreg():
                    found.append(_Member(info.name, info.offset_data, info.size))
            end = tar.offset  # pyright: ignore[reportAttributeAccessIssue]
        return found, _damage(path, end)
    except (tarfile.TarError, OSError, EOFError) as error:
        return found, str(error) or type(error).__name__


def _damage(path: Path, end: int) -> str | None:
    """Say what is wrong where the library found no further header; it takes anything for the end of the archive."""
    with path.open("rb") as file:
        file.seek(end)
        return f"no header at byte {end}" if file.read(_BLOCK).strip(b"\0") else None


def _pair(members: list[_Member], image_endings: Sequence[str], caption_ending: str) -> list[_Sample]:
    """Join members by their names up to the first dot of the last part, as webdataset does."""
    images: dict[str, _Member] = {}
    captions: dict[str, _Member] = {}
    for member in members:
        folder, slash, file = member.name.rpartition("/")
        stem, dot, ending = file.partition(".")
        key, ending = f"{folder}{slash}{stem}", f"{dot}{ending}".lower()
        if ending in image_endings:
            images.setdefault(key, member)
        elif ending == caption_ending:
            captions.setdefault(key, member)
    return [_Sample(image, captions[key]) for key, image in images.items() if key in captions]
