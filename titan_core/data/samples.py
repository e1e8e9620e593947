"""From pictures with captions to batches: each row is one sample, and its number in the run comes with it.

A sample that cannot be used is a row that does not count: what the others are, and what is drawn for them, is then the
same on any number of ranks and after any resume.

Shape letters: B batch, H and W height and width, S text rows, X numbers of a text row, V numbers of a pooled text,
Z latent channels, h and w height and width of the latents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titan_core.config.schema import Config
from titan_core.data.build import documents_of, order_of
from titan_core.data.documents import Documents
from titan_core.data.encoded import EncodedSample
from titan_core.data.lanes import NumberedRow, Position
from titan_core.data.loader import BatchLoader
from titan_core.data.open_pictures import open_pictures
from titan_core.data.order import permute
from titan_core.data.pictures import Picture, Problem, prepare
from titan_core.runtime.errors import DataError
from titan_core.runtime.events import Listener, Note, Warned, silent

Tokenize = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
_PLACES = 1 << 16  # of a part within a long side
_MOST_BAD = 64  # samples one after the other, before a data set counts as unusable


@dataclass(frozen=True)
class Row:
    """A sample by its number in the run: pixels and ids, or what encoders made of it. One that does not count has a
    black picture and no caption."""

    number: int
    caption: str = ""
    pixels: np.ndarray | None = None
    ids: tuple[np.ndarray, np.ndarray] | None = None
    encoded: EncodedSample | None = None
    problem: Problem | None = None


@dataclass(frozen=True)
class SampleBatch:
    """Samples: their numbers (B) int64, which of them count (B) bool, and either pixels (B, 3, H, W) uint8 with the ids
    of both text encoders, or moments of the latents (B, Z, h, w) with both encodings (B, S, X) and (B, V)."""

    numbers: Tensor
    counted: Tensor
    captions: list[str]
    pixels: Tensor | None = None
    ids: tuple[Tensor, Tensor] | None = None
    moments: tuple[Tensor, Tensor] | None = None
    texts: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> SampleBatch:
        """Move to a device without waiting for it."""
        if device.type == "cpu":
            return self

        def move(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(move, x))
            return x.pin_memory().to(device, non_blocking=True) if isinstance(x, Tensor) else x

        return SampleBatch(**{name: move(value) for name, value in vars(self).items()})


def collate(rows: Sequence[Row]) -> SampleBatch:
    """Stack rows."""
    numbers = torch.tensor([row.number for row in rows])
    counted = torch.tensor([row.problem is None for row in rows])
    captions = [row.caption for row in rows]
    encoded = [row.encoded for row in rows if row.encoded is not None]
    if encoded:
        mean, deviation, text, pooled = (
            torch.stack([getattr(one, name) for one in encoded]) for name in ("mean", "deviation", "text", "pooled")
        )
        return SampleBatch(numbers, counted, captions, moments=(mean, deviation), texts=(text, pooled))
    pixels = torch.from_numpy(np.stack([row.pixels for row in rows if row.pixels is not None]))
    t5, clip = zip(*(row.ids for row in rows if row.ids is not None), strict=True)
    ids = torch.from_numpy(np.stack(t5)), torch.from_numpy(np.stack(clip))
    return SampleBatch(numbers, counted, captions, pixels=pixels, ids=ids)


class SampleReader:
    """Makes row r of the r-th sample of the run's sequence; without `tokenize` a row has no ids."""

    def __init__(
        self, documents: Documents, tokenize: Tokenize | None, size: int, lanes: int, positions: dict[int, Position]
    ) -> None:
        self.documents, self.tokenize, self.size = documents, tokenize, size
        self.num_lanes, self.positions = lanes, dict(positions)

    def row(self, number: int) -> NumberedRow | None:
        """Return a row, None past the end."""
        record = self.documents.item(number)
        if record is None:
            return None
        row = self._row(number, record)
        lane, index = number % self.num_lanes, number // self.num_lanes + 1
        self.positions[lane] = Position(index, index, 0)
        return NumberedRow(row, lane, self.positions[lane], _digest(row))  # pyright: ignore[reportArgumentType]

    def _row(self, number: int, record: Picture | EncodedSample | Problem) -> Row:
        if isinstance(record, EncodedSample):
            return Row(number, record.caption, encoded=record)
        pixels = record if isinstance(record, Problem) else prepare(record, self.size, crop_place(number))
        if isinstance(pixels, Problem):
            return Row(number, "", np.zeros((3, self.size, self.size), np.uint8), self._ids(""), problem=pixels)
        assert isinstance(record, Picture)
        return Row(number, record.caption, pixels, self._ids(record.caption))

    def _ids(self, caption: str) -> tuple[np.ndarray, np.ndarray] | None:
        if self.tokenize is None:
            return None
        t5, clip = self.tokenize([caption])
        return t5[0], clip[0]


def crop_place(number: int) -> float:
    """Return where along its long side a sample is cut out, in [0, 1)."""
    return permute(number % _PLACES, _PLACES, str(number // _PLACES)) / _PLACES


def _digest(row: Row) -> int:
    content = row.caption.encode() + str(row.number).encode()
    if row.pixels is not None:
        content += row.pixels.tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class Complaints:
    """Counts the samples that do not count, and says so when their number reaches 1, 10, 100, ..."""

    def __init__(self, listener: Listener) -> None:
        self.listener, self.count, self.in_a_row = listener, 0, 0

    def __call__(self, rows: Sequence[Row]) -> None:
        """Look at the rows of a batch. Raises `DataError` when nothing but such samples comes."""
        for row in rows:
            if row.problem is None:
                self.in_a_row = 0
                continue
            self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
            if self.in_a_row == _MOST_BAD:
                message = f"{_MOST_BAD} samples in a row cannot be used, the last: {row.problem.reason}"
                raise DataError(message, where=row.problem.where, tip="`titan validate data` looks at the first ones")
            if math.log10(self.count).is_integer():
                so_far = "" if self.count == 1 else f"; {self.count} so far"
                said = f"{row.problem.reason} ({row.problem.where})"
                self.listener(Warned(f"sample {row.number} is left out: {said}{so_far}"))


# ---------------------------------------------------------------------------------------------- loaders


def build_sample_loader(
    config: Config,
    source: Any,
    tokenize: Tokenize | None,
    *,
    global_batch_size: int,
    seed: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    listener: Listener = silent,
) -> BatchLoader:
    """Build the training loader of one data rank."""
    data, size = config.data, config.training.img_size
    complaints = Complaints(listener)
    rows = global_batch_size // dp_size
    if data.num_workers > rows:
        listener(Note(f"{rows} of {data.num_workers} data workers start: a rank reads {rows} samples a step"))

    def documents(mine: Callable[[int], bool]) -> Documents:
        return documents_of(source, seed, data.shuffle_window, data.shuffle, mine, infinite=True)

    def join(found: list[Row]) -> SampleBatch:
        complaints(found)
        return collate(found)

    return BatchLoader(
        documents,
        lambda docs, lanes, positions: SampleReader(docs, tokenize, size, lanes, positions),
        local_batch_size=config.training.local_batch_size,
        global_batch_size=global_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        data=data,
        fingerprint={
            "source": source.fingerprint,
            "seed": str(seed),
            "order": order_of(source, data.shuffle, data.shuffle_window),
        },
        join=join,
    )


class SampleSlice:
    """The first samples of a data set, for validation: the same batches on any number of ranks.

    Iterating gives every rank the same number of batches; the last ones may be repeated, and then count nothing.
    Samples are read anew each time.
    """

    def __init__(
        self, config: Config, tokenize: Tokenize | None, *, dp_rank: int, dp_size: int, listener: Listener
    ) -> None:
        validation = config.validation
        self.source = open_pictures(
            validation.dataset, validation.dataset_path, config.data,
            size=config.training.img_size, validation=True, listener=listener,
        )  # fmt: skip
        self.rows, self.num_batches = validation.local_batch_size, validation.steps
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.tokenize, self.size = tokenize, config.training.img_size
        self.complaints = Complaints(listener)

    def __iter__(self) -> Iterator[SampleBatch]:
        documents = documents_of(self.source, 0, 1, False, lambda number: True, infinite=False)
        reader = SampleReader(documents, self.tokenize, self.size, 1, {})
        last: SampleBatch | None = None
        mine = number = 0
        while number != self.num_batches:
            wanted = number % self.dp_size == self.dp_rank
            first = number * self.rows
            if wanted or last is None:  # of others' batches one is read, to have something that is not counted
                rows: list[Any] = [one.row for n in range(first, first + self.rows) if (one := reader.row(n))]
                if not rows:
                    break
                last = collate(rows)
                if wanted:
                    self.complaints(rows)
                    mine += 1
                    yield last
            elif not self._there(documents, first):
                break
            number += 1
        if last is None:
            raise DataError("the validation data is empty", where="validation.dataset")
        for _ in range(-(-number // self.dp_size) - mine):
            yield replace(last, counted=torch.zeros_like(last.counted))

    def _there(self, documents: Documents, first: int) -> bool:
        """Is there a batch that begins with this sample? Of a stream it is read over."""
        if hasattr(self.source, "__len__"):
            return first < len(self.source)
        every = [documents.item(n) for n in range(first, first + self.rows)]
        return every[0] is not None
