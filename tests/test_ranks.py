"""The harness itself: a rank that fails, dies or hangs is never taken for one that passed."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailed, run_ranks


def _sum(start: int) -> tuple[int, float, str]:
    total = torch.tensor(float(start + dist.get_rank()))
    dist.all_reduce(total)
    return dist.get_rank(), total.item(), os.environ["WORLD_SIZE"]


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("only here")
    dist.barrier()


def _die_on_one() -> None:
    if dist.get_rank() == 1:
        os._exit(0)


def _hang_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def _crash_on_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def _unpicklable() -> object:
    return lambda: None


def test_results_come_in_order() -> None:
    assert run_ranks(_sum, 2, 10) == [(0, 21.0, "2"), (1, 21.0, "2")]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (_fail_on_one, "only here"),
        (_die_on_one, "rank 1 left no result: .*rank 1 ended with code 0"),
        (_hang_on_one, "rank 1 left no result: .*rank 1 did not end in time"),
        (_crash_on_one, "rank 1 left no result: .*rank 1 was ended by SIGKILL"),
        (_unpicklable, "pickle"),
    ],
)
def test_failure_is_raised_in_the_parent(function, says: str) -> None:
    with pytest.raises(RankFailed, match=says):
        run_ranks(function, 2, timeout=2)
