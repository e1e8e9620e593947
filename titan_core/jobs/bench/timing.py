"""The one timer of kernels: medians of single calls on cold caches, by events on a GPU, by the clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

_WARM_UP_SECONDS = 0.05
_LEAST_CALLS, _MOST_CALLS = 5, 200
_ROUNDS = 5  # turns that those who are compared take
_CPU_CACHE = 64 << 20  # bytes that are written between calls on a CPU: more than most last-level caches hold
_LONGEST_HOLD = 5e-3  # seconds


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, half the distance from the 20th to the 80th percentile, the fastest.

    `host` is the median time in which a GPU's host launches a call; on a CPU there is no such thing.
    """

    seconds: float
    spread: float
    fastest: float
    calls: int
    host: float | None


@dataclass
class _Runner:
    """One of those who are compared: how many calls it makes a turn, for how many seconds a GPU is held before each,
    what they took, on the device and to launch, and how one failed."""

    call: Callable[[], object]
    calls: int = 1
    hold: float = 0.0
    taken: list[float] = field(default_factory=list)
    launched: list[float] = field(default_factory=list)
    failure: Exception | None = None


class Timer:
    """Times calls on one device. Between calls a buffer of twice its last-level cache is overwritten, so that every
    call finds its inputs in memory.

    A GPU is held before each call for as long as the host needs to launch it: timed are the GPU's work and its own
    gaps. In a step the host runs ahead; where it cannot, its time, which is told apart, is what counts.
    `budget` is how many seconds the calls of one function may take, overwriting included.
    """

    def __init__(self, device: torch.device, budget: float = 0.3) -> None:
        self.device, self.budget = device, budget
        gpu = device.type == "cuda"
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size if gpu else _CPU_CACHE
        self._flush = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device=device)
        self._make_calls = self._on_gpu if gpu else self._on_cpu
        self._cycles_per_second = _clock(device) if gpu else 0.0

    def time(self, call: Callable[[], object]) -> Timing:
        """Return what a call takes; it is warmed up first, so compilation and set-up stay out."""
        (found,) = self.race([call])
        if isinstance(found, Exception):
            raise found
        return found

    def race(self, calls: Sequence[Callable[[], object]]) -> list[Timing | Exception]:
        """Return what each call takes, or what it raised. They take turns: what slows the device down slows all."""
        runners = [_Runner(call) for call in calls]
        for runner in runners:
            _attempt(self._warm_up, runner)
        for first in range(_ROUNDS):
            for number in range(len(runners)):
                _attempt(self._make_calls, runners[(first + number) % len(runners)])
        return [runner.failure or _timing(runner) for runner in runners]

    def _warm_up(self, runner: _Runner) -> None:
        """Let caches and compilers settle, and see how long the host takes and how many calls fit into a turn."""
        runner.call()
        began = time.perf_counter()
        while not runner.taken or (time.perf_counter() - began < _WARM_UP_SECONDS and len(runner.taken) < _LEAST_CALLS):
            self._make_calls(runner)
        if runner.launched:
            runner.hold = min(_LONGEST_HOLD, 1.5 * statistics.median(runner.launched))
        each = (time.perf_counter() - began) / len(runner.taken) + runner.hold
        runner.calls = -(-min(_MOST_CALLS, max(_LEAST_CALLS, int(self.budget / each))) // _ROUNDS)
        runner.taken, runner.launched = [], []

    def _on_gpu(self, runner: _Runner) -> None:
        events = []
        for _ in range(runner.calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            if runner.hold:
                torch.cuda._sleep(int(runner.hold * self._cycles_per_second))
            began = time.perf_counter()
            begin.record()
            runner.call()
            end.record()
            runner.launched.append(time.perf_counter() - began)
            events.append((begin, end))
        torch.cuda.synchronize(self.device)
        runner.taken += [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def _on_cpu(self, runner: _Runner) -> None:
        for _ in range(runner.calls):
            self._flush.zero_()
            began = time.perf_counter()
            runner.call()
            runner.taken.append(time.perf_counter() - began)


def _clock(device: torch.device) -> float:
    """Return how many of `torch.cuda._sleep`'s cycles a GPU counts in a second."""
    cycles = 2_000_000
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize(device)
    return cycles / (begin.elapsed_time(end) / 1e3)


def _attempt(act: Callable[[_Runner], None], runner: _Runner) -> None:
    if runner.failure is None:
        try:
            act(runner)
        except Exception as error:  # any way in which someone's code may fail is that one's answer
            runner.failure = error


def _timing(runner: _Runner) -> Timing:
    taken = sorted(runner.taken)
    low, high = taken[len(taken) // 5], taken[-1 - len(taken) // 5]
    host = statistics.median(runner.launched) if runner.launched else None
    return Timing(statistics.median(taken), (high - low) / 2, taken[0], len(taken), host)
