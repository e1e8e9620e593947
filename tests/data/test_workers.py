"""Worker processes: what they give, and how they and their reader end."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from titan_core.data.workers import Workers
from titan_core.runtime.errors import DataError


def numbers(rows: int, microbatches: int):
    """Rows are (step, slot); the stream's state is the step."""

    def read(slots):
        step = 0
        while True:
            for microbatch in range(microbatches):
                mine = [(step, slot) for slot in slots if slot // rows == microbatch]
                if mine:
                    yield mine, {"number": step}
            step += 1

    return read


def endless(_slots):
    while True:
        yield [bytes(1 << 20)], {}  # larger than a pipe: the worker waits to be read


def wait_for(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # nobody's fault where no init reaps
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 6, 9])
def test_rows_come_in_slot_order(workers: int) -> None:
    group = Workers(numbers(2, 3), rows=2, microbatches=3, workers=workers)
    assert group.count == min(workers, 6)
    shares = iter(group)
    for step in range(4):
        for microbatch in range(3):
            rows, state = next(shares)
            assert rows == [(step, 2 * microbatch), (step, 2 * microbatch + 1)]
        assert state["number"] == step
    group.close()


def test_the_state_is_that_of_the_worker_that_is_behind() -> None:
    group = Workers(numbers(1, 2), rows=1, microbatches=2, workers=2)
    shares = iter(group)
    states = [next(shares)[1]["number"] for _ in range(6)]
    assert states == [0, 0, 0, 1, 1, 2]
    group.close()


def test_closing_leaves_no_process() -> None:
    group = Workers(endless, rows=2, microbatches=1, workers=2)
    pids = [process.pid for process in group._processes]
    next(iter(group))
    group.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    group.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_that_stop_a_run_do_not_stop_its_data(number: int) -> None:
    group = Workers(numbers(2, 1), rows=2, microbatches=1, workers=2)
    shares = iter(group)
    next(shares)
    for process in group._processes:
        os.kill(process.pid, number)
    assert [next(shares)[0] for _ in range(300)][-1] == [(300, 0), (300, 1)]
    group.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_is_noticed(victim: int) -> None:
    group = Workers(endless, rows=2, microbatches=1, workers=2)
    shares = iter(group)
    next(shares)
    os.kill(group._processes[victim].pid, signal.SIGKILL)
    with pytest.raises(DataError, match=rf"data worker {victim} died \(SIGKILL\)") as caught:
        list(shares)
    assert "data.num_workers" in (caught.value.tip or "")
    group.close()


def test_an_error_of_a_worker_is_told() -> None:
    def broken(_slots):
        yield [1], {}
        raise ValueError("no such luck")

    group = Workers(broken, rows=1, microbatches=1, workers=1)
    shares = iter(group)
    assert next(shares) == ([1], {})
    with pytest.raises(DataError, match="ValueError: no such luck"):
        next(shares)
    group.close()


def test_workers_end_when_the_trainer_is_killed() -> None:
    out, into = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        group = Workers(endless, rows=3, microbatches=1, workers=3)
        next(iter(group))
        os.write(into, " ".join(str(process.pid) for process in group._processes).encode())
        signal.pause()
        os._exit(1)
    pids = [int(pid) for pid in os.read(out, 1000).split()]
    assert len(pids) == 3
    assert not any(has_ended(pid) for pid in pids)
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    assert wait_for(lambda: all(has_ended(pid) for pid in pids))
    os.close(out)
    os.close(into)


def test_python_ends_with_workers_that_nobody_closed() -> None:
    program = """
import signal
from titan_core.data.workers import Workers
def endless(_slots):
    while True:
        yield [bytes(1 << 20)], {}
group = Workers(endless, rows=2, microbatches=1, workers=2)
next(iter(group))
print("read")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "read\n", "")
