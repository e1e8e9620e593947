"""Checkpoints in a folder: a step is written into a hidden folder beside the others, and one rename commits it."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from titan_core.checkpoint.storage import MANIFEST, STEP
from titan_core.runtime.disk import WRITE_AT_ONCE, sync
from titan_core.runtime.errors import CheckpointError

_HIDDEN = re.compile(r"\.step-(\d+)\.(?:(old|removed-\d+)\.)?partial$")


class LocalStorage:
    """A folder."""

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, root: str) -> None:
        self.root = root
        self._folder = Path(root)
        self._locks: dict[int, int] = {}

    def begin(self, step: int) -> None:
        """Make an empty hidden folder, and hold a lock on it that says that its writer is alive."""
        partial = self._folder / self.pending(step)
        if partial.exists():
            if _is_locked(partial):
                raise CheckpointError(
                    f"another process is writing step {step} here",
                    where=str(partial),
                    tip="two runs cannot share a folder: choose another `--run`",
                )
            _remove(partial)
        partial.mkdir(parents=True)
        self._locks[step] = os.open(partial, os.O_RDONLY)
        _lock(self._locks[step])

    def pending(self, step: int) -> str:
        """Return the hidden folder's name."""
        return f".step-{step}.partial"

    def commit(self, step: int) -> None:
        """Sync and rename; an older step of the same number is moved out of the way first, for `sweep` to remove."""
        source, target = self._folder / self.pending(step), self._folder / self.path(step)
        old = self._folder / f".step-{step}.old.partial"
        for folder, _, _ in os.walk(source):
            sync(folder)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        try:
            source.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        sync(self._folder)
        self._unlock(step)

    def abandon(self, step: int) -> None:
        """Remove the hidden folder."""
        shutil.rmtree(self._folder / self.pending(step), ignore_errors=True)
        self._unlock(step)

    def steps(self) -> list[int]:
        """Return the folders that a manifest makes complete."""
        if not self._folder.is_dir():
            return []
        found = ((STEP.match(p.name), p) for p in self._folder.iterdir())
        return sorted(int(m.group(1)) for m, p in found if m and (p / MANIFEST).is_file())

    def path(self, step: int) -> str:
        """Return the folder's name."""
        return f"step-{step}"

    def open(self, path: str, mode: str) -> Any:
        """Open a file; what is written is on the disk when it is closed."""
        full = self._folder / path
        if "w" in mode:
            full.parent.mkdir(parents=True, exist_ok=True)
            return io.BufferedWriter(_Synced(full, "wb"), buffer_size=WRITE_AT_ONCE)
        return full.open("rb")

    def size(self, path: str) -> int | None:
        """Return the bytes of a file, None if there is none."""
        full = self._folder / path
        return full.stat().st_size if full.is_file() else None

    def hide(self, step: int) -> None:
        """Rename: a half-removed step is never seen."""
        source = self._folder / self.path(step)
        if source.exists():
            source.rename(self._folder / f".step-{step}.removed-{time.time_ns()}.partial")

    def sweep(self) -> None:
        """Remove hidden steps, and old ones whose successor is there."""
        for step, kind, path in self._hidden():
            if kind is not None and (kind != "old" or (self._folder / self.path(step)).exists()):
                _remove(path)

    def clean(self) -> None:
        """Bring back a step whose writer died between the two renames of a commit; remove what else dead runs left."""
        for step, kind, path in self._hidden():
            if kind == "old" and not (self._folder / self.path(step)).exists():
                path.rename(self._folder / self.path(step))
            elif kind is None and not _is_locked(path):
                _remove(path)
        self.sweep()

    def _hidden(self) -> list[tuple[int, str | None, Path]]:
        """Return (step, kind, folder); kind is `old`, `removed-...`, or None for one that is being written."""
        if not self._folder.is_dir():
            return []
        found = ((_HIDDEN.match(p.name), p) for p in self._folder.iterdir())
        return [(int(m.group(1)), m.group(2), p) for m, p in found if m]

    def _unlock(self, step: int) -> None:
        handle = self._locks.pop(step, None)
        if handle is not None:
            os.close(handle)


class _Synced(io.FileIO):
    """A file that is on the disk, not in a cache, when it is closed."""

    def close(self) -> None:
        """Sync, then close."""
        if self.closed:
            return
        try:
            os.fsync(self.fileno())
        finally:
            super().close()


def _remove(folder: Path) -> None:
    """Remove a folder, also while another process removes it."""
    while folder.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def _lock(handle: int) -> bool:
    """Lock a folder for this process's life; network file systems that cannot are taken as they are."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _is_locked(folder: Path) -> bool:
    """Is another process writing here?"""
    handle = os.open(folder, os.O_RDONLY)
    try:
        return not _lock(handle)
    finally:
        os.close(handle)
