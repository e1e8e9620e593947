"""Hangs made on purpose in a training step: each ends in time, with a report that names collective and ranks."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks import RankFailed, run_ranks
from tests.runs import tiny
from titan_core.jobs import train
from titan_core.runtime import flight_recorder
from titan_core.runtime.errors import CollectiveFailed, DataError
from titan_core.training import step as step_module

TIMEOUT = 2


def _train_with(resolved, fault, rank: int, at_call: int):
    """Train; `rank` meets `fault` in place of its `at_call`-th reduction of weights. Return how this rank ended."""
    original, calls = step_module._all_reduce, []

    def reduce(value, parts):
        calls.append(1)
        if parts.world.rank == rank and len(calls) == at_call:
            return fault(value, parts)
        return original(value, parts)

    step_module._all_reduce = reduce
    began = time.monotonic()
    try:
        train.run(resolved)
    except CollectiveFailed as error:
        return error.message, error.where, error.tip, time.monotonic() - began
    except DataError as error:
        return error.message, None, None, time.monotonic() - began
    return None


def skip(value, parts):
    return value


def sleep(value, parts):
    time.sleep(100)


def die(value, parts):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(value, parts):
    raise DataError("the shard is bad")


def widen(value, parts):
    dist.all_reduce(value.new_zeros(100))
    return value


def hang(folder: Path, fault, size: int, rank: int, **changes) -> tuple[list, str]:
    """Return how each rank ended, and the report."""
    changes = {"training__local_batch_size": 1, "training__global_batch_size": size, **changes}
    timeouts = {"comm__init_timeout_seconds": 20, "comm__train_timeout_seconds": TIMEOUT}
    resolved = tiny(folder, **timeouts, **changes)
    try:
        ended = run_ranks(_train_with, size, resolved, fault, rank, 3)
    except RankFailed:  # one is dead
        ended = []
    return ended, (folder / "comm_traces" / "report.txt").read_text()


@pytest.fixture(autouse=True)
def little_patience(monkeypatch) -> None:
    monkeypatch.setattr(flight_recorder, "PATIENCE", 1.5)
    monkeypatch.setattr(flight_recorder, "POLL", 0.1)
