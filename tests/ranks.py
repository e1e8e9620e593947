"""Runs a function on several ranks, forked from this process, which has torch loaded: a quarter second for two ranks.

Forking is right here because torch starts no threads in the parent, whatever ran there before (see conftest.py); every
call forks anew, as a pool that saw one rank fail never makes a process group again.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # these are loaded once here instead of once a rank
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor.parallel


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time."""


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Return what `function(*args)` returned on each of `size` ranks, with gloo between them.

    The ranks find RANK, WORLD_SIZE and the rest in their environment. Raises `RankFailed` with the first traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        pids = [_fork(function, args, rank, size, Path(folder), timeout) for rank in range(size)]
        ended = _wait(pids, timeout)
        return [_result(Path(folder), rank, ended) for rank in range(size)]


def apart(function: Callable[..., Any], *args: Any, timeout: float = 120) -> Any:
    """Return what `function(*args)` returned in a fork of this process, without a process group.

    For what would leave something behind: a compiler's threads, a changed module, a process's own peak of memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        ended = _wait([_fork(function, args, 0, 1, Path(folder), timeout, group=False)], timeout)
        return _result(Path(folder), 0, ended)


def _fork(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    size: int,
    folder: Path,
    timeout: float,
    *,
    group: bool = True,
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code, result = 1, folder / f"{rank}.pkl"
    try:
        torch.set_num_threads(1)
        if group:
            _join(rank, size, folder, timeout)
        result.write_bytes(pickle.dumps(("ok", function(*args))))
        code = 0
    except BaseException:  # the traceback is the result
        result.write_bytes(pickle.dumps(("failed", traceback.format_exc())))
    finally:
        os._exit(code)  # never back into the caller: that would be a second pytest


def _join(rank: int, size: int, folder: Path, timeout: float) -> None:
    names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()})
    store = dist.FileStore(str(folder / "store"), size)
    limit = timedelta(seconds=min(timeout, 120))  # a rank that compiles on a loaded machine keeps others waiting
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)


def _wait(pids: list[int], timeout: float) -> list[str]:
    """Wait for all, and say how each ended; the first failure leaves the others five seconds, then they are killed."""
    deadline = time.monotonic() + timeout
    ended: dict[int, str] = {}
    while len(ended) < len(pids) and time.monotonic() < deadline:
        for pid in [pid for pid in pids if pid not in ended]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[pid] = _ending(os.waitstatus_to_exitcode(status))
                if status:
                    deadline = min(deadline, time.monotonic() + 5)
        time.sleep(0.005)
    for pid in [pid for pid in pids if pid not in ended]:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ended[pid] = "did not end in time"
    return [ended[pid] for pid in pids]


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _result(folder: Path, rank: int, ended: list[str]) -> Any:
    failures = []
    for path in sorted(folder.glob("*.pkl"), key=lambda p: p.stat().st_mtime_ns):
        kind, value = pickle.loads(path.read_bytes())
        if kind == "failed":
            failures.append(f"rank {path.stem}:\n{value}")
    how = "; ".join(f"rank {number} {text}" for number, text in enumerate(ended))
    if failures:
        raise RankFailed(f"{failures[0]}\n{how}")
    path = folder / f"{rank}.pkl"
    if not path.exists():
        raise RankFailed(f"rank {rank} left no result: {how}")
    return pickle.loads(path.read_bytes())[1]
