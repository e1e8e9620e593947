"""The engine: tensors go from a source to a sink in slabs, so that memory does not depend on the model.

A sink divides its work into jobs; a job is what one rank does at a time, what a journal notes, and what
is not done again after a kill. Jobs do not depend on the number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from titan_core.interop.boxes import Index, Slab, Source, cut

_READ_AHEAD = 2  # slabs that are read while one is written
# A slab exists up to seven times at once: read ahead, as bytes and as numbers, in the order of either side.
SLABS_IN_MEMORY = 8
_LARGEST_SLAB = 64 << 20
_FEWEST_JOBS = 64  # so many ranks have something to do, whatever their number
_JOB_BYTES = 16 << 20, 1 << 30


@dataclass(frozen=True)
class Job:
    """Slabs that follow one another in one output file."""

    number: int
    file: str
    slabs: tuple[Slab, ...]
    num_bytes: int


Pieces = Iterator[tuple[Slab, Tensor]]


class Sink(Protocol):
    """Where tensors go. Paths lie in a folder that is moved into place when all is done."""

    jobs: Sequence[Job]

    def prepare(self) -> None:
        """Make what all jobs write into (on one rank, before any job)."""
        ...

    def write(self, job: Job, pieces: Pieces) -> dict[str, Any]:
        """Do a job. The record (JSON) is for `check` and `finish`. What is written need not be on the disk yet."""
        ...

    def check(self, job: Job, record: dict[str, Any]) -> list[str]:
        """Read what a job wrote, compare it with the record, and return the problems."""
        ...

    def finish(self, records: dict[int, dict[str, Any]]) -> None:
        """Write what describes the whole (on one rank, after all jobs)."""
        ...


def slab_limit(memory: int) -> int:
    """Return the bytes of a slab for a budget of memory."""
    return max(1 << 20, min(memory // SLABS_IN_MEMORY, _LARGEST_SLAB))


def job_limit(total: int) -> int:
    """Return the bytes of a job for a checkpoint's size."""
    low, high = _JOB_BYTES
    return max(low, min(total // _FEWEST_JOBS, high))


def divide(names: Sequence[str], index: Index, slab: int, job: int) -> Iterator[tuple[tuple[Slab, ...], int]]:
    """Cut tensors into slabs and gather these into jobs."""
    taken: list[Slab] = []
    size = 0
    for name in names:
        shape, dtype = index[name]
        for piece in cut(name, shape, dtype.itemsize, min(slab, job)):
            num_bytes = piece.numel * dtype.itemsize
            if taken and size + num_bytes > job:
                yield tuple(taken), size
                taken, size = [], 0
            taken.append(piece)
            size += num_bytes
    if taken:
        yield tuple(taken), size


def share(jobs: Sequence[Job], rank: int, size: int) -> list[Job]:
    """Return one rank's jobs: neighbours, so that what they read lies together, and about equal bytes for each."""
    total = sum(job.num_bytes for job in jobs) or 1
    taken, before = [], 0
    for job in jobs:
        middle = before + job.num_bytes / 2
        if min(int(middle * size / total), size - 1) == rank:
            taken.append(job)
        before += job.num_bytes
    return taken


def run(
    source: Source,
    sink: Sink,
    jobs: Sequence[Job],
    *,
    done: Callable[[Job, dict[str, Any]], None],
    progress: Callable[[int], None],
) -> None:
    """Do jobs one after the other. `done` is told of each, `progress` of each slab's bytes."""
    with ThreadPoolExecutor(1, "titan-read") as pool:
        for job in jobs:
            pieces = _read_ahead(source, job, pool, progress)
            done(job, sink.write(job, pieces))


def _read_ahead(source: Source, job: Job, pool: ThreadPoolExecutor, progress: Callable[[int], None]) -> Pieces:
    waiting: deque[tuple[Slab, Future[Tensor]]] = deque()
    todo = iter(job.slabs)
    try:
        while True:
            while len(waiting) < _READ_AHEAD and (slab := next(todo, None)) is not None:
                waiting.append((slab, pool.submit(source.read, slab.name, slab.start, slab.size)))
            if not waiting:
                return
            slab, future = waiting.popleft()
            tensor = future.result().contiguous()
            del future
            yield slab, tensor
            progress(tensor.nbytes)
            del tensor
    finally:
        for _, future in waiting:
            future.cancel()
