"""Starting the ranks on this host, from a process that never imports torch, and joining a job that others started.

A worker tells its parent three things through a pipe: a warning, the error that ended it, and that it is done. What it
prints goes to the terminal from the first rank only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from titan_cli.output import Output, error_as_dict
from titan_core.runtime.errors import TitanError, UsageError
from titan_core.runtime.events import Event, Listener, Warned

EVENT_FD = "TITAN_EVENT_FD"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
CRASH_GRACE = 15.0  # seconds that the others get after one rank died: they hang in a collective
_POLL = 0.05


@dataclass(frozen=True)
class Ranks:
    """How many ranks, and which of them this process has to start."""

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    rdzv: str | None = None
    joined: bool = False

    @staticmethod
    def of(nproc: str, nnodes: int = 1, node_rank: int = 0, rdzv: str | None = None) -> Ranks:
        """Read the options; inside torchrun, srun or our own spawner they are ignored and the job is joined."""
        world = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS")
        if world and ("RANK" in os.environ or "SLURM_PROCID" in os.environ):
            return Ranks(int(world), joined=True)
        if nproc != "auto" and not (nproc.isdigit() and int(nproc) > 0):
            raise UsageError(f"`--nproc` cannot be `{nproc}`", tip="a number of ranks, or `auto`")
        if nnodes > 1 and not rdzv:
            raise UsageError("several hosts need an address to meet at", tip="--rdzv HOST:PORT, the same on every host")
        if node_rank >= nnodes:
            raise UsageError(f"`--node-rank {node_rank}` is not below `--nnodes {nnodes}`")
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


def is_main_rank() -> bool:
    """Is this the rank that prints?"""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


# ---------------------------------------------------------------------------------------------- in a worker


def in_worker() -> bool:
    """Was this process started by `spawn`?"""
    return EVENT_FD in os.environ


def tell_parent(**message: Any) -> None:
    """Send the parent a line; a parent that is gone is no reason to fail."""
    line = json.dumps({"time": time.time(), **message}) + "\n"
    with contextlib.suppress(OSError):
        os.write(int(os.environ[EVENT_FD]), line.encode())


def report_error(error: TitanError) -> None:
    """Send the parent the error that ends this worker."""
    tell_parent(error=error_as_dict(error))


@contextlib.contextmanager
def worker_listener(display: Listener) -> Iterator[Listener]:
    """Return the listener of this process: the display on the main rank, the parent for the others' warnings."""

    def relay(event: Event) -> None:
        if isinstance(event, Warned):
            tell_parent(warning=event.text)

    yield display if is_main_rank() or not in_worker() else relay


# ---------------------------------------------------------------------------------------------- in the parent


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    pipe: IO[bytes]
    stderr: IO[bytes] | None
    buffer: bytes = b""
    code: int | None = None
    done: int | None = None
    error: dict[str, Any] | None = None
    error_time: float = float("inf")

    def outcome(self) -> int:
        """Return the exit code that counts: what the worker said before it left, if it said so."""
        if self.done is not None:
            return self.done
        return 0 if self.code is None else self.code


@dataclass
class _Job:
    workers: list[_Worker]
    output: Output
    grace: float
    stopping: bool = False
    deadline: float | None = None
    warned: set[str] = field(default_factory=set)


def spawn(ranks: Ranks, grace: float, output: Output, argv: list[str] | None = None) -> int:
    """Start this host's ranks with the same command line, wait for them, and return the job's exit code.

    Signals are passed on, once. If a rank dies the others get some seconds and are then ended.
    """
    words = argv or [sys.executable, "-m", "titan_cli", *sys.argv[1:]]
    address, port = (ranks.rdzv or f"127.0.0.1:{_free_port()}").rsplit(":", 1)
    job = _Job([_start(i, ranks, address, port, words) for i in range(ranks.nproc)], output, grace)
    before = {number: signal.signal(number, lambda n, _: _forward(job, n)) for number in FORWARDED}
    try:
        while any(worker.code is None for worker in job.workers):
            _read_pipes(job)
            _reap(job)
            _enforce(job)
            time.sleep(_POLL)
        _read_pipes(job)
        return _conclude(job)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for worker in job.workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.pipe.close()


def _start(local_rank: int, ranks: Ranks, address: str, port: str, argv: list[str]) -> _Worker:
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
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks.nproc)))
    quiet = rank > 0
    stderr = tempfile.TemporaryFile() if quiet else None  # noqa: SIM115 - closed with the worker
    process = subprocess.Popen(
        argv,
        env=env,
        pass_fds=[writing],
        start_new_session=True,  # Ctrl-C in the terminal then reaches a rank once: from here
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=stderr,
    )
    os.close(writing)
    return _Worker(rank, process, os.fdopen(reading, "rb", buffering=0), stderr)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _forward(job: _Job, number: int) -> None:
    job.stopping = True
    job.deadline = time.monotonic() + job.grace
    for worker in job.workers:
        _signal(worker, number)


def _signal(worker: _Worker, number: int) -> None:
    if worker.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            worker.process.send_signal(number)


def _read_pipes(job: _Job) -> None:
    for worker in job.workers:
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
        worker.error, worker.error_time = message["error"], message["time"]
    if "done" in message:
        worker.done = message["done"]


def _reap(job: _Job) -> None:
    for worker in job.workers:
        if worker.code is None:
            worker.code = worker.process.poll()
            if worker.code is not None and worker.outcome() != 0 and worker.error_time == float("inf"):
                worker.error_time = time.time()
            failed = worker.code is not None and worker.done is None and worker.outcome() != 0
            if failed and not job.stopping and job.deadline is None:
                job.deadline = time.monotonic() + CRASH_GRACE


def _enforce(job: _Job) -> None:
    """End ranks that are still there after their time: SIGTERM, then SIGKILL."""
    if job.deadline is None or time.monotonic() < job.deadline:
        return
    for worker in job.workers:
        _signal(worker, signal.SIGTERM if job.deadline != 0.0 else signal.SIGKILL)
    job.deadline = 0.0 if job.deadline == 0.0 or job.stopping else time.monotonic() + 5.0
    job.stopping = True


def _conclude(job: _Job) -> int:
    """Show the first failure once, and return the exit code of the job."""
    codes = [worker.outcome() for worker in job.workers]
    failed = [worker for worker in job.workers if worker.outcome() not in (0, 75)]
    if not failed:
        return 75 if 75 in codes else 0
    first = min(failed, key=lambda worker: (worker.error is None, worker.error_time))
    error = first.error or _death(first)
    shown = TitanError(f"rank {first.rank}: {error['message']}", where=error.get("where"), tip=error.get("tip"))
    shown.exit_code = int(error["code"])
    if error.get("problems"):  # a config error is every rank's: no rank to name
        from titan_core.runtime.errors import ConfigError, Problem

        shown = ConfigError([Problem(**problem) for problem in error["problems"]])
    job.output.error(shown)
    same = sum(w is not first and w.error is not None and w.error["message"] == error["message"] for w in failed)
    if same:
        job.output.say(f"  {same} other rank{'s' if same > 1 else ''} failed the same way")
    return shown.exit_code


def _death(worker: _Worker) -> dict[str, Any]:
    """Describe a worker that left without a word, with the last lines that it printed."""
    code = worker.outcome()
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
    last = ""
    if worker.stderr is not None:
        worker.stderr.seek(0)
        last = " | ".join(worker.stderr.read()[-2000:].decode(errors="replace").strip().splitlines()[-3:])
    tip = "out of memory? `dmesg` names what the kernel killed" if code == -signal.SIGKILL else None
    return {"message": f"{how}" + (f": {last}" if last else ""), "tip": tip, "code": 1}
