"""From documents to rows: the token stream of one lane, cut so that no token is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

IGNORE = -100
PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class Row:
    """One sequence: inputs (T), what follows each (T, -100 where nothing counts), and document numbers (T)."""

    tokens: np.ndarray
    labels: np.ndarray
    documents: np.ndarray


@dataclass
class Cursor:
    """How far a lane has read: documents finished, and tokens used of the next one."""

    documents: int = 0
    offset: int = 0


class Lane:
    """One stream of documents, packed into rows of `seq_len` tokens.

    `read(n)` returns the tokens of the lane's n-th document, or None after the last one. Rows overlap by one token:
    the last label of a row is the first input of the next, so every token but the first is a label once.
    """

    def __init__(self, read: Callable[[int], np.ndarray | None], seq_len: int, split_documents: bool) -> None:
        self.read = read
        self.seq_len = seq_len
        self.split_documents = split_documents
        self.cursor = Cursor()

    def next_row(self) -> Row | None:
        """Return the next row, or None at the end of a finite stream (a last, partly filled row is padded)."""
        while True:
            pieces, room, position, ended = self._collect()
            if pieces and room < self.seq_len:
                break
            self.cursor = position  # one token alone predicts nothing
            if ended:
                return None
        self.cursor = self._step_back(position) if room == 0 else position
        return self._row(pieces)

    def _collect(self) -> tuple[list[np.ndarray], int, Cursor, bool]:
        """Return the pieces of the next row, the room they leave, where they end, and whether the stream ends there."""
        pieces: list[np.ndarray] = []
        room = self.seq_len + 1
        position = Cursor(self.cursor.documents, self.cursor.offset)
        while room > 0:
            document = self.read(position.documents)
            if document is None:
                return pieces, room, position, True
            rest = document[position.offset :]
            if self._must_wait(document, position, room, pieces):
                break
            if len(rest) < room:
                pieces.append(rest)
                room -= len(rest)
                position = Cursor(position.documents + 1, 0)
            else:
                pieces.append(rest[:room])
                position = Cursor(position.documents, position.offset + room)
                room = 0
        return pieces, room, position, False

    def _must_wait(self, document: np.ndarray, position: Cursor, room: int, pieces: list[np.ndarray]) -> bool:
        """With whole documents, one that fits in a row of its own is not begun in a row that is too full for it."""
        fits_alone = len(document) <= self.seq_len + 1
        unstarted = position.offset == 0
        return not self.split_documents and bool(pieces) and unstarted and fits_alone and len(document) > room

    def _step_back(self, position: Cursor) -> Cursor:
        """Read the last token again as the first input of the next row; it was only a label so far.

        Where whole documents are kept, a document that just ended does not reappear in the next row.
        """
        document = self.read(position.documents)
        ended = document is not None and position.offset == len(document)
        if ended and not self.split_documents:
            return Cursor(position.documents + 1, 0)
        return Cursor(position.documents, position.offset - 1)

    def _row(self, pieces: list[np.ndarray]) -> Row:
        stream = np.concatenate([piece.astype(np.int64) for piece in pieces])
        number = np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece) for piece in pieces])
        tokens = np.zeros(self.seq_len, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORE, dtype=np.int64)
        documents = np.full(self.seq_len, PADDING_DOCUMENT, dtype=np.int32)
        used = min(len(stream), self.seq_len)
        tokens[:used] = stream[:used]
        documents[:used] = number[:used]
        labels[: len(stream) - 1] = stream[1:]
        return Row(tokens, labels, documents)
