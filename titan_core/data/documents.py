"""The infinite sequence of documents of a run: epoch after epoch, each in its own order, read by number.

A document is a text, or in a run with images a picture with its caption.
Document g of the sequence is the same whoever asks: it depends on the source, the seed and g only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from titan_core.data.order import permute
from titan_core.data.sources import IndexedSource, Stream
from titan_core.runtime.errors import DataError


class IndexedDocuments:
    """Documents of a source that can be read in any order."""

    def __init__(self, source: IndexedSource, seed: int, shuffle: bool, infinite: bool = True) -> None:
        self.source = source
        self.seed = seed
        self.shuffle = shuffle
        self.infinite = infinite

    def item(self, number: int) -> Any:
        """Return document `number` of the sequence, None past the end of a finite one."""
        size = len(self.source)
        epoch, position = divmod(number, size)
        if epoch and not self.infinite:
            return None
        index = permute(position, size, f"{self.seed}/{epoch}") if self.shuffle else position
        return self.source.item(index)

    def state(self, oldest: int) -> dict[str, Any]:
        """Return what a resume needs besides numbers: nothing."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Accept what `state` returned."""


class StreamedDocuments:
    """Documents of a stream: read in windows, and shuffled within each window.

    `mine(number)` says which documents this process will ask for; others are dropped as they come. Documents may be
    asked for out of order, each once. The states that `state` returns are taken at window starts, so they are the same
    on every rank, and a resume reads at most one window again.
    """

    def __init__(
        self,
        source: Stream,
        seed: int,
        window: int,
        shuffle: bool,
        mine: Callable[[int], bool],
        infinite: bool = True,
    ) -> None:
        self.source = source
        self.seed = seed
        self.window = window if shuffle else 1024
        self.shuffle = shuffle
        self.mine = mine
        self.infinite = infinite
        self._waiting: dict[int, Any] = {}
        self._starts: list[dict[str, Any]] = [{"number": 0, "epoch": 0, "library": None}]
        self._reader: Iterator[Any] | None = None
        self._ended = False

    def item(self, number: int) -> Any:
        """Return document `number` of the sequence; reads on in the stream as far as needed."""
        while number not in self._waiting:
            if self._ended or number < self._starts[-1]["number"]:
                if self._ended:
                    return None
                raise AssertionError(f"document {number} was read before")
            self._read_window()
        return self._waiting.pop(number)

    def state(self, oldest: int) -> dict[str, Any]:
        """Return the newest window start that is not after document `oldest`, and forget the ones before."""
        usable = [start for start in self._starts if start["number"] <= oldest]
        self._starts = self._starts[len(usable) - 1 :]
        return copy.deepcopy(self._starts[0])

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a window start."""
        self._waiting.clear()
        self._starts = [copy.deepcopy(state)]
        self._reader = None
        self._ended = False

    def _read_window(self) -> None:
        start = self._starts[-1]
        number, epoch = start["number"], start["epoch"]
        if self._reader is None:
            self._reader = self.source.read(copy.deepcopy(start["library"]))
        texts: list[Any] = []
        for text in self._reader:
            texts.append(text)
            if len(texts) == self.window:
                break
        if not texts and start["library"] is None:
            raise DataError("the data set is empty", where="training.dataset")
        for position in range(len(texts)):
            if self.mine(number + position):
                key = f"{self.seed}/{epoch}/{number}"
                index = permute(position, len(texts), key) if self.shuffle else position
                self._waiting[number + position] = texts[index]
        if len(texts) == self.window:
            library = copy.deepcopy(self.source.state())
            self._starts.append({"number": number + len(texts), "epoch": epoch, "library": library})
        else:
            self._reader = None
            self._ended = not self.infinite
            self._starts.append({"number": number + len(texts), "epoch": epoch + 1, "library": None})


Documents = IndexedDocuments | StreamedDocuments
