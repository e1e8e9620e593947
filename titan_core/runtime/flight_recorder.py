"""When a collective fails, every rank leaves its trace and one of them writes down why; see `traces` and `hang_report`.

The process groups are dead then, so the ranks meet in files, in a folder that all of them see. The first rank whose
collective fails puts a marker there. A thread on every rank looks for it twice a second, so that a rank which sleeps or
computes leaves its trace, too, and is then woken with SIGUSR2; this needs no launcher's help. What ends a process from
C++ (gloo, when sizes do not match; NCCL's watchdog) is caught on its way, long enough to leave a trace.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titan_core.runtime.distributed import World, ranks_from_environment
from titan_core.runtime.errors import CollectiveFailed, Interrupted, MachineError, TitanError, UsageError
from titan_core.runtime.hang_report import explain
from titan_core.runtime.terminate import on_terminate
from titan_core.runtime.traces import REPORT, State, frame_text, read_folder

POLL = 0.5  # seconds between two looks for the marker
PATIENCE = 4.0  # seconds that ranks wait for the others' traces, and then for the report; the launcher gives them 15
PER_TRACE = 0.1  # seconds that it takes to read one of 20,000 calls
# How the backends say that a collective failed; all of it arrives as RuntimeError.
_SIGNS = re.compile(
    r"gloo|nccl|timed out|timeout|connection (closed|reset|refused)|broken pipe|mismatch between collectives",
    re.IGNORECASE,
)

_GLOO_AROUND = re.compile(r"^\[\S+:\d+\] | This is typically caused by .*$")  # its line of source, its guesses


class FlightRecorder:
    """The place and size of a run's traces. `prefix` begins the names of the files, `size` is in events; 0: no traces.

    Make it before the process groups: torch reads its settings when the first one is made.
    """

    def __init__(self, folder: str, prefix: str = "rank_", size: int = 20000) -> None:
        self.folder, self.prefix, self.size = Path(folder), prefix, size
        os.environ["TORCH_FR_BUFFER_SIZE"] = str(size)
        if size:
            os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "1"
            os.environ["TORCH_FR_DUMP_TEMP_FILE"] = os.path.join(folder, prefix)

    def put_earlier_traces_aside(self) -> None:
        """Move what a failed start of this run left into a folder named by its time; the main rank does it for all."""
        if ranks_from_environment()[0] != 0 or not self.folder.is_dir():
            return
        files = [path for path in self.folder.iterdir() if path.is_file()]
        if not files:
            return
        newest = max(path.stat().st_mtime for path in files)
        aside = self.folder / time.strftime("%Y%m%d-%H%M%S", time.localtime(newest))
        aside.mkdir(exist_ok=True)
        for path in files:
            path.replace(aside / path.name)

    @contextlib.contextmanager
    def watch(self, world: World) -> Iterator[None]:
        """Turn a failed collective of the block into `CollectiveFailed`, with a report; every rank calls it."""
        if world.size == 1:
            yield
            return
        with _Watch(self, world) as watch:
            try:
                yield
            except (CollectiveFailed, UsageError, Interrupted):
                raise
            except Exception as error:
                watch.failing = True
                if _is_collective(error):
                    raise watch.explained(error) from error
                watch.leave(error)
                raise


def _is_collective(error: BaseException | None) -> bool:
    """Did a collective fail, here or below? A checkpoint's own error for it is caused by one, too."""
    while error is not None:
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or _SIGNS.search(str(error))):
            return True
        error = error.__cause__
    return False


def _agree_on_marker(world: World) -> str:
    """Return a name of this start only: other hosts may still see an earlier start's marker in their caches."""
    name = [f"{secrets.token_hex(4)}.asked" if world.is_main else ""]
    try:
        dist.broadcast_object_list(name, src=0)
    except RuntimeError as error:
        text = f"rank {world.rank} of {world.size} lost the others at the start: {_one_line(error)}"
        raise MachineError(text, tip="every rank must be started, and reach the others") from error
    return name[0]


class _Watch:
    """One rank's part: its thread, its handlers, its files."""

    def __init__(self, recorder: FlightRecorder, world: World) -> None:
        self.recorder, self.world = recorder, world
        self.folder = recorder.folder
        self.failing = False  # the main thread is on its way out
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._dumped: State | None = None
        self._marker = _agree_on_marker(world)
        self._thread = threading.Thread(target=self._look_out, name="watch-collectives", daemon=True)
        self._main = threading.main_thread()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> _Watch:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._undo.enter_context(on_terminate(self._terminating))
        if threading.current_thread() is self._main:
            before = signal.signal(signal.SIGUSR2, self._woken)
            self._undo.callback(signal.signal, signal.SIGUSR2, before)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.failing = True
        with self._lock:  # never between the thread's look and its signal, which without a handler would kill
            self._over.set()
            self._undo.close()
        if error is None and self.world.is_main:
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # empty, as nothing happened

    # -------------------------------------------------------------------------------------- the main thread's errors

    def explained(self, error: BaseException) -> CollectiveFailed:
        """Leave this rank's trace, have the report written, and return the error that says what is in it."""
        return self._meet("failed", _one_line(error), _stack(error.__traceback__))

    def leave(self, error: BaseException) -> None:
        """Leave a trace for the others: they will wait for this rank, which failed by itself."""
        with contextlib.suppress(OSError):  # the error that is under way is the news
            self._dump("left", _one_line(error), _stack(error.__traceback__))

    def _woken(self, *_: Any) -> None:
        if not self.failing:
            raise self._error()

    # -------------------------------------------------------------------------------------- the thread and the hook

    def _look_out(self) -> None:
        while not self._over.wait(POLL):
            if self._marker in self._names():
                break
        else:
            return
        self._meet("asked", None, _stack_of(self._main))
        self._over.wait(1.0)
        with self._lock:
            if not self._over.is_set() and signal.getsignal(signal.SIGUSR2) == self._woken:
                signal.pthread_kill(self._main.ident or 0, signal.SIGUSR2)

    def _terminating(self) -> None:
        self._meet("ended", "ended by a C++ exception", _stack_of(self._main))

    # -------------------------------------------------------------------------------------- meeting in files

    def _meet(self, state: State, error: str | None, stack: list[str]) -> CollectiveFailed:
        """Leave a trace, ask the others for theirs, see to the report, and return the error to end with."""
        try:
            self._dump(state, error, stack)
            if state != "asked":
                (self.folder / self._marker).touch()
            self._wait(lambda names: all(f"{self.recorder.prefix}{r}.json" in names for r in range(self.world.size)))
            if self._writes():
                self._write_report()
            else:
                self._wait(lambda names: REPORT in names, PER_TRACE * self.world.size)
        except Exception as failed:  # the collective that failed is the news
            return CollectiveFailed(f"a collective failed: {error}; no report could be written: {_one_line(failed)}")
        return self._error(error)

    def _names(self) -> list[str]:
        """List the folder: unlike a look at one file, that asks a network file system anew."""
        try:
            return os.listdir(self.folder)
        except OSError:
            return []

    def _wait(self, ready: Callable[[list[str]], bool], longer: float = 0.0) -> None:
        deadline = time.monotonic() + PATIENCE + longer
        while not ready(self._names()) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _writes(self) -> bool:
        """Is this the lowest rank that takes part in the meeting?"""
        for rank in range(self.world.rank):
            with contextlib.suppress(OSError, ValueError):
                notes = json.loads((self.folder / f"{self.recorder.prefix}{rank}.json").read_bytes())
                if notes["state"] != "left":
                    return False
        return True

    def _write_report(self) -> None:
        with self._lock:
            if REPORT not in self._names():
                _write(self.folder / REPORT, explain(read_folder(self.folder, self.recorder.prefix)).text.encode())

    def _error(self, reason: str | None = None) -> CollectiveFailed:
        path = self.folder / REPORT
        try:
            summary, tip = path.read_text(encoding="utf-8").splitlines()[:2]
        except (OSError, ValueError):
            text = f"a collective failed: {reason or 'on another rank'}; no rank wrote the report in time"
            return CollectiveFailed(text, where=str(self.folder), tip=f"`titan doctor --traces {self.folder}`")
        return CollectiveFailed(summary, where=str(path), tip=tip.removeprefix("tip: "))

    def _dump(self, state: State, error: str | None, stack: list[str]) -> None:
        """Write this rank's files; what was asked for by others never replaces what the rank itself left."""
        with self._lock:
            if state == "asked" and self._dumped is not None:
                return
            self._dumped = state
            path = self.folder / f"{self.recorder.prefix}{self.world.rank}"
            self.folder.mkdir(parents=True, exist_ok=True)
            for suffix, trace in _torch_traces(self.world.device.type).items():
                _write(path.with_name(path.name + suffix), trace)
            notes = {
                "rank": self.world.rank,
                "world_size": self.world.size,
                "state": state,
                "error": error,
                "stack": stack,
                "groups": _groups(),
            }
            _write(path.with_name(path.name + ".json"), json.dumps(notes).encode())


def _torch_traces(device: str) -> dict[str, bytes]:
    """Return torch's traces by the end of their file's name: the device's, and the host's where that is another."""
    c10d: Any = importlib.import_module("torch._C._distributed_c10d")
    if device == "cuda" and hasattr(c10d, "_dump_nccl_trace"):
        return {"": c10d._dump_nccl_trace(), ".host": c10d._dump_fr_trace()}
    return {"": c10d._dump_fr_trace()}


def _groups() -> dict[str, list[int]]:
    """Return the ranks of every group that this rank is in, by name: gloo's traces leave them out."""
    world: Any = dist.distributed_c10d._world
    return {name: sorted(world.pg_group_ranks[group]) for group, name in world.pg_names.items()}


def _write(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def _one_line(error: BaseException) -> str:
    if isinstance(error, TitanError):
        return str(error)
    return f"{type(error).__name__}: {_GLOO_AROUND.sub('', str(error).strip().splitlines()[0])}"


def _stack(trace: Any) -> list[str]:
    return [_frame(frame) for frame in reversed(traceback.extract_tb(trace))][:30]


def _stack_of(thread: threading.Thread) -> list[str]:
    frame = sys._current_frames().get(thread.ident or 0)
    return [_frame(one) for one in reversed(traceback.extract_stack(frame))][:30] if frame is not None else []


def _frame(frame: traceback.FrameSummary) -> str:
    return f"{frame_text(frame.name, frame.filename, frame.lineno)}: {frame.line}"
