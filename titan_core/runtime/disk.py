"""How bytes go to files."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

# What `cp` writes at once. With 1 MiB, Linux 6.18 spent 4 s of system time on 2 GB in its page cache, with this 0.6 s.
# It also stays in the processor's cache while it is read, hashed and written.
WRITE_AT_ONCE = 128 << 10


def write_all(file: Any, data: bytes | memoryview) -> None:
    """Write to a file that may take less than it is given: one that is not buffered, or one of a remote store."""
    view = memoryview(data)
    while view:
        view = view[file.write(view[:WRITE_AT_ONCE]) :]


class WriteBehind:
    """Sends files to the disk while others are being written, so that the sync at the end finds little left to do."""

    def __enter__(self) -> WriteBehind:
        self._pool = ThreadPoolExecutor(1, "titan-sync")
        self._started: list[Future[None]] = []
        return self

    def start(self, path: Path) -> None:
        """Sync a file in the background."""
        self._started.append(self._pool.submit(sync, path))

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait. Raises `OSError` if a file could not be written: a later sync need not be told of it again."""
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for started in self._started:
                started.result()


def sync(path: str | Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
