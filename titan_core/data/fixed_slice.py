"""A fixed slice of data for validation: the same rows at every validation and on every layout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from titan_core.data.documents import Documents
from titan_core.data.lanes import LaneReader
from titan_core.data.loader import Batch, collate
from titan_core.data.packing import IGNORE, PADDING_DOCUMENT, Row
from titan_core.data.tokenizer import Tokenizer
from titan_core.runtime.errors import DataError


class FixedSlice:
    """The first `num_batches` batches of a data set (-1: all), dealt to the data ranks.

    Iterating gives every rank the same number of batches; the last ones may be padding, which counts nothing. Rows are
    made at the first validation and kept, 12 bytes a token.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        batch_size: int,
        num_batches: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.num_batches = num_batches
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._reader = LaneReader(documents, tokenizer, lanes=1, seq_len=seq_len, split_documents=True, positions={})
        self._batches: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        if self._batches is None:
            self._batches = self._read()
        for batch in self._batches:
            yield Batch(batch.tokens.long(), batch.labels.long(), batch.documents)

    def _read(self) -> list[Batch]:
        mine: list[Batch] = []
        empty = _compact([self._padding()] * self.batch_size)
        total = 0
        for rows in self._groups():
            if total % self.dp_size == self.dp_rank:
                rows += [self._padding()] * (self.batch_size - len(rows))
                mine.append(_compact(rows))
            total += 1
        if total == 0:
            raise DataError("the validation data is empty", where="validation.dataset")
        rounds = -(-total // self.dp_size)
        return mine + [empty] * (rounds - len(mine))

    def _groups(self) -> Iterator[list[Row]]:
        """Yield the rows of each batch; the last may be short."""
        number = 0
        while self.num_batches < 0 or number < self.num_batches * self.batch_size:
            rows = []
            for _ in range(self.batch_size):
                numbered = self._reader.row(number)
                if numbered is None:
                    break
                rows.append(numbered.row)
                number += 1
            if rows:
                yield rows
            if len(rows) < self.batch_size:
                return

    def _padding(self) -> Row:
        return Row(
            np.zeros(self.seq_len, dtype=np.int64),
            np.full(self.seq_len, IGNORE, dtype=np.int64),
            np.full(self.seq_len, PADDING_DOCUMENT, dtype=np.int32),
        )


def _compact(rows: list[Row]) -> Batch:
    batch = collate(rows)
    return Batch(batch.tokens.int(), batch.labels.int(), batch.documents)
