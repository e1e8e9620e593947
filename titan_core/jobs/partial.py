"""An output folder that appears at once, and a journal of what is done, so that a killed job goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from titan_core.runtime.disk import sync
from titan_core.runtime.errors import RunFailed, UsageError

_PLAN = "plan.json"


class Partial:
    """`folder` is written beside `target` and hidden; `commit` renames it. `fingerprint` says what is being made.

    Every rank makes one; `begin` and what follows is for the main rank, `record` for all.
    """

    def __init__(self, target: Path, folder: Path, fingerprint: str) -> None:
        self.target = target
        self.folder = folder
        self._fingerprint = fingerprint
        self._lock: int | None = None

    def begin(self) -> bool:
        """Make the folder, or take over what a killed job with the same fingerprint left: then return True."""
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            tip = "choose another place, or remove it"
            raise UsageError(f"`{self.target}` is there already", tip=tip)
        plan = self.folder / "journal" / _PLAN
        if self.folder.exists():
            self._take_lock()
            with contextlib.suppress(OSError, ValueError):
                if json.loads(plan.read_text())["fingerprint"] == self._fingerprint:
                    return True
            self._release()
            shutil.rmtree(self.folder)
        plan.parent.mkdir(parents=True)
        self._take_lock()
        plan.write_text(json.dumps({"fingerprint": self._fingerprint}))
        return False

    def done(self) -> dict[int, dict[str, Any]]:
        """Return the records of the jobs that are done. A line that was cut off by a kill is none."""
        found: dict[int, dict[str, Any]] = {}
        for path in sorted((self.folder / "journal").glob("*.jsonl")):
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    found[int(entry["job"])] = entry["record"]
        return found

    def record(self, rank: int, job: int, record: dict[str, Any]) -> None:
        """Note that a job is done. Its bytes may be lost with the power: they are checked before they are relied on."""
        path = self.folder / "journal" / f"{rank}.jsonl"
        with path.open("a") as file:
            file.write("\n" if file.tell() and not _ends_line(path) else "")
            file.write(json.dumps({"job": job, "record": record}) + "\n")

    def drop_journal(self) -> None:
        """Remove the journal: nothing of it belongs into the result."""
        shutil.rmtree(self.folder / "journal")

    def commit(self) -> None:
        """Put the folder in its place."""
        self.sync()
        self.folder.rename(self.target)
        self._release()

    def sync(self) -> None:
        """Wait until all is on the disk."""
        for folder, _, names in os.walk(self.folder):
            for name in (*names, "."):
                sync(os.path.join(folder, name))

    def abandon(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def release(self) -> None:
        """Leave what is there for the next call of the same command."""
        self._release()

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFailed("another process is writing here", where=str(self.folder)) from None
        except OSError:
            return  # network file systems that have no locks are taken as they are

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
