"""Hangs made on purpose in a training step: each ends in time, with a report that names collective and ranks."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailed, run_ranks
from tests.runs import tiny
from titan_core.jobs import train
from titan_core.runtime import flight_recorder
from titan_core.runtime.errors import CollectiveFailed, DataError
from titan_core.training import step as step_module

TIMEOUT, MARGIN = 2, 6  # seconds; other processes run on the same cores


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


def _train_with(resolved, fault, faulty: int):
    """Train; the rank `faulty` meets `fault` instead of the third step's reduction. Return how this rank ended."""
    original, calls, began = step_module._all_reduce, [], []

    def reduce(value, parts):
        calls.append(1)
        if len(calls) < 3:
            return original(value, parts)
        began.append(time.monotonic())
        return fault(value, parts) if parts.world.rank == faulty else original(value, parts)

    step_module._all_reduce = reduce
    try:
        train.run(resolved)
    except (CollectiveFailed, DataError) as error:
        return error.message, error.where, error.tip, time.monotonic() - began[0]
    return None


def hang(folder: Path, fault, size: int, faulty: int, *, dies: bool = False, **changes) -> tuple[list, str]:
    """Return how each rank ended (nothing if one is dead), and the report."""
    changes = {"training__local_batch_size": 1, "training__global_batch_size": size, **changes}
    timeouts = {"comm__init_timeout_seconds": 20, "comm__train_timeout_seconds": TIMEOUT}
    resolved = tiny(folder, **timeouts, **changes)
    began = time.monotonic()
    ended = []
    with pytest.raises(RankFailed) if dies else contextlib.nullcontext():
        ended = run_ranks(_train_with, size, resolved, fault, faulty)
    assert time.monotonic() - began < TIMEOUT + MARGIN + 6  # all of it, two quick steps included
    return ended, (folder / "comm_traces" / "report.txt").read_text()


@pytest.fixture(autouse=True)
def little_patience(monkeypatch) -> None:
    monkeypatch.setattr(flight_recorder, "PATIENCE", 1.5)
    monkeypatch.setattr(flight_recorder, "POLL", 0.1)


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_rank_that_skips_a_collective(faulty: int, tmp_path: Path) -> None:
    ended, report = hang(tmp_path, skip, 2, faulty)
    for message, where, tip, seconds in ended:
        assert "the ranks do not match in all_reduce #" in message
        assert "of group `default_pg` (float32 [1])" in message
        assert f"rank {1 - faulty} entered it, but rank {faulty} is in all_gather #" in message
        assert "called by forward_backward (titan_core/parallel/data_parallel.py:" in message
        assert where == str(tmp_path / "comm_traces" / "report.txt")
        assert "same order" in tip
        assert TIMEOUT - 0.5 < seconds < TIMEOUT + MARGIN
    assert report.startswith(ended[0][0])
    assert f"waiting   rank {1 - faulty}\n  elsewhere rank {faulty}\n" in report


def test_a_rank_that_skips_a_collective_and_waits_in_another_group(tmp_path: Path) -> None:
    """All wait for each other then; it is the one whose step was never seen before."""
    ended, report = hang(tmp_path, skip, 4, 2, parallelism__data_parallel_replicate_degree=2)
    assert "rank 2 is missing in all_reduce #" in ended[0][0]
    assert "where ranks 0, 1, 3 wait: rank 2 waits in all_gather #" in ended[0][0]
    assert "of group `mesh_fsdp`" in ended[0][0]
    assert "was entered by rank 2, without rank 3" in report


def test_a_rank_that_sleeps(tmp_path: Path) -> None:
    ended, report = hang(tmp_path, sleep, 3, 1)
    assert len({message for message, *_ in ended}) == 1  # the sleeper is woken, with the same words
    message, _, tip, _ = ended[1]
    assert "rank 1 is missing in all_reduce #" in message
    assert "where ranks 0, 2 wait: rank 1 is in no collective but in sleep (training/test_hang.py:" in message
    assert "time.sleep(100)" in message
    assert "comm.train_timeout_seconds" in tip
    assert all(seconds < TIMEOUT + MARGIN for *_, seconds in ended)
    assert "stack     sleep (training/test_hang.py:" in report


def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    _, report = hang(tmp_path, die, 3, 1, dies=True)
    assert "rank 1 is missing in all_reduce #" in report
    assert "where ranks 0, 2 wait: rank 1 left no trace: it died" in report
    assert not (tmp_path / "comm_traces" / "rank_1").exists()


def test_a_rank_that_fails_by_itself(tmp_path: Path) -> None:
    ended, _ = hang(tmp_path, fail, 2, 1)
    assert "rank 1 had failed already: the shard is bad" in ended[0][0]
    assert ended[1][0] == "the shard is bad"
    assert ended[0][3] < TIMEOUT + MARGIN


def test_sizes_that_differ(tmp_path: Path, capfd) -> None:
    """Gloo ends the process of the rank that receives too much."""
    _, report = hang(tmp_path, widen, 3, 1, dies=True)
    assert "the ranks do not match in all_reduce #" in report
    assert "(float32 [1]): ranks 0, 2 entered it, but rank 1 is in all_reduce #" in report
    assert "(float32 [100]), called by widen (training/test_hang.py:" in report
    assert "was ended by a C++ exception in all_reduce #" in report
    assert "Received data size doesn't match" in capfd.readouterr().err


def test_traces_of_an_earlier_start_are_kept(tmp_path: Path) -> None:
    _, report = hang(tmp_path, fail, 2, 1)
    hang(tmp_path, fail, 2, 1)
    (aside,) = [path for path in (tmp_path / "comm_traces").iterdir() if path.is_dir()]
    assert (aside / "report.txt").read_text() == report
    assert {"rank_0", "rank_1", "rank_0.json", "rank_1.json"} < {path.name for path in aside.iterdir()}


def _timeouts() -> set[float]:
    groups = dist.distributed_c10d._world.pg_map
    found = {g.group_desc: g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups}
    assert {"default_pg", "mesh_dp_replicate", "stop"} <= set(found)
    return {seconds for name, seconds in found.items() if name != "checkpoint"}


def _record_timeouts(resolved, **options):
    """Train and return the timeouts of all groups in the first reduction of each step, and in validations."""
    steps, validations, original = [], [], step_module._all_reduce
    validate = train.Trainer._validate

    def reduce(value, parts):
        steps.append(_timeouts())
        return original(value, parts)

    def validating(trainer, step, stop):
        validations.append((step, _timeouts()))
        return validate(trainer, step, stop)

    step_module._all_reduce, train.Trainer._validate = reduce, validating
    train.run(resolved, **options)
    return steps, validations


def test_the_timeouts_of_the_phases(tmp_path: Path) -> None:
    changes = {
        "comm__init_timeout_seconds": 40,
        "comm__train_timeout_seconds": 30,
        "checkpoint__enable": True,
        "checkpoint__interval": 3,
        "validation__enable": True,
        "validation__freq": 2,
        "validation__seq_len": 32,
        "validation__local_batch_size": 1,
        "validation__steps": 4,
    }
    resolved = tiny(tmp_path, **changes)
    steps, validations = run_ranks(_record_timeouts, 2, resolved)[0]
    assert steps == [{40.0}, {30.0}, {30.0}, {30.0}, {30.0}, {30.0}]
    assert validations == [(1, {40.0}), (2, {30.0}), (4, {30.0}), (6, {30.0})]
    longer = tiny(tmp_path, **changes, training__steps=8, lr_scheduler__decay_ratio=0.0)
    allow = {"allow_change": ["lr_scheduler.*"]}
    steps, _ = run_ranks(_record_timeouts_with, 2, longer, allow)[0]
    assert steps == [{40.0}, {30.0}]  # a run that goes on has a first step, too


def _record_timeouts_with(resolved, options):
    return _record_timeouts(resolved, **options)


def test_a_run_that_ends_well_leaves_no_folder(tmp_path: Path) -> None:
    resolved = tiny(tmp_path, training__steps=2)
    run_ranks(_record_run, 2, resolved)
    assert not (tmp_path / "comm_traces").exists()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def _record_run(resolved):
    train.run(resolved)
