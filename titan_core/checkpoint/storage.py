"""Where checkpoints lie: a local folder, or an object store through fsspec.

A step is committed by the last thing that is written. In a folder that is a rename of the whole step; an object store
renames nothing and keeps what a dying writer left, so there it is the manifest, written last.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any, Protocol

from titan_core.runtime.errors import CheckpointError, missing_extra

MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d+)$")
_PARTIAL = re.compile(r"\.step-\d+\.partial$")


class Storage(Protocol):
    """A place with steps in it. Paths are relative to the place, with forward slashes."""

    root: str

    def begin(self, step: int) -> str:
        """Make a place to write a step into, empty, and return its path."""
        ...

    def commit(self, step: int) -> None:
        """Make a written step the step, at once."""
        ...

    def abandon(self, step: int) -> None:
        """Remove what was written of a step that failed."""
        ...

    def steps(self) -> list[int]:
        """Return the committed steps, in order."""
        ...

    def path(self, step: int) -> str:
        """Return the path of a committed step."""
        ...

    def open(self, path: str, mode: str) -> Any:
        """Open a file; folders are made as needed."""
        ...

    def remove(self, step: int) -> None:
        """Remove a committed step."""
        ...

    def clean(self) -> list[str]:
        """Remove what dead runs left half-written, and return it."""
        ...


class LocalStorage:
    """A folder."""

    def __init__(self, root: str) -> None:
        self.root = root

    def begin(self, step: int) -> str:
        """Make an empty hidden folder beside the steps."""
        partial = self._partial(step)
        if (Path(self.root) / partial).exists():
            shutil.rmtree(Path(self.root) / partial)
        (Path(self.root) / partial).mkdir(parents=True)
        return partial

    def commit(self, step: int) -> None:
        """Rename; an older step of the same number is moved out of the way first and removed after."""
        source, target = Path(self.root) / self._partial(step), Path(self.root) / self.path(step)
        old = Path(self.root) / f".step-{step}.old.partial"
        if target.exists():
            target.rename(old)
        source.rename(target)
        _sync_folder(Path(self.root))
        if old.exists():
            shutil.rmtree(old)

    def abandon(self, step: int) -> None:
        """Remove the hidden folder."""
        shutil.rmtree(Path(self.root) / self._partial(step), ignore_errors=True)

    def steps(self) -> list[int]:
        """Return the folders that a manifest makes complete."""
        root = Path(self.root)
        if not root.is_dir():
            return []
        found = ((_STEP.match(p.name), p) for p in root.iterdir())
        return sorted(int(m.group(1)) for m, p in found if m and (p / MANIFEST).is_file())

    def path(self, step: int) -> str:
        """Return the folder's name."""
        return f"step-{step}"

    def open(self, path: str, mode: str) -> Any:
        """Open a file; what is written is on the disk when it is closed."""
        full = Path(self.root) / path
        if "w" in mode:
            full.parent.mkdir(parents=True, exist_ok=True)
            return io.BufferedWriter(_Synced(full, "wb"))
        return full.open("rb")

    def remove(self, step: int) -> None:
        """Hide the folder with one rename, then remove it: a half-removed step is never seen."""
        hidden = Path(self.root) / f".step-{step}.removed.partial"
        with contextlib.suppress(FileNotFoundError):
            (Path(self.root) / self.path(step)).rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def clean(self) -> list[str]:
        """Remove hidden folders."""
        root = Path(self.root)
        left = [p for p in root.iterdir() if _PARTIAL.search(p.name) or ".partial" in p.name] if root.is_dir() else []
        for path in left:
            recovered = re.match(r"\.step-(\d+)\.old\.partial$", path.name)
            if recovered and not (root / f"step-{recovered.group(1)}").exists():
                path.rename(root / f"step-{recovered.group(1)}")  # died between the two renames of a commit
            else:
                shutil.rmtree(path, ignore_errors=True)
        return [path.name for path in left]

    def _partial(self, step: int) -> str:
        return f".step-{step}.partial"


class RemoteStorage:
    """An object store, through fsspec."""

    def __init__(self, url: str) -> None:
        import fsspec

        scheme = url.split("://", 1)[0]
        try:
            self._fs, self._base = fsspec.core.url_to_fs(url)
        except ImportError:
            extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}.get(scheme, scheme)
            raise missing_extra({"s3": "s3fs", "gcs": "gcsfs"}.get(extra, scheme), extra) from None
        except ValueError as error:
            raise CheckpointError(f"cannot open `{url}`: {error}", where="checkpoint.folder") from error
        self.root = url

    def begin(self, step: int) -> str:
        """Remove what is under the step's name, its manifest first."""
        self.remove(step)
        return self.path(step)

    def commit(self, step: int) -> None:
        """Do nothing: the manifest that was written last is the commit."""

    def abandon(self, step: int) -> None:
        """Remove what was written."""
        self.remove(step)

    def steps(self) -> list[int]:
        """Return the steps that have a manifest."""
        self._fs.invalidate_cache()
        try:
            names = [str(name).rstrip("/") for name in self._fs.ls(self._base, detail=False)]
        except FileNotFoundError:
            return []
        found = (_STEP.search(name) for name in names)
        steps = sorted(int(match.group(1)) for match in found if match)
        return [step for step in steps if self._fs.exists(f"{self._base}/{self.path(step)}/{MANIFEST}")]

    def path(self, step: int) -> str:
        """Return the step's prefix."""
        return f"step-{step}"

    def open(self, path: str, mode: str) -> Any:
        """Open an object."""
        full = f"{self._base}/{path}"
        if "w" in mode:
            self._fs.makedirs(full.rsplit("/", 1)[0], exist_ok=True)
        opened: Any = self._fs.open(full, mode)
        return opened

    def remove(self, step: int) -> None:
        """Remove the manifest, then the rest."""
        prefix = f"{self._base}/{self.path(step)}"
        self._fs.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(f"{prefix}/{MANIFEST}")
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(prefix, recursive=True)

    def clean(self) -> list[str]:
        """Leave objects without a manifest alone: another writer may be at work; they are overwritten in time."""
        return []


def open_storage(place: str) -> Storage:
    """Open a folder or a URL."""
    if place.startswith("file://"):
        return LocalStorage(place.removeprefix("file://"))
    return RemoteStorage(place) if "://" in place else LocalStorage(place)


class _Synced(io.FileIO):
    """A file that is on the disk, not in a cache, when it is closed."""

    def close(self) -> None:
        """Sync, then close; after an error the file is abandoned as it is."""
        if not self.closed and sys.exc_info()[0] is None:
            os.fsync(self.fileno())
        super().close()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
