"""Stopping in good order: one flag, one step, on all ranks."""

import contextlib
import os
import signal
import threading
import time

import pytest
import torch.distributed as dist

from tests.ranks import run_ranks
from titan_core.runtime.errors import Interrupted
from titan_core.training import signals
from titan_core.training.signals import HANDLED, StopRequest


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_is_read_at_the_next_step(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert stop.agreed() is None
        send(number)
        assert stop.agreed() == number.name
        assert stop.agreed() == number.name


def test_the_first_signal_names_the_reason() -> None:
    with StopRequest() as stop:
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        assert stop.agreed() == "SIGUSR1"


def test_handlers_are_put_back() -> None:
    def mine(*_: object) -> None:
        pass

    before = {number: signal.getsignal(number) for number in HANDLED}
    try:
        signal.signal(signal.SIGUSR1, mine)
        with contextlib.suppress(ZeroDivisionError), StopRequest():
            assert signal.getsignal(signal.SIGUSR1) is not mine
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGUSR1) is mine
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        signal.signal(signal.SIGUSR1, before[signal.SIGUSR1])


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(signals, "time", clock)
    return clock


@pytest.mark.parametrize(("steps", "said"), [(17, "17 steps since"), (1, "1 step since")])
def test_a_second_ctrl_c_stops_at_once_and_says_what_it_costs(clock: Clock, steps: int, said: str) -> None:
    before = signal.getsignal(signal.SIGINT)  # a suite that runs in the background has it ignored
    with StopRequest(unsaved_steps=lambda: steps) as stop:
        send(signal.SIGINT)
        clock.now += 0.9  # a launcher passes on what the terminal has sent already
        send(signal.SIGINT)
        assert stop.agreed() == "SIGINT"
        clock.now += 0.1
        with pytest.raises(Interrupted, match=said) as caught:
            send(signal.SIGINT)
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_other_signals_never_stop_at_once(clock: Clock) -> None:
    with StopRequest() as stop:
        send(signal.SIGTERM)
        clock.now += 60
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert stop.agreed() == "SIGTERM"


def test_the_first_ctrl_c_after_another_signal_still_saves(clock: Clock) -> None:
    with StopRequest() as stop:
        send(signal.SIGTERM)
        clock.now += 60
        send(signal.SIGINT)
        assert stop.agreed() == "SIGTERM"
        clock.now += 1
        with pytest.raises(Interrupted):
            send(signal.SIGINT)


def test_time_limit(clock: Clock) -> None:
    stop = StopRequest(time_limit_minutes=2)
    clock.now += 119
    assert stop.agreed() is None
    clock.now += 1
    assert stop.agreed() == "the time limit"


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with StopRequest(time_limit_minutes=1e-9) as stop:
            time.sleep(0.001)
            seen.extend((signal.getsignal(signal.SIGTERM), stop.agreed()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, "the time limit"]


def _steps_until_agreed(sender: int | None, at: int, limit: float | None) -> tuple[int, str | None]:
    rank = dist.get_rank()
    with StopRequest(dist.new_group(backend="gloo"), limit if rank == 1 else None) as stop:
        for step in range(1, 20):
            if step == at and rank == sender:
                send(signal.SIGUSR1)
            reason = stop.agreed()
            if reason is not None:
                return step, reason
    return 20, None


@pytest.mark.parametrize("sender", [0, 1])
def test_all_ranks_stop_at_the_same_step(sender: int) -> None:
    found = run_ranks(_steps_until_agreed, 2, sender, 5, None)
    assert found == [(6, "SIGUSR1")] * 2


def test_one_ranks_time_limit_stops_all() -> None:
    assert run_ranks(_steps_until_agreed, 2, None, 0, 1e-9) == [(2, "the time limit")] * 2


def test_without_a_signal_nobody_stops() -> None:
    assert run_ranks(_steps_until_agreed, 2, None, 0, None) == [(20, None)] * 2


def _fail_alone() -> tuple[str, float]:
    """Rank 1 fails while rank 0 is elsewhere: nobody answers its last question."""
    group = dist.new_group(backend="gloo")
    rank = dist.get_rank()
    try:
        with StopRequest(group) as stop:
            stop.agreed()
            if rank == 1:
                stop.agreed()
                raise ValueError("rank 1 went wrong")
            time.sleep(1.5)
    except ValueError as error:
        return str(error), time.monotonic()
    return "fine", time.monotonic()


def test_a_failing_rank_reports_its_own_error_at_once() -> None:
    (fine, ended), (error, failed) = run_ranks(_fail_alone, 2)
    assert (fine, error) == ("fine", "rank 1 went wrong")
    assert failed < ended - 1
