"""The promises that a place for checkpoints must keep."""

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
