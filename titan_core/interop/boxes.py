"""Boxes: rectangular regions of a tensor, as (start, size) a dimension; and cutting tensors into pieces that fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from titan_core.interop.files import Run

Shape = tuple[int, ...]
Index = Mapping[str, tuple[Shape, torch.dtype]]
# Cuts fall on multiples of this many rows where they can: heads (64, 128, 256 rows) and fp8 blocks (128) stay whole.
_ALIGNMENT = 256


class Source(Protocol):
    """Tensors that can be read region by region: a file, a checkpoint, or a view of another source."""

    index: Index
    """Name -> (shape, dtype), known before anything is read."""

    def read(self, name: str, start: Shape, size: Shape) -> Tensor:
        """Return a region of a tensor on the CPU. Raises `CheckpointError`."""
        ...

    def locate(self, name: str, start: Shape, size: Shape) -> Run | None:
        """Return where a file holds the bytes that `read` would return, one after the other; None if none does."""
        ...


@dataclass(frozen=True)
class Slab:
    """A region of a tensor that lies in one run where the tensor is stored row by row."""

    name: str
    start: Shape
    size: Shape

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    def first(self, shape: Shape) -> int:
        """Return how many elements come before it in the tensor, whose shape is given."""
        found = 0
        for length, start in zip(shape, self.start, strict=True):
            found = found * length + start
        return found


def read_whole(source: Source, name: str) -> Tensor:
    """Return a whole tensor."""
    shape, _ = source.index[name]
    return source.read(name, (0,) * len(shape), shape)


def overlap(a: int, size_a: int, b: int, size_b: int) -> tuple[int, int]:
    """Return start and size of what two ranges share; the size is 0 if nothing."""
    start = max(a, b)
    return start, max(0, min(a + size_a, b + size_b) - start)


def cut(name: str, shape: Shape, itemsize: int, limit: int) -> Iterator[Slab]:
    """Cut a tensor into slabs of at most `limit` bytes, in the order in which they are stored."""
    if math.prod(shape) * itemsize <= limit or not shape:
        yield Slab(name, (0,) * len(shape), tuple(shape))
        return
    row = math.prod(shape[1:]) * itemsize
    if row > limit:
        for i in range(shape[0]):
            for inner in cut(name, shape[1:], itemsize, limit):
                yield Slab(name, (i, *inner.start), (1, *inner.size))
        return
    rows = limit // row
    if rows > _ALIGNMENT:
        rows -= rows % _ALIGNMENT
    for i in range(0, shape[0], rows):
        count = min(rows, shape[0] - i)
        yield Slab(name, (i, *(0 for _ in shape[1:])), (count, *shape[1:]))


def runs(shape: Sequence[int], start: Sequence[int], size: Sequence[int]) -> tuple[int, Iterator[int]]:
    """Return the length of the unbroken runs of a region stored row by row, and where each starts, in elements."""
    full = len(shape)
    while full > 0 and size[full - 1] == shape[full - 1]:
        full -= 1
    outer = max(full - 1, 0)  # dimensions that are walked through; the rest of the region is one run
    length = math.prod(size[outer:])
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    base = sum(s * stride for s, stride in zip(start, strides, strict=True))
    return length, _walk(base, size[:outer], strides[:outer])


def _walk(base: int, size: Sequence[int], strides: Sequence[int]) -> Iterator[int]:
    if not size:
        yield base
        return
    for i in range(size[0]):
        yield from _walk(base + i * strides[0], size[1:], strides[1:])
