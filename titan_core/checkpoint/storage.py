"""Where checkpoints lie: the promises that a place must keep, and which kind of place a name means."""

from __future__ import annotations

import re
from typing import Any, Protocol

MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d+)$")


class Storage(Protocol):
    """A place with steps in it. Paths are relative to the place, with forward slashes.

    A step is committed by the last thing that is written, so a step that can be seen is whole.
    """

    root: str
    errors: tuple[type[Exception], ...]
    """What reading and writing there can raise."""

    def begin(self, step: int) -> None:
        """Make an empty place to write a step into (on the main rank)."""
        ...

    def pending(self, step: int) -> str:
        """Return the path of a step that is being written."""
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
        """Open a file, `rb` or `wb`; folders are made as needed."""
        ...

    def size(self, path: str) -> int | None:
        """Return the bytes of a file, None if there is none."""
        ...

    def hide(self, step: int) -> None:
        """Make a committed step no step any more, quickly; `sweep` removes its bytes."""
        ...

    def sweep(self) -> None:
        """Remove hidden steps and what dead writers left, but nothing that is being written."""
        ...

    def clean(self) -> None:
        """At the start of a run: put right and remove what a dead run left."""
        ...


def open_storage(place: str) -> Storage:
    """Open a folder or a URL. Raises `MachineError` if the package for that kind of URL is missing."""
    from titan_core.checkpoint.local import LocalStorage
    from titan_core.checkpoint.remote import RemoteStorage

    if place.startswith("file://"):
        return LocalStorage(place.removeprefix("file://"))
    return RemoteStorage(place) if "://" in place else LocalStorage(place)


def split(step_path: str) -> tuple[Storage, str]:
    """Return the storage and the relative path of a step that is given as one path or URL."""
    root, slash, folder = step_path.rstrip("/").rpartition("/")
    return open_storage(root or ("/" if slash else ".")), folder
