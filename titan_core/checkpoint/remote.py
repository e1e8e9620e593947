"""Checkpoints in an object store, through fsspec.

An object store renames nothing and keeps what a dying writer left, so there the manifest is the commit: it is written
last, and a step without one is no step.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from titan_core.checkpoint.storage import MANIFEST, STEP
from titan_core.runtime.errors import CheckpointError, missing_extra

# URL scheme -> (package, extra of ours that installs it)
_PACKAGES = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}


class RemoteStorage:
    """A prefix of an object store."""

    errors: tuple[type[Exception], ...] = (Exception,)  # every client has exceptions of its own

    def __init__(self, url: str) -> None:
        import fsspec

        scheme = url.split("://", 1)[0]
        try:
            self._fs, self._base = fsspec.core.url_to_fs(url)
        except ImportError as error:
            if scheme in _PACKAGES:
                raise missing_extra(*_PACKAGES[scheme]) from None
            raise CheckpointError(f"cannot open `{url}`: {error}", where="checkpoint.folder") from error
        except ValueError as error:
            raise CheckpointError(f"cannot open `{url}`: {error}", where="checkpoint.folder") from error
        self.root = url
        self._has_folders = scheme not in _PACKAGES  # a bucket has none, and making them would make a misspelt bucket
        self._writing: int | None = None
        self._lock = threading.Lock()  # between a sweep and the start of a save

    def begin(self, step: int) -> None:
        """Remove what is under the step's name, its manifest first."""
        with self._lock:
            self._writing = step
        self._remove(step)

    def pending(self, step: int) -> str:
        """Return the step's own path: nothing can be moved."""
        return self.path(step)

    def commit(self, step: int) -> None:
        """Do nothing more: the manifest that was written last is the commit."""
        self._writing = None

    def abandon(self, step: int) -> None:
        """Remove what was written."""
        self._remove(step)
        self._writing = None

    def steps(self) -> list[int]:
        """Return the steps that have a manifest."""
        return [step for step in self._prefixes() if self._fs.exists(f"{self._base}/{self.path(step)}/{MANIFEST}")]

    def path(self, step: int) -> str:
        """Return the step's prefix."""
        return f"step-{step}"

    def open(self, path: str, mode: str) -> Any:
        """Open an object."""
        full = f"{self._base}/{path}"
        if "w" in mode and self._has_folders:
            self._fs.makedirs(full.rsplit("/", 1)[0], exist_ok=True)
        opened: Any = self._fs.open(full, mode)
        return opened

    def size(self, path: str) -> int | None:
        """Return the bytes of an object, None if there is none."""
        self._fs.invalidate_cache()
        try:
            return int(self._fs.size(f"{self._base}/{path}"))
        except FileNotFoundError:
            return None

    def hide(self, step: int) -> None:
        """Remove the manifest."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(f"{self._base}/{self.path(step)}/{MANIFEST}")

    def sweep(self) -> None:
        """Remove steps without a manifest that are older than the newest complete one and not being written."""
        complete = self.steps()
        for step in self._prefixes():
            with self._lock:
                if complete and step < complete[-1] and step not in complete and step != self._writing:
                    self._remove(step)

    def clean(self) -> None:
        """Do nothing: whether the writer of the newest objects is alive cannot be told; `sweep` takes them in time."""

    def _prefixes(self) -> list[int]:
        self._fs.invalidate_cache()
        try:
            names = [str(name).rstrip("/") for name in self._fs.ls(self._base, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(int(match.group(1)) for match in map(STEP.search, names) if match)

    def _remove(self, step: int) -> None:
        prefix = f"{self._base}/{self.path(step)}"
        self.hide(step)
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(prefix, recursive=True)
