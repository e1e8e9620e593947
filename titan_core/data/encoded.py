"""Samples as the frozen encoders see them, stored once: moments of the latents, and both encodings of the caption.

A folder has `encoded.json`, the plan that is written first, `empty.safetensors`, the encodings of an empty caption, and
files of samples. A file is complete as soon as it is there under its name.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_core.runtime.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

PLAN = "encoded.json"
_EMPTY = "empty.safetensors"
_TENSORS = ("mean", "deviation", "text", "pooled")


@dataclass(frozen=True)
class Plan:
    """What is encoded into how many files: a call that was killed goes on only with the same plan."""

    source: str
    img_size: int
    encoders: dict[str, Any]
    samples: int
    per_file: int
    version: int = 1

    @property
    def files(self) -> int:
        """Number of files."""
        return -(-self.samples // self.per_file)

    def name(self, number: int) -> str:
        """Return the name of a file."""
        return f"samples-{number + 1:05d}-of-{self.files:05d}.safetensors"


@dataclass(frozen=True)
class EncodedSample:
    """One sample: moments of the latents (Z, h, w), text rows (S, X) and pooled text (V)."""

    mean: Tensor
    deviation: Tensor
    text: Tensor
    pooled: Tensor
    caption: str


class EncodedSamples:
    """The samples of a folder, in any order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = read_plan(folder)
        names = [self.plan.name(number) for number in range(self.plan.files)]
        lost = [name for name in names if not (folder / name).exists()]
        if lost:
            message = f"{len(lost)} of {len(names)} files are not there, first {lost[0]}"
            tip = "the same `titan data encode-flux` call goes on where it stopped"
            raise DataError(message, where=str(folder), tip=tip)
        self._files: dict[str, Any] = {}
        self._names = names
        self._ends = list(itertools.accumulate(self._open(name).get_slice("mean").get_shape()[0] for name in names))
        self.fingerprint = f"encoded/{json.dumps(asdict(self.plan), sort_keys=True)}"

    def __len__(self) -> int:
        return self._ends[-1]

    def item(self, index: int) -> EncodedSample:
        """Read a sample. Raises `DataError` where a file is damaged."""
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        try:
            file = self._open(self._names[number])
            mean, deviation, text, pooled = (file.get_slice(name)[row : row + 1][0] for name in _TENSORS)
            first, last = (int(file.get_slice("caption_ends")[i : i + 1]) for i in (row, row + 1))
            caption = bytes(file.get_slice("captions")[first:last].numpy()).decode()
        except Exception as error:  # the library's own kinds
            where = f"{self.folder / self._names[number]}, sample {row}"
            raise DataError(f"cannot be read: {error}", where=where, tip="remove the file, and encode again") from error
        return EncodedSample(mean, deviation, text, pooled, caption)

    def empty(self) -> tuple[Tensor, Tensor]:
        """Return the encodings of an empty caption, (S, X) and (V)."""
        file = self._open(_EMPTY)
        return file.get_tensor("text"), file.get_tensor("pooled")

    def _open(self, name: str) -> Any:
        """Return a file, mapped into memory; it stays open."""
        if name not in self._files:
            self._files[name] = _open(self.folder / name)
        return self._files[name]


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), tip="remove it and encode again") from error


def read_plan(folder: Path) -> Plan:
    """Read the plan of a folder. Raises `DataError`."""
    try:
        return Plan(**json.loads((folder / PLAN).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"no plan of an encoding: {error}", where=str(folder / PLAN)) from error


def write_plan(folder: Path, plan: Plan) -> None:
    """Write the plan, or look that it is the one which is there. Raises `DataError`."""
    if (folder / PLAN).exists():
        found = read_plan(folder)
        changed = [key for key, value in asdict(plan).items() if getattr(found, key) != value]
        if changed:
            message = f"another encoding was begun here: {', '.join(changed)} differ"
            raise DataError(message, where=str(folder), tip="choose another folder, or remove this one")
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".{PLAN}").write_text(json.dumps(asdict(plan), indent=2) + "\n")
    os.replace(folder / f".{PLAN}", folder / PLAN)


def write_samples(folder: Path, name: str, tensors: Mapping[str, Tensor], captions: list[str]) -> None:
    """Write a file of samples, whole or not at all."""
    import torch  # not for checks of configs, which open data sets too

    texts = [caption.encode() for caption in captions]
    ends = torch.tensor([0, *itertools.accumulate(map(len, texts))], dtype=torch.int64)
    joined = torch.frombuffer(bytearray(b"".join(texts) or b"\0"), dtype=torch.uint8)
    _save(folder, name, {**tensors, "captions": joined, "caption_ends": ends})


def write_empty(folder: Path, text: Tensor, pooled: Tensor) -> None:
    """Write the encodings of an empty caption."""
    _save(folder, _EMPTY, {"text": text, "pooled": pooled})


def _save(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({key: x.contiguous() for key, x in tensors.items()}, folder / f".{name}")
    os.replace(folder / f".{name}", folder / name)
