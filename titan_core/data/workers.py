"""Worker processes that share the rows of each microbatch; what comes out equals what one thread reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from titan_core.runtime.errors import DataError

if TYPE_CHECKING:
    from titan_core.data.loader import BatchLoader


class _Share(IterableDataset):
    """Worker w of W reads slots w, w + W, ... of every microbatch."""

    def __init__(self, loader: BatchLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        slots = range(info.id, self.loader.local_batch_size, info.num_workers)
        try:
            yield from self.loader.read(slots)
        except DataError as error:  # an exception class of ours would not survive the DataLoader's re-raising
            yield error


def read_with_workers(loader: BatchLoader) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """Yield microbatches put together from the workers' shares, in slot order."""
    workers = min(loader.data.num_workers, loader.local_batch_size)
    shares = DataLoader(
        _Share(_without_thread(loader)),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=loader.data.prefetch,
        multiprocessing_context="fork",  # the sources hold open files and closures, which do not pickle
    )
    stream = iter(shares)
    try:
        while True:
            parts = [next(stream) for _ in range(workers)]
            for part in parts:
                if isinstance(part, DataError):
                    raise part
            rows: list[Any] = [None] * loader.local_batch_size
            for worker, (share, _) in enumerate(parts):
                rows[worker::workers] = share
            states = [state for _, state in parts if state]
            yield rows, min(states, key=lambda state: state["number"]) if states else {}
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        tip = "it was killed, perhaps for memory: lower data.num_workers or data.prefetch"
        raise DataError(f"a data worker died: {str(error).split(chr(10))[0]}", tip=tip) from error
    finally:
        del stream


def _without_thread(loader: BatchLoader) -> BatchLoader:
    """Return a copy that can go to another process."""
    import copy

    twin = copy.copy(loader)
    twin._producer = None
    return twin
