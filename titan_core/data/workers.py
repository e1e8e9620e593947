"""Worker processes that share the rows of each microbatch; what comes out equals what one thread reads."""

from __future__ import annotations

import multiprocessing
import queue
from collections.abc import Callable, Iterator
from typing import Any

from titan_core.runtime.errors import DataError

Share = tuple[list[Any], dict[str, Any]]


class Workers:
    """Worker w of W reads slots w, w + W, ... of every microbatch, ahead of the reader.

    `read(slots)` yields (rows, stream state) a microbatch and runs in the workers. They are forked, as sources hold
    open files and closures; construct this in the main thread.
    """

    def __init__(self, read: Callable[[range], Iterator[Share]], slots: int, workers: int, ahead: int) -> None:
        context = multiprocessing.get_context("fork")
        self.slots = slots
        self.count = min(workers, slots)
        self._queues = [context.Queue(maxsize=ahead) for _ in range(self.count)]
        self._processes = [
            context.Process(target=_work, args=(read, range(w, slots, self.count), self._queues[w]), daemon=True)
            for w in range(self.count)
        ]
        for process in self._processes:
            process.start()

    def __iter__(self) -> Iterator[Share]:
        while True:
            rows: list[Any] = [None] * self.slots
            states = []
            for worker in range(self.count):
                rows[worker :: self.count], state = self._next(worker)
                states += [state] if state else []
            yield rows, min(states, key=lambda state: state["number"]) if states else {}

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(timeout=10)

    def _next(self, worker: int) -> Share:
        """Wait for a worker's share; notice when it has died."""
        while True:
            try:
                item = self._queues[worker].get(timeout=1.0)
            except queue.Empty:
                process = self._processes[worker]
                if process.is_alive():
                    continue
                raise DataError(
                    f"data worker {worker} died with exit code {process.exitcode}",
                    tip="was it killed for memory? lower data.num_workers or data.prefetch",
                ) from None
            if isinstance(item, Exception):
                raise item
            return item


def _work(read: Callable[[range], Iterator[Share]], slots: range, out: Any) -> None:
    import signal

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
    try:
        for share in read(slots):
            out.put(share)
    except DataError as error:
        out.put(error)
    except Exception as error:  # told to the reader, which stops the run with it
        out.put(DataError(f"a data worker failed: {type(error).__name__}: {error}"))
