"""From steps to numbers worth showing: loss, rates, memory, time left."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import psutil
import torch

from titan_core.estimation.peaks import peak_flops
from titan_core.runtime.events import StepDone
from titan_core.runtime.host_memory import peak_resident_bytes

GIB = 1 << 30


@dataclass
class StepMeter:
    """Collects what happens between two log lines of one rank.

    `flops_per_token` counts forward and backward; rates are per device, so tokens are divided by `world_size`.
    """

    device: torch.device
    world_size: int
    steps: int
    flops_per_token: float
    _tokens: int = 0
    _num_steps: int = 0
    _data_seconds: float = 0.0
    _began: float = field(default_factory=time.perf_counter)
    _paused: float = 0.0
    _pace: float | None = None

    def begin(self) -> None:
        """Start the clock: what went before the first step (building, loading) is no step's time."""
        self._began = time.perf_counter()

    def add(self, tokens: int, data_seconds: float) -> None:
        """Count one step: its tokens over all ranks, and the time that it waited for data."""
        self._tokens += tokens
        self._num_steps += 1
        self._data_seconds += data_seconds

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training: validation, a blocking save."""
        self._paused += seconds

    def report(
        self, *, step: int, loss: float, max_loss: float, grad_norm: float, lr: float, total_tokens: int
    ) -> StepDone:
        """Return a log line's numbers over the steps since the last one, and begin anew."""
        now = time.perf_counter()
        seconds = max(now - self._began - self._paused, 1e-9)
        per_step = seconds / max(self._num_steps, 1)
        rate = self._tokens / seconds / self.world_size
        tflops = rate * self.flops_per_token / 1e12
        peak = self._peak()
        gib, share, extra = self._memory()
        done = StepDone(
            step=step,
            steps=self.steps,
            loss=loss,
            max_loss=max_loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens=total_tokens,
            seconds=per_step,
            tokens_per_second=rate,
            tflops=tflops,
            mfu=None if peak is None else tflops * 1e12 / peak,
            memory_gib=gib,
            memory_share=share,
            data_share=min(1.0, self._data_seconds / seconds),
            eta_seconds=self._eta(step, per_step),
            extra=extra,
        )
        self._tokens = self._num_steps = 0
        self._data_seconds = self._paused = 0.0
        self._began = now
        return done

    def _eta(self, step: int, per_step: float) -> float:
        """Return seconds to the end, by a pace that smooths over lines; the first line (compilation) does not count."""
        left = self.steps - step
        if self._pace is None:
            self._pace = 0.0
            return left * per_step
        self._pace = per_step if self._pace == 0.0 else 0.8 * self._pace + 0.2 * per_step
        return left * self._pace

    def _peak(self) -> float | None:
        if self.device.type != "cuda":
            return None
        return peak_flops(torch.cuda.get_device_name(self.device))

    def _memory(self) -> tuple[float, float | None, dict[str, float]]:
        """Return the peak in GiB, its share of what there is, and more about the allocator.

        On a GPU it is the peak since the last line of what torch has reserved; on a CPU, of the process so far.
        """
        if self.device.type != "cuda":
            used = peak_resident_bytes()
            return used / GIB, used / psutil.virtual_memory().total, {}
        reserved = torch.cuda.max_memory_reserved(self.device)
        stats = torch.cuda.memory_stats(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        extra = {
            "memory/max_active(GiB)": stats.get("active_bytes.all.peak", 0) / GIB,
            "memory/num_alloc_retries": stats.get("num_alloc_retries", 0),
            "memory/num_ooms": stats.get("num_ooms", 0),
        }
        return reserved / GIB, reserved / torch.cuda.get_device_properties(self.device).total_memory, extra
