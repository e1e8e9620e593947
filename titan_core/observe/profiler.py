"""Profiler traces and memory snapshots at chosen steps, on any device."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import torch

from titan_core.config.schema import Config
from titan_core.observe.memory import start_history, stop_history, write_snapshot
from titan_core.runtime.errors import ConfigError, Problem, RunFailed


class Profiler:
    """Writes a trace every `profile_freq` steps and a memory snapshot every `memory_snapshot_freq`.

    Both go by the run's step, so a resumed run writes at the same steps. A run that ends within a trace writes what is
    there. Raises `RunFailed` where it cannot write.
    """

    def __init__(self, config: Config, rank: int, device: torch.device) -> None:
        self.config = config.profiling
        self.rank = rank
        self.device = device
        base = Path(config.job.dump_folder)
        self._traces = base / self.config.save_traces_folder
        self._snapshots = base / self.config.save_memory_snapshot_folder
        self._running: torch.profiler.profile | None = None
        self._step = 0
        recorded = self.config.profiler_active + self.config.profiler_warmup
        if self.config.enable_profiling and recorded > self.config.profile_freq:
            message = f"{recorded} steps of warmup and recording do not fit into {self.config.profile_freq}"
            raise ConfigError([Problem("profiling.profile_freq", message, tip="raise profiling.profile_freq")])

    def __enter__(self) -> Profiler:
        if self.config.enable_memory_snapshot:
            start_history(self.device)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        running, self._running = self._running, None
        if running is not None:
            # an error that is under way says more than that its trace could not be written
            with contextlib.suppress(RunFailed) if error is not None else contextlib.nullcontext():
                running.stop()
        if self.config.enable_memory_snapshot:
            stop_history(self.device)

    def before_first_step(self, step: int) -> None:
        """Start a trace if one begins at the run's first step; `step` is the last one that was done before."""
        self._step = step
        if self.config.enable_profiling:
            self._start_if_due()

    def after_step(self, step: int) -> None:
        """Start, go on, or write, as the step demands."""
        self._step = step
        if self.config.enable_profiling:
            self._go_on()
            self._start_if_due()
        freq = self.config.memory_snapshot_freq or self.config.profile_freq
        if self.config.enable_memory_snapshot and step % freq == 0:
            folder = self._snapshots / f"step_{step}"
            with _explained("snapshot", folder):
                write_snapshot(folder, self.rank, self.device)

    def _go_on(self) -> None:
        if self._running is not None:
            self._running.step()
            if self._step % self.config.profile_freq == 0:  # it has written itself
                self._running.stop()
                self._running = None

    def _start_if_due(self) -> None:
        freq, active, warmup = self.config.profile_freq, self.config.profiler_active, self.config.profiler_warmup
        if self._running is None and self._step % freq == freq - active - warmup:
            running = torch.profiler.profile(
                activities=self._activities(),
                schedule=torch.profiler.schedule(wait=0, warmup=warmup, active=active, repeat=1),
                record_shapes=True,
                acc_events=True,  # one cycle each: nothing piles up, and torch does not warn that it clears
                on_trace_ready=self._write,
            )
            running.start()
            self._running = running

    def _activities(self) -> list[torch.profiler.ProfilerActivity]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        return activities

    def _write(self, profile: torch.profiler.profile) -> None:
        path = self._traces / f"step_{self._step}" / f"rank{self.rank}_trace.json"
        with _explained("trace", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            profile.export_chrome_trace(str(path))
            if not path.exists():  # the exporter says nothing of a full disk
                path.with_name(path.name + ".tmp").unlink(missing_ok=True)
                raise OSError(errno.EIO, "is the disk full?")


@contextlib.contextmanager
def _explained(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        tip = "make room or switch profiling off; the same command goes on from the last checkpoint"
        raise RunFailed(f"cannot write the {what}: {error.strerror}", where=str(path), tip=tip) from error
