"""The worker's side of the launcher: who am I, what do I tell the parent that started me, and is it still there?

A worker writes JSON lines into a pipe: a warning, its result, the error that ended it, and that it is done. What it
prints goes to the terminal from the first rank only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from titan_cli.output import error_as_dict
from titan_core.runtime.errors import TitanError
from titan_core.runtime.events import Event, Listener, Warned

EVENT_FD = "TITAN_EVENT_FD"  # set in the environment of a rank that `titan_cli.launch` started


def in_worker() -> bool:
    """Was this process started by `titan_cli.launch`?"""
    return EVENT_FD in os.environ


def is_main_rank() -> bool:
    """Is this the rank that prints?"""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def tell_parent(**message: Any) -> None:
    """Send the parent a line; a parent that is gone is no reason to fail."""
    line = (json.dumps({"time": time.time(), **message}, default=str) + "\n").encode()
    with contextlib.suppress(OSError):
        while line:
            line = line[os.write(int(os.environ[EVENT_FD]), line) :]


def report_error(error: TitanError, trace: str | None = None) -> None:
    """Send the parent the error that ends this worker, with its traceback if the user asked for one."""
    tell_parent(error=error_as_dict(error), trace=trace)


@contextlib.contextmanager
def worker_listener(display: Listener) -> Iterator[Listener]:
    """Give the listener of this process: the display on the main rank, the parent for the others' warnings."""

    def relay(event: Event) -> None:
        if isinstance(event, Warned):
            tell_parent(warning=event.text)

    yield display if is_main_rank() or not in_worker() else relay


def stop_when_orphaned() -> None:
    """Ask this worker to save and stop as soon as its parent is gone.

    Ranks live in sessions of their own, so nothing else would end them when the parent is killed: they would go on
    writing into the run folder beside the ranks of the next start.
    """
    pipe = select.poll()
    pipe.register(int(os.environ[EVENT_FD]), 0)  # no event asked for: what comes is that the reading end is closed

    def watch() -> None:
        pipe.poll()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()
