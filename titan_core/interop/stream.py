"""The engine: tensors go from a source to a sink in slabs, so that memory does not depend on the model.

A sink divides its work into jobs; a job is what one rank does at a time, what a journal notes, and what
is not done again after a kill. Jobs do not depend on the number of ranks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from titan_core.interop.boxes import Index, Slab, Source, cut
from titan_core.runtime.disk import WRITE_AT_ONCE
from titan_core.runtime.errors import CheckpointError
from titan_core.runtime.torch_archive import bytes_view

_THREADS = 4  # jobs at once: more than two cores, since most of the time they wait for the disk
# A slab that is changed exists up to four times in each thread: as read, in fp32, in the order of either side.
SLABS_IN_MEMORY = 4 * _THREADS
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
    verify: bool,
    done: Callable[[Job, dict[str, Any]], None],
    progress: Callable[[int], None],
) -> None:
    """Do jobs, several at once; with `verify` each is read again. Raises `CheckpointError` if that differs.

    `done` is told of each, `progress` of bytes, both in the calling thread. While one thread waits for the disk,
    others read, change, hash and write.
    """
    meter = Meter()

    def work(job: Job) -> dict[str, Any]:
        record = sink.write(job, _pieces(source, job, meter))
        problems = sink.check(job, record) if verify else []
        if problems:
            message = f"{len(problems)} pieces differ from what was written: {'; '.join(problems[:4])}"
            raise CheckpointError(message, tip="the disk or the memory of this machine is not sound")
        return record

    with ThreadPoolExecutor(_THREADS, "titan-convert") as pool:
        waiting = {pool.submit(work, job): job for job in jobs}
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
