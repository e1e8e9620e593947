"""Starting the ranks on this host, from a process that never imports torch, and joining a job that others started."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import titan_cli
from titan_cli.output import Output
from titan_cli.worker import EVENT_FD, in_worker
from titan_core.runtime.errors import CollectiveFailed, ConfigError, Problem, TitanError, UsageError

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
CRASH_GRACE = 15.0  # seconds that the others get after one rank failed: they may hang in a collective
_TERM_GRACE = 5.0  # seconds from SIGTERM to SIGKILL
_POLL = 0.05
# How a rank dies of another one's death. Such an error is never the first cause.
_PEER_LOST = re.compile(r"connection (closed|reset)|cannot be reached|broken pipe|remote process exited", re.IGNORECASE)

_WAITED = CollectiveFailed.__name__  # the error of ranks that waited for another one; it names their report


@dataclass(frozen=True)
class Ranks:
    """How many ranks, and which of them this process has to start; `note` is for the user."""

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    rdzv: str | None = None
    joined: bool = False
    note: str | None = None

    @staticmethod
    def of(nproc: str, nnodes: int = 1, node_rank: int = 0, rdzv: str | None = None) -> Ranks:
        """Read the options; inside torchrun, srun or our own spawner they are ignored and the job is joined."""
        world = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS")
        if world and ("RANK" in os.environ or "SLURM_PROCID" in os.environ):
            started_by = "RANK and WORLD_SIZE" if "RANK" in os.environ else "Slurm"
            note = f"`--nproc {nproc}` is ignored: {started_by} says that this is one of {world} ranks"
            return Ranks(int(world), joined=True, note=None if in_worker() or nproc in ("1", world) else note)
        if nproc != "auto" and not (nproc.isdecimal() and int(nproc) > 0):
            raise UsageError(f"`--nproc` cannot be `{nproc}`", tip="a number of ranks, or `auto`")
        if nnodes > 1 and not rdzv:
            raise UsageError("several hosts need an address to meet at", tip="--rdzv HOST:PORT, the same on every host")
        if node_rank >= nnodes:
            raise UsageError(f"`--node-rank {node_rank}` is not below `--nnodes {nnodes}`")
        if rdzv and not re.fullmatch(r"[^:\s]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", rdzv):
            raise UsageError(f"`--rdzv` cannot be `{rdzv}`", tip="HOST:PORT, e.g. node01:29500")
        return Ranks(count_gpus() or 1 if nproc == "auto" else int(nproc), nnodes, node_rank, rdzv)

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nproc * self.nnodes

    @property
    def must_spawn(self) -> bool:
        """Has this process to start ranks?"""
        return not self.joined and self.world_size > 1


def count_gpus() -> int:
    """Count the GPUs that a process started here would see, without loading CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    gpus = Path("/proc/driver/nvidia/gpus")
    return len(list(gpus.iterdir())) if gpus.is_dir() else 0


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    pipe: IO[bytes]
    stderr: IO[bytes] | None
    buffer: bytes = b""
    code: int | None = None
    done: int | None = None
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    trace: str | None = None
    failed_at: float = float("inf")
    ended_by_us: bool = False

    def outcome(self) -> int:
        """Return the exit code that counts: what the worker said before it left, if it said so."""
        if self.done is not None:
            return self.done
        return 0 if self.code is None else self.code

    def failed(self) -> bool:
        """Has it left, and not because it finished or saved?"""
        return self.code is not None and self.outcome() not in (0, 75)

    def explained(self) -> dict[str, Any]:
        """Return the error that it reported, or what can be said of its death."""
        return self.error or _death(self)


@dataclass
class _Job:
    workers: list[_Worker]
    output: Output
    grace: float
    signal: int | None = None
    deadline: float | None = None
    terminated: bool = False
    warned: set[str] = field(default_factory=set)


def spawn(ranks: Ranks, grace: float, output: Output, words: Sequence[str], program: Sequence[str] = ()) -> int:
    """Start this host's ranks with the same command line, wait for them, and return the job's exit code.

    Signals are passed on, once; `grace` is how many seconds the ranks then get. If a rank fails the others get some
    seconds and are then ended. `program` replaces titan in tests.
    """
    address, port = (ranks.rdzv or f"127.0.0.1:{_free_port()}").rsplit(":", 1)
    command = [*(program or _titan()), *words]
    job = _Job([], output, grace)
    before = {number: signal.signal(number, lambda n, _: _forward(job, n)) for number in FORWARDED}
    try:
        for i in range(ranks.nproc):
            job.workers.append(_start(i, ranks, address.strip("[]"), port, command))
            if job.signal is not None:  # it came while the ranks were being started
                _signal(job.workers[-1], job.signal)
        while any(worker.code is None for worker in job.workers):
            for worker in job.workers:
                _read_pipe(job, worker)
                _reap(job, worker)
            _enforce(job)
            time.sleep(_POLL)
        return _conclude(job)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for worker in job.workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.pipe.close()


def _titan() -> list[str]:
    """Return the command that is titan. `-m` puts the working folder first on the path, where a user's `tokenizers.py`
    would hide the package; -P does not, and is left out only where titan itself is run from the working folder."""
    from_here = Path(titan_cli.__file__).parents[1] == Path.cwd()
    return [sys.executable, *([] if from_here else ["-P"]), "-m", "titan_cli"]


def _start(local_rank: int, ranks: Ranks, address: str, port: str, command: list[str]) -> _Worker:
    rank = ranks.node_rank * ranks.nproc + local_rank
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    env = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(ranks.nproc),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        EVENT_FD: str(writing),
    }
    if not count_gpus():
        env.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks.nproc)))
    quiet = rank > 0
    stderr = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115 - closed with the worker
    process = subprocess.Popen(
        command,
        env=env,
        pass_fds=[writing],
        start_new_session=True,  # Ctrl-C in the terminal then reaches a rank once: from here
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=stderr,
    )
    os.close(writing)
    return _Worker(rank, process, os.fdopen(reading, "rb", buffering=0), stderr)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _forward(job: _Job, number: int) -> None:
    job.signal = number
    if job.deadline is None:
        job.deadline = time.monotonic() + job.grace
    for worker in job.workers:
        _signal(worker, number)


def _signal(worker: _Worker, number: int) -> None:
    if worker.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            worker.process.send_signal(number)


def _read_pipe(job: _Job, worker: _Worker) -> None:
    with contextlib.suppress(BlockingIOError):
        while chunk := worker.pipe.read(65536):
            worker.buffer += chunk
    *lines, worker.buffer = worker.buffer.split(b"\n")
    for line in lines:
        _take(job, worker, json.loads(line))


def _take(job: _Job, worker: _Worker, message: dict[str, Any]) -> None:
    if "warning" in message and message["warning"] not in job.warned:
        job.warned.add(message["warning"])
        job.output.warn(f"rank {worker.rank}: {message['warning']}")
    if "error" in message and worker.error is None:
        worker.error, worker.trace, worker.failed_at = message["error"], message.get("trace"), message["time"]
    worker.result = message.get("result", worker.result)
    worker.done = message.get("done", worker.done)


def _reap(job: _Job, worker: _Worker) -> None:
    """Note that a worker has left; if it failed, the others' time runs."""
    if worker.code is not None or worker.process.poll() is None:
        return
    _read_pipe(job, worker)  # its last words
    worker.code = worker.process.poll()
    if not worker.failed():
        return
    worker.ended_by_us = job.terminated and worker.error is None
    worker.failed_at = min(worker.failed_at, time.time())
    soon = time.monotonic() + CRASH_GRACE
    job.deadline = soon if job.deadline is None else min(job.deadline, soon)


def _enforce(job: _Job) -> None:
    """End ranks that are still there after their time: SIGTERM, then SIGKILL."""
    if job.deadline is None or time.monotonic() < job.deadline:
        return
    for worker in job.workers:
        _signal(worker, signal.SIGKILL if job.terminated else signal.SIGTERM)
    job.terminated, job.deadline = True, time.monotonic() + _TERM_GRACE


def _conclude(job: _Job) -> int:
    """Give the result, or show the first failure once; return the exit code of the job."""
    failed = [worker for worker in job.workers if worker.failed()]
    if not failed:
        for worker in job.workers:
            if worker.result is not None:
                job.output.result(**worker.result)
        return 75 if 75 in [worker.outcome() for worker in job.workers] else 0
    first = min(failed, key=_order)
    error = first.explained()
    shown = TitanError(f"rank {first.rank}: {error['message']}", where=error.get("where"), tip=error.get("tip"))
    shown.exit_code = int(error["code"])
    if error.get("problems"):  # a config error is every rank's: no rank to name
        shown = ConfigError([Problem(**problem) for problem in error["problems"]])
    reported = next((e for e in (w.explained() for w in failed) if e.get("kind") == _WAITED), None)
    if error.get("kind") == _WAITED:  # it speaks of all ranks
        shown = CollectiveFailed(error["message"], where=error.get("where"), tip=error.get("tip"))
    elif reported is not None and first.error is None:  # how a rank died, and what the others know of it
        shown.message, shown.where = f"{shown.message}; {reported['message']}", reported["where"]
    if error.get("kind") == "Interrupted":  # every rank was
        shown.message, failed = error["message"], []
    if first.trace:
        job.output.warn(f"traceback of rank {first.rank}:\n{first.trace}")
    job.output.error(shown)
    same = sum(w is not first and w.explained()["message"] == error["message"] for w in failed)
    if same:
        job.output.say(f"  {same} other rank{'s' if same > 1 else ''} failed the same way")
    return shown.exit_code


def _order(worker: _Worker) -> tuple[bool, bool, float]:
    """Sort failures by how likely they are the cause of the others: our own doing last, lost peers before that."""
    error = worker.explained()
    lost = error.get("kind") == _WAITED or _PEER_LOST.search(error["message"]) is not None
    return worker.ended_by_us, lost, worker.failed_at


def _death(worker: _Worker) -> dict[str, Any]:
    """Describe a worker that left without a word, with the last lines that it printed."""
    code = worker.outcome()
    if code in (-signal.SIGINT, -signal.SIGTERM) and not worker.ended_by_us:
        return {"message": f"stopped by {signal.Signals(-code).name}; nothing was saved", "code": 128 - code}
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
    last = ""
    if worker.stderr is not None:
        worker.stderr.seek(0)
        last = " | ".join(worker.stderr.read()[-2000:].decode(errors="replace").strip().splitlines()[-3:])
    tip = "out of memory? `dmesg` names what the kernel killed" if code == -signal.SIGKILL else None
    if worker.ended_by_us:
        tip = "it did not stop in the time that `--grace` gives"
    return {"message": f"{how}" + (f": {last}" if last else ""), "tip": tip, "code": 1}
