"""Worker processes that share the rows of each step; what comes out equals what one thread reads."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from titan_core.runtime.errors import DataError

Share = tuple[list[Any], dict[str, Any]]


class Workers:
    """Worker w of W reads slots w, w + W, ... of every step, each a row, ahead of the reader.

    `read(slots)` yields (rows, stream state) for each microbatch that has some of the slots, and runs in the workers.
    They are forked, as sources hold open files and closures. A pipe to each is all that ties them: when either side
    dies, even by `kill -9`, the other one's end of the pipe says so. Signals are left to the trainer, which may still
    need rows for the step that it finishes before it saves.
    """

    def __init__(self, read: Callable[[Sequence[int]], Iterator[Share]], rows: int, microbatches: int, workers: int):
        context = multiprocessing.get_context("fork")
        slots = rows * microbatches
        self.rows, self.microbatches = rows, microbatches
        self.count = min(workers, slots)
        self._pipes: list[Any] = []
        self._processes = []
        for worker in range(self.count):
            reader, writer = context.Pipe(duplex=False)
            self._pipes.append(reader)
            mine = range(worker, slots, self.count)
            process = context.Process(target=_work, args=(read, mine, writer, tuple(self._pipes)), daemon=True)
            process.start()
            writer.close()  # before the next fork: a pipe ends when its last writer is gone
            self._processes.append(process)
        atexit.register(self.close)

    def __iter__(self) -> Iterator[Share]:
        states: dict[int, dict[str, Any]] = {}
        for microbatch in itertools.cycle(range(self.microbatches)):
            owners = [slot % self.count for slot in range(microbatch * self.rows, (microbatch + 1) * self.rows)]
            shares: dict[int, Iterator[Any]] = {}
            for worker in set(owners):
                rows, states[worker] = self._next(worker)
                shares[worker] = iter(rows)
            yield [next(shares[worker]) for worker in owners], oldest(states.values())

    def close(self) -> None:
        """End the processes; they hold nothing that needs care."""
        atexit.unregister(self.close)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _next(self, worker: int) -> Share:
        """Wait for a worker's share; notice when it has died."""
        try:
            item = self._pipes[worker].recv()
        except (EOFError, OSError):
            process = self._processes[worker]
            process.join()
            code = process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise DataError(
                f"data worker {worker} died ({how})",
                tip="was it killed for memory? lower data.num_workers or data.prefetch",
            ) from None
        if isinstance(item, Exception):
            raise item
        return item


def oldest(states: Any) -> dict[str, Any]:
    """Return the stream state that comes first; empty where there is no stream."""
    return min((state for state in states if state), key=lambda state: state["number"], default={})


def _work(
    read: Callable[[Sequence[int]], Iterator[Share]], mine: range, out: Connection, readers: tuple[Connection, ...]
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    for reader in readers:
        reader.close()
    with contextlib.suppress(BrokenPipeError):  # the trainer is gone, or wants no more
        try:
            for share in read(mine):
                out.send(share)
        except (DataError, BrokenPipeError) as error:
            out.send(error)
        except Exception as error:  # told to the reader, which stops the run with it
            out.send(DataError(f"a data worker failed: {type(error).__name__}: {error}"))
