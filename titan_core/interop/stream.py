"""The engine: tensors go from a source to a sink in slabs, so that memory does not depend on the model.

A sink divides its work into jobs; a job is what one rank does at a time, what a journal notes, and what
is not done again after a kill. Jobs do not depend on the number of ranks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from titan_core.interop.boxes import Index, Slab, Source, cut
from titan_core.runtime.disk import WRITE_AT_ONCE
from titan_core.runtime.distributed import ranks_from_environment
from titan_core.runtime.torch_archive import bytes_view

_MOST_THREADS = 4
# A slab that is changed exists up to four times in each thread: as read, in fp32, in the order of either side.
SLABS_IN_MEMORY = 4 * _MOST_THREADS
_TELL_SECONDS = 0.1
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


Pieces = Iterator[tuple[Slab, Iterator[memoryview]]]
"""Slabs, each as runs of bytes that are gone when the next is taken."""


class Sink(Protocol):
    """Where tensors go. Paths lie in a folder that is moved into place when all is done."""

    jobs: Sequence[Job]

    def prepare(self) -> None:
        """Make what all jobs write into (on one rank, before any job)."""
        ...

    def path(self, job: Job) -> Path:
        """Return the file that a job writes."""
        ...

    def write(self, job: Job, pieces: Pieces) -> dict[str, Any]:
        """Do a job, beside others. The record (JSON) is for `check` and `finish`. Nothing need be on the disk yet."""
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
    """Do jobs, several at once. `done` is told of each, `progress` of bytes, both in the calling thread."""
    spread(lambda job, meter: sink.write(job, _pieces(source, job, meter)), jobs, done=done, progress=progress)


def spread(
    work: Callable[[Job, Meter], Any],
    jobs: Sequence[Job],
    *,
    done: Callable[[Job, Any], None],
    progress: Callable[[int], None],
) -> None:
    """Call `work` for every job from a few threads: what takes the time (reading, hashing, writing) lets others run."""
    meter = Meter()
    with ThreadPoolExecutor(num_threads(), "titan-convert") as pool:
        waiting = {pool.submit(work, job, meter): job for job in jobs}
        try:
            while waiting:
                finished, _ = wait(waiting, timeout=_TELL_SECONDS, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(waiting.pop(future), future.result())
                progress(meter.taken())
        except BaseException:
            meter.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def num_threads() -> int:
    """Return how many jobs are done at once: one a core of this rank's, and two where there is one core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(_MOST_THREADS, cores // ranks_from_environment()[3]))


class Meter:
    """Counts the bytes that threads have dealt with, and makes them stop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0
        self._stopped = False

    def add(self, num_bytes: int) -> None:
        """Count bytes. Raises `InterruptedError` after `stop`."""
        with self._lock:
            self._bytes += num_bytes
        if self._stopped:
            raise InterruptedError

    def taken(self) -> int:
        """Return what was added since the last call."""
        with self._lock:
            found, self._bytes = self._bytes, 0
        return found

    def stop(self) -> None:
        """Let the next `add` of every thread raise."""
        self._stopped = True


def _pieces(source: Source, job: Job, meter: Meter) -> Pieces:
    """Read slabs: straight from the file where it holds them as they are wanted, else as tensors."""
    buffer = memoryview(bytearray(WRITE_AT_ONCE))
    for slab in job.slabs:
        yield slab, _chunks(source, slab, buffer, meter)


def _chunks(source: Source, slab: Slab, buffer: memoryview, meter: Meter) -> Iterator[memoryview]:
    run = source.locate(slab.name, slab.start, slab.size)
    if run is not None:
        for chunk in run.chunks(buffer):
            yield chunk
            meter.add(len(chunk))
        return
    view = bytes_view(source.read(slab.name, slab.start, slab.size).contiguous())
    for at in range(0, len(view), WRITE_AT_ONCE):
        chunk = view[at : at + WRITE_AT_ONCE]
        yield chunk
        meter.add(len(chunk))
