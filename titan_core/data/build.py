"""From a config to loaders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from titan_core.config.schema import Config
from titan_core.data.documents import Documents, IndexedDocuments, StreamedDocuments
from titan_core.data.fixed_slice import FixedSlice
from titan_core.data.lanes import LaneReader, Position
from titan_core.data.loader import BatchLoader
from titan_core.data.sources import Stream, open_source
from titan_core.data.tokenizer import Tokenizer
from titan_core.runtime.events import Listener, Note, silent


def build_train_loader(
    config: Config,
    tokenizer: Tokenizer,
    *,
    global_batch_size: int,
    seed: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    listener: Listener = silent,
) -> BatchLoader:
    """Build the training loader of one data rank."""
    training, data = config.training, config.data
    source = open_source(training.dataset, training.dataset_path, data, validation=False, listener=listener)

    rows = global_batch_size // dp_size
    if data.num_workers > rows:
        listener(Note(f"{rows} of {data.num_workers} data workers start: a rank reads {rows} sequences a step"))

    def documents(mine: Callable[[int], bool]) -> Documents:
        return documents_of(source, seed, data.shuffle_window, data.shuffle, mine, infinite=True)

    def reader(documents: Documents, lanes: int, positions: dict[int, Position]) -> LaneReader:
        return LaneReader(
            documents,
            tokenizer,
            lanes=lanes,
            seq_len=training.seq_len,
            split_documents=data.split_documents,
            positions=positions,
        )

    return BatchLoader(
        documents,
        reader,
        local_batch_size=training.local_batch_size,
        global_batch_size=global_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        data=data,
        fingerprint={
            "source": source.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "seed": str(seed),
            "order": order_of(source, data.shuffle, data.shuffle_window),
        },
    )


def build_validation_slice(
    config: Config,
    tokenizer: Tokenizer,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    listener: Listener = silent,
) -> FixedSlice:
    """Build the validation slice: documents in the order of the data set, one pass."""
    validation = config.validation
    source = open_source(validation.dataset, validation.dataset_path, config.data, validation=True, listener=listener)
    return FixedSlice(
        documents_of(source, 0, 1, False, lambda number: True, infinite=False),
        tokenizer,
        seq_len=validation.seq_len,
        batch_size=validation.local_batch_size,
        num_batches=validation.steps,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )


def order_of(source: Any, shuffle: bool, window: int) -> str:
    """Say in which order a source is read."""
    if not shuffle:
        return "that of the data set"
    return f"shuffled in windows of {window}" if isinstance(source, Stream) else "shuffled"


def documents_of(
    source: Any,
    seed: int,
    window: int,
    shuffle: bool,
    mine: Callable[[int], bool],
    infinite: bool,
) -> Documents:
    """Make the sequence of documents of a source."""
    if isinstance(source, Stream):
        return StreamedDocuments(source, seed, window, shuffle, mine, infinite)
    return IndexedDocuments(source, seed, shuffle, infinite)
