"""Kill -9 at any moment, saves included: the run goes on as if nothing had happened."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.runs import losses, tiny
from titan_core.checkpoint import find_step, read_shared
from titan_core.data.loader import data_hash
from titan_core.jobs import train

STEPS = 24
SETTINGS = {
    "training__steps": STEPS,
    "checkpoint__enable": True,
    "checkpoint__interval": 3,
    "checkpoint__keep_latest_k": 2,
}


def fork_and_kill(resolved, seconds: float) -> bool:
    """Train in a child and kill it after a time; return whether it ended before."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        try:
            train.run(resolved)
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def logged(folder: Path) -> dict[int, float]:
    """Return the loss of every step, the last one written where a step was done twice; doubles must agree."""
    found: dict[int, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line that the kill cut
        if record["event"] == "stepdone":
            assert found.get(record["step"], record["loss"]) == record["loss"]
            found[record["step"]] = record["loss"]
    return found


def state_hash(folder: Path) -> str:
    return data_hash(read_shared(find_step(str(folder)))["data"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_killed_twenty_times_the_curve_is_the_same(mode: str, tmp_path: Path) -> None:
    settings, began = {**SETTINGS, "training__steps": 12}, time.monotonic()
    whole = losses(tiny(tmp_path / "whole", **settings))
    longest = 1.5 * (time.monotonic() - began)  # on a loaded machine a run must still be able to end
    dice = random.Random(mode)
    kills = 0
    for _ in range(200):
        resolved = tiny(tmp_path / "cut", checkpoint__async_mode=mode, **settings)
        if fork_and_kill(resolved, dice.uniform(0.02, longest)):
            if kills >= 20:
                break
            for path in (tmp_path / "cut").rglob("*"):  # it ended before twenty kills: again from the start
                if path.is_file():
                    path.unlink()
            for path in sorted((tmp_path / "cut").rglob("*"), reverse=True):
                path.rmdir()
        else:
            kills += 1
    found = logged(tmp_path / "cut")
    assert kills >= 20
    assert [found[step] for step in range(1, len(whole) + 1)] == whole
    assert state_hash(tmp_path / "cut") == state_hash(tmp_path / "whole")


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_resume_on_other_ranks(first: int, then: int, tmp_path: Path) -> None:
    whole = losses(tiny(tmp_path / "whole", **SETTINGS))
    changes = {**SETTINGS, "training__local_batch_size": 2}
    begun = losses(tiny(tmp_path / "cut", **changes), first, until=11)
    ended = losses(tiny(tmp_path / "cut", **changes), then)
    assert len(begun) == 11
    assert begun + ended == pytest.approx(whole, rel=1e-5)
    assert state_hash(tmp_path / "cut") == state_hash(tmp_path / "whole")


def test_resume_is_bit_exact_on_the_same_layout(tmp_path: Path) -> None:
    whole = losses(tiny(tmp_path / "whole", **SETTINGS), 2)
    begun = losses(tiny(tmp_path / "cut", **SETTINGS), 2, until=7)
    assert begun + losses(tiny(tmp_path / "cut", **SETTINGS), 2) == whole


def test_finished_run_can_be_extended(tmp_path: Path) -> None:
    settings = {**SETTINGS, "lr_scheduler__decay_ratio": 0.0}
    whole = losses(tiny(tmp_path / "whole", **settings))
    losses(tiny(tmp_path / "cut", **{**settings, "training__steps": 10}))
    more = losses(tiny(tmp_path / "cut", **settings))
    assert more == whole[10:]


def _stop_by(resolved, number: int):
    """Train and send this process a signal after the third step."""
    from titan_core.runtime.events import StepDone

    def listen(event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), number)

    return train.run(resolved, listener=listen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_and_stops(number: signal.Signals, tmp_path: Path) -> None:
    whole = losses(tiny(tmp_path / "whole", **SETTINGS))
    result = _stop_by(tiny(tmp_path / "cut", **{**SETTINGS, "checkpoint__interval": 100}), number)
    assert result.stopped_by == number.name
    assert result.step == 3
    assert not result.finished
    assert losses(tiny(tmp_path / "cut", **SETTINGS)) == whole[3:]


def _stop_in_validation(resolved, batches: int):
    """Send this process SIGTERM during a validation; return the result and how many batches were validated."""
    from titan_core.tasks.causal_lm import CausalLM

    seen, original = [], CausalLM.forward

    def forward(task, batch):
        if not task.training:
            seen.append(1)
            if len(seen) == batches:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(task, batch)

    CausalLM.forward = forward
    try:
        return train.run(resolved), len(seen)
    finally:
        CausalLM.forward = original


@pytest.mark.parametrize("ranks", [1, 2])
def test_signal_in_a_validation_does_not_wait_for_its_end(ranks: int, tmp_path: Path) -> None:
    changes = {
        "validation__enable": True,
        "validation__steps": 40,
        "validation__freq": 2,
        "validation__seq_len": 32,
        "validation__local_batch_size": 2,
        "checkpoint__interval": 100,
    }
    batches = 40 // ranks + 5  # the first step validates whole, the second is stopped at its fifth batch
    resolved = tiny(tmp_path, **{**SETTINGS, **changes})
    for result, seen in run_ranks(_stop_in_validation, ranks, resolved, batches):
        assert (result.stopped_by, result.step) == ("SIGTERM", 2)
        assert batches <= seen <= batches + 2
        assert result.checkpoint is not None


def test_signal_to_one_rank_stops_all_at_one_step(tmp_path: Path) -> None:
    resolved = tiny(tmp_path, **{**SETTINGS, "checkpoint__interval": 100})
    results = run_ranks(_stop_by, 2, resolved, signal.SIGTERM)
    assert [r.stopped_by for r in results] == ["SIGTERM", "SIGTERM"]
    assert len({r.step for r in results}) == 1
    assert 3 <= results[0].step <= 5
    assert results[0].checkpoint is not None


def test_time_limit_saves_and_stops(tmp_path: Path) -> None:
    resolved = tiny(tmp_path, training__time_limit_minutes=0.0001, **SETTINGS)
    result = train.run(resolved)
    assert result.stopped_by == "the time limit"
    assert result.checkpoint is not None
    assert result.step < STEPS
