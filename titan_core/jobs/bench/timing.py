"""The one timer of kernels: medians of single calls on cold caches, by events on a GPU, by the clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_WARM_UP_SECONDS = 0.05
_LEAST_CALLS, _MOST_CALLS = 5, 200
_CPU_CACHE = 64 << 20  # bytes that are written between calls on a CPU: more than most last-level caches hold


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, half the distance from the 20th to the 80th percentile, the fastest."""

    seconds: float
    spread: float
    fastest: float
    calls: int


class Timer:
    """Times calls on one device. Between calls a buffer of twice its last-level cache is overwritten, so that every
    call finds its inputs in memory; that takes longer than a launch, so launches are hidden as in a real step.

    `budget` is how many seconds the calls of one function may take, overwriting included.
    """

    def __init__(self, device: torch.device, budget: float = 0.3) -> None:
        self.device, self.budget = device, budget
        size = _CPU_CACHE if device.type != "cuda" else 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device=device)

    def time(self, call: Callable[[], object]) -> Timing:
        """Return what a call takes; it is warmed up first, so compilation and set-up stay out."""
        measure = self._on_gpu if self.device.type == "cuda" else self._on_cpu
        call()
        began, tried = time.perf_counter(), measure(call, 1)
        while time.perf_counter() - began < _WARM_UP_SECONDS and len(tried) < _LEAST_CALLS:
            tried += measure(call, 1)
        each = (time.perf_counter() - began) / len(tried)
        calls = min(_MOST_CALLS, max(_LEAST_CALLS, int(self.budget / each)))
        taken = sorted(measure(call, calls))
        low, high = taken[len(taken) // 5], taken[-1 - len(taken) // 5]
        return Timing(statistics.median(taken), (high - low) / 2, taken[0], calls)

    def _on_gpu(self, call: Callable[[], object], calls: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for begin, end in events:
            self._flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def _on_cpu(self, call: Callable[[], object], calls: int) -> list[float]:
        taken = []
        for _ in range(calls):
            self._flush.zero_()
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        return taken
