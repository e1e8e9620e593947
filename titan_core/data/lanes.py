"""Lanes: how rows are numbered, so that a position means the same on any number of ranks.

A run has a fixed number L of lanes. Lane j reads documents j, j + L, j + 2L, ... of the run's sequence and packs them
into rows; row r of the run is the next row of lane r mod L. A rank computes some of the rows of every step, so it
reads some of the lanes; a lane's position is two numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from titan_core.data.documents import Documents
from titan_core.data.packing import Cursor, Lane, Row
from titan_core.data.tokenizer import Tokenizer
from titan_core.runtime.errors import DataError

_MOST_EMPTY = 10_000  # documents without text, one after the other, before a data set counts as empty


@dataclass(frozen=True)
class Position:
    """Where a lane is after a row: rows made, documents finished, tokens used of the next one."""

    rows: int
    documents: int
    offset: int


@dataclass(frozen=True)
class NumberedRow:
    """A row with its lane, the lane's position after it, and a hash of its tokens."""

    row: Row
    lane: int
    after: Position
    digest: int


class LaneReader:
    """Makes rows by number; lanes open when they are first needed, from the positions that were loaded."""

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        *,
        lanes: int,
        seq_len: int,
        split_documents: bool,
        positions: dict[int, Position],
    ) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.num_lanes = lanes
        self.seq_len = seq_len
        self.split_documents = split_documents
        self.positions = dict(positions)
        self._open: dict[int, Lane] = {}
        self._cached: dict[int, tuple[int, np.ndarray]] = {}
        self._empty = 0

    def row(self, number: int) -> NumberedRow | None:
        """Return row `number` of the run; rows of its lane that lie before it are passed over."""
        lane_number, wanted = number % self.num_lanes, number // self.num_lanes
        lane = self._lane(lane_number)
        position = self.positions.get(lane_number, Position(0, 0, 0))
        row = None
        while position.rows <= wanted:
            row = lane.next_row()
            if row is None:
                return None
            position = Position(position.rows + 1, lane.cursor.documents, lane.cursor.offset)
            self.positions[lane_number] = position
        if row is None:
            raise AssertionError(f"row {number} was read before")
        return NumberedRow(row, lane_number, position, _digest(row))

    def _lane(self, number: int) -> Lane:
        if number not in self._open:
            lane = Lane(lambda n: self._tokens(number, n), self.seq_len, self.split_documents)
            start = self.positions.get(number, Position(0, 0, 0))
            lane.cursor = Cursor(start.documents, start.offset)
            self._open[number] = lane
        return self._open[number]

    def _tokens(self, lane: int, document: int) -> np.ndarray | None:
        """Return the ids of a lane's document; the last one is kept, as a row is rarely the end of it."""
        cached = self._cached.get(lane)
        if cached is not None and cached[0] == document:
            return cached[1]
        text = self.documents.item(lane + document * self.num_lanes)
        if text is None:
            return None
        ids = self.tokenizer.encode(text, add_bos=True, add_eos=True)
        tokens = np.asarray(ids, dtype=np.int32)
        self._empty = 0 if text else self._empty + 1
        if self._empty == _MOST_EMPTY:
            raise DataError(f"{_MOST_EMPTY:,} documents in a row have no text", where="data.text_key")
        self._cached[lane] = (document, tokens)
        return tokens


def _digest(row: Row) -> int:
    """Return a hash of a row's tokens and labels."""
    content = row.tokens.tobytes() + row.labels.tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def positions_to_json(positions: dict[int, Position]) -> dict[str, Any]:
    """Write positions with string keys, as JSON has them."""
    return {str(lane): [p.rows, p.documents, p.offset] for lane, p in positions.items()}


def positions_from_json(saved: dict[str, Any]) -> dict[int, Position]:
    """Read what `positions_to_json` wrote."""
    return {int(lane): Position(*numbers) for lane, numbers in saved.items()}
