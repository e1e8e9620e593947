"""Batches for one data rank, prepared in the background, with a position that outlives the ranks."""

from __future__ import annotations

import hashlib
import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from titan_core.config import schema
from titan_core.data.documents import Documents
from titan_core.data.lanes import (
    NumberedRow,
    Position,
    positions_from_json,
    positions_to_json,
)
from titan_core.data.workers import Share, Workers, oldest
from titan_core.runtime.errors import DataError

_MODULUS = 1 << 64


@dataclass(frozen=True)
class Batch:
    """Rows of tokens (B, T) int64, what follows them (B, T) int64, -100 where nothing counts, and document numbers
    (B, T) int32, -1 for padding.

    `tokens_ahead` and `labels_ahead` (B, T, K) are what layers of multi-token prediction are told and should predict.
    Where rows are cut, `documents` stay whole, `positions` (T) say which tokens of the rows these are, and `queries`
    which of them a mask is for; None is all, in order.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor
    positions: Tensor | None = None
    queries: Tensor | None = None
    tokens_ahead: Tensor | None = None
    labels_ahead: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Move to a device without waiting for it."""
        if device.type == "cpu":
            return self
        moved = (x.pin_memory().to(device, non_blocking=True) for x in (self.tokens, self.labels, self.documents))
        return Batch(*moved)


def collate(rows: list[Any]) -> Batch:
    """Stack rows into a batch."""
    parts = ([getattr(row, name) for row in rows] for name in ("tokens", "labels", "documents"))
    return Batch(*(torch.from_numpy(np.stack(part)) for part in parts))


class RowReader(Protocol):
    """Makes rows by number, each in one of so many lanes; `positions` is where the lanes are."""

    num_lanes: int
    positions: dict[int, Position]

    def row(self, number: int) -> NumberedRow | None:
        """Return a row, None past the end of the documents."""
        ...


class BatchLoader:
    """An endless iterator over the microbatches of one data rank.

    Step s computes rows s*G .. s*G + G - 1 of the run, G being the global batch; rank d of D the d-th part of them, in
    microbatches of `local_batch_size`. So the rows of a step are the same for any D, microbatch size or number of
    workers. `documents(mine)` makes the sequence of documents, `mine` telling which of them will be asked for;
    `reader(documents, lanes, positions)` makes rows of them, and `join` a batch of rows. `fingerprint` is what must not
    change in a run.
    """

    def __init__(
        self,
        documents: Callable[[Callable[[int], bool]], Documents],
        reader: Callable[[Documents, int, dict[int, Position]], RowReader],
        *,
        local_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        data: schema.Data,
        fingerprint: dict[str, str],
        join: Callable[[list[Any]], Any] = collate,
    ) -> None:
        self.make_documents = documents
        self.make_reader = reader
        self.join = join
        self.local_batch_size = local_batch_size
        self.global_batch_size = global_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.data = data
        self.fingerprint = fingerprint
        self.wait_seconds = 0.0
        self.rows = 0
        self.digest = 0
        self._num_lanes = global_batch_size
        self._positions: dict[int, Position] = {}
        self._stream_state: dict[str, Any] = {}
        self._microbatch = 0
        self._producer: _Producer | None = None
        self._workers: Workers | None = None

    @property
    def microbatches(self) -> int:
        """Microbatches a step."""
        return self.global_batch_size // self.dp_size // self.local_batch_size

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Return the next microbatch; waits for it, and counts the wait."""
        if self._producer is None:
            self._start()
        assert self._producer is not None
        began = time.perf_counter()
        rows, stream_state = self._producer.get()
        self.wait_seconds += time.perf_counter() - began
        for numbered in rows:
            self._positions[numbered.lane] = numbered.after
            self.digest = (self.digest + numbered.digest) % _MODULUS
        self._stream_state = stream_state
        self._microbatch += 1
        if self._microbatch == self.microbatches:
            self._microbatch = 0
            self.rows += self.global_batch_size
        return self.join([numbered.row for numbered in rows])

    def state_dict(self) -> dict[str, Any]:
        """Return the position of what has been handed out, of this rank's lanes; call it between steps."""
        assert self._microbatch == 0, "a position in the middle of a step"
        return {
            "version": 1,
            "rank": self.dp_rank,
            "rows": self.rows,
            "lanes": self._num_lanes,
            "positions": positions_to_json(self._positions),
            "digest": self.digest,
            "stream": self._stream_state,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a merged position, on any number of ranks and workers. Raises `DataError` if the data changed."""
        for part, value in self.fingerprint.items():
            if state["fingerprint"].get(part) != value:
                raise DataError(
                    f"the {part} of the data is not the one that the run was started with "
                    f"({state['fingerprint'].get(part)}, now {value})",
                    where="the checkpoint's data position",
                    tip="give the same data, or leave it out: `--checkpoint.exclude_from_loading dataloader`",
                )
        self.close()
        self.rows = state["rows"]
        self._num_lanes = state["lanes"]
        self._positions = positions_from_json(state["positions"])
        self._stream_state = state["stream"]
        self._microbatch = 0
        self.digest = state["digest"] if self.dp_rank == 0 else 0

    def skip_steps(self, steps: int) -> None:
        """Pass over the rows of some steps, as after a rollback past bad data."""
        for _ in range(steps * self.microbatches):
            next(self)

    def close(self) -> None:
        """Stop the background work."""
        if self._producer is not None:
            self._producer.stop()
        if self._workers is not None:
            self._workers.close()  # a producer that waits for them wakes up
        if self._producer is not None:
            self._producer.join()
        self._producer = self._workers = None

    def _start(self) -> None:
        if self.data.num_workers:
            self._workers = Workers(self.read, self.local_batch_size, self.microbatches, self.data.num_workers)
            self._producer = _Producer(iter(self._workers), self.data.prefetch)
        else:
            slots = range(self.local_batch_size * self.microbatches)
            self._producer = _Producer(self.read(slots), self.data.prefetch)

    def read(self, slots: Sequence[int]) -> Iterator[Share]:
        """Yield some of this rank's slots of every step, from the current position on, and the stream's state.

        Each item is one microbatch's; those with none of the slots are left out.
        """
        lanes, positions = self._lanes_of(slots), dict(self._positions)
        begun = {lane: position.documents for lane, position in positions.items()}

        def mine(number: int) -> bool:
            document, lane = divmod(number, self._num_lanes)
            return lane in lanes and document >= begun.get(lane, 0)

        documents = self.make_documents(mine)
        if self._stream_state:
            documents.load(self._stream_state)
        reader = self.make_reader(documents, self._num_lanes, positions)
        groups = [list(group) for _, group in itertools.groupby(slots, lambda slot: slot // self.local_batch_size)]
        for start in itertools.count(self._first_row(), self.global_batch_size):
            for group in groups:
                rows = [row for slot in group if (row := reader.row(start + slot)) is not None]
                assert len(rows) == len(group), "the documents of a run do not end"
                yield rows, documents.state(_oldest(reader, lanes))

    def _first_row(self) -> int:
        """Return the number of this rank's first row of the next step."""
        return self.rows + self.dp_rank * (self.global_batch_size // self.dp_size)

    def _lanes_of(self, slots: Sequence[int]) -> set[int]:
        """Return the lanes that some slots ever touch: one each, but when the global batch changed, they wander."""
        first, lanes = self._first_row(), self._num_lanes
        stride = math.gcd(self.global_batch_size, lanes)
        return {(first + slot + step) % lanes for slot in slots for step in range(0, lanes, stride)}


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the positions of all data ranks into the run's: of each lane the farthest, of streams the earliest.

    Ranks that read the same data, as those of one tensor-parallel group do, count once.
    """
    by_rank = {state["rank"]: state for state in states}
    positions: dict[str, Any] = {}
    for state in by_rank.values():
        for lane, position in state["positions"].items():
            if position[0] > positions.get(lane, [-1])[0]:
                positions[lane] = position
    merged = {key: value for key, value in states[0].items() if key != "rank"}
    merged["positions"] = dict(sorted(positions.items(), key=lambda item: int(item[0])))
    merged["digest"] = sum(state["digest"] for state in by_rank.values()) % _MODULUS
    merged["stream"] = oldest(state["stream"] for state in by_rank.values())
    return merged


def data_hash(state: dict[str, Any]) -> str:
    """Return a short hash of everything that was read so far: equal if and only if the same rows were."""
    return hashlib.sha256(f"{state['rows']}/{state['digest']}".encode()).hexdigest()[:16]


def _oldest(reader: RowReader, lanes: set[int]) -> int:
    """Return the first document that a lane may still ask for."""
    start = Position(0, 0, 0)
    return min(lane + reader.positions.get(lane, start).documents * reader.num_lanes for lane in lanes)


class _Producer:
    """A daemon thread that runs an iterator ahead of its consumer."""

    def __init__(self, source: Iterator[Any], ahead: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(source,), daemon=True, name="titan-data")
        self._thread.start()

    def get(self) -> Any:
        """Return the next item; an error of the thread is raised here, again whenever it is asked."""
        item = self._failed or self._queue.get()
        if isinstance(item, BaseException):
            self._failed = item
            raise item
        return item

    def stop(self) -> None:
        """Tell the thread to end."""
        self._stop.set()

    def join(self) -> None:
        """Wait until it has ended; one that hangs in a read is left behind."""
        self._thread.join(timeout=10)

    def _run(self, source: Iterator[Any]) -> None:
        try:
            for item in source:
                if not self._put(item):
                    return
            self._put(DataError("the data ended, though it should begin again"))
        except Exception as error:  # handed to the consumer, which raises it
            self._put(error)
        except BaseException as error:  # a panic of a library in Rust; without a word of it the consumer would hang
            self._put(DataError(f"reading data failed: {type(error).__name__}: {error}"))

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
