"""How a run's events look: a live line and a log in a terminal, plain lines in a pipe."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable

from titan_cli.output import Output
from titan_core.runtime.events import (
    Event,
    Note,
    Phase,
    Planned,
    Progress,
    Sampled,
    Saved,
    StepDone,
    Text,
    Validated,
    Warned,
)

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 32
_BETWEEN_LINES = 5.0  # seconds from one line of progress to the next where there is no live line


class Display:
    """A listener that shows events to a person on stderr. Use as a context manager: it removes the live line.

    What is generated goes to stdout. Any thread may call it.
    """

    def __init__(self, output: Output) -> None:
        self.output = output
        self._losses: list[float] = []
        self._eta: float | None = None
        self._live: str | None = None
        self._lock = threading.RLock()
        self._begun: dict[str, tuple[float, float]] = {}  # what -> when it was first seen, and at which count
        self._shown = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_live()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Warned):
            rank = "" if event.rank is None else f"rank {event.rank}: "
            self._above(lambda: self.output.warn(rank + event.text))
        elif isinstance(event, Text):
            self.output.write(event.text)
        elif self.output.mode == "human":
            self._show(event)

    def _show(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._losses.append(event.loss)
            self._eta = event.eta_seconds
            self._line(step_line(event, shutil.get_terminal_size().columns if self.output.live() else None))
            self._update(event.step, event.steps)
        elif isinstance(event, Planned):
            for topic, text in event.rows:
                self._line(f"{self.output.style(f'{topic:<10}', 'bold')}{text}")
        elif isinstance(event, Note | Phase):
            self._line(f"{self.output.style('note', 'dim')}      {event.text}")
        elif isinstance(event, Validated):
            self._line(
                f"{self.output.style('valid', 'good')}     step {event.step}  loss {event.loss:.4f}  "
                f"{event.tokens:,} targets  {event.seconds:.1f} s"
            )
            if event.parts:
                self._line(f"{'':<10}" + "  ".join(f"{name} {value:.4f}" for name, value in event.parts.items()))
        elif isinstance(event, Sampled):
            more = f" and {len(event.paths) - 1} more" if len(event.paths) > 1 else ""
            self._line(f"{self.output.style('drawn', 'good')}     {event.paths[0]}{more}")
        elif isinstance(event, Saved):
            stall = f", training stood still {event.stall:.2f} s" if event.stall >= 0.01 else ""
            self._line(
                f"{self.output.style('saved', 'good')}     {event.path}  {size(event.bytes)} "
                f"in {event.seconds:.1f} s{stall}"
            )
        elif isinstance(event, Progress) and event.what == "step":
            self._update(int(event.done), int(event.total or 0))
        elif isinstance(event, Progress):
            self._progress(event)

    def _progress(self, event: Progress) -> None:
        """Show how far a countable job is: a live line, or a line now and then; its end is always shown."""
        now = time.monotonic()
        begun, first = self._begun.setdefault(event.what, (now, event.done))
        text = progress_line(event, now - begun, event.done - first)
        if event.total is not None and event.done >= event.total:
            self._end_live()
            self._line(text)
        elif self.output.live():
            self._draw(text)
        elif now - self._shown >= _BETWEEN_LINES:
            self._shown = now
            self._line(text)

    def stopping(self, text: str) -> None:
        """Say that the run is about to stop."""
        self._line(f"{self.output.style('stop', 'bold')}      {text}")

    def _line(self, text: str) -> None:
        self._above(lambda: self.output.tell(text + "\n"))

    def _above(self, write: Callable[[], None]) -> None:
        """Write a permanent line, above the live one if there is one."""
        with self._lock:
            if self._live is not None:
                self.output.tell("\r\033[2K")
            write()
            if self._live is not None:
                self.output.tell(self._live)

    def _update(self, step: int, steps: int) -> None:
        """Draw the live line: how far, the curve of the loss, how long still."""
        if not self.output.live() or not self._losses:
            return
        done = step / steps
        bar = ("━" * round(24 * done)).ljust(24, "╌")
        eta = "" if self._eta is None else f"  {duration(self._eta)} left"
        self._draw(f"{bar} step {step}/{steps}  {sparkline(self._losses)}{eta}")
        if step >= steps:
            self._end_live()

    def _draw(self, text: str) -> None:
        """Draw the live line. It is cut at the terminal's edge: a line that wraps cannot be removed."""
        with self._lock:
            self._live = self.output.style(text[: shutil.get_terminal_size().columns - 1], "good")
            self.output.tell(f"\r\033[2K{self._live}")

    def _end_live(self) -> None:
        with self._lock:
            if self._live is not None:
                self.output.tell("\r\033[2K")
                self._live = None


def step_line(event: StepDone, columns: int | None = None) -> str:
    """Return a step's numbers as one line; those that matter least are left out where `columns` are too few."""
    width = len(str(event.steps))
    speed = f"{event.tflops * 1000:.0f} GFLOP/s" if event.tflops < 1 else f"{event.tflops:.0f} TFLOP/s"
    parts = {
        "step": f"step {event.step:>{width}}/{event.steps}",
        "loss": f"loss {event.loss:.4f}",
        "grad": f"grad {event.grad_norm:.2f}",
        "lr": f"lr {event.lr:.2e}",
        "rate": f"{event.tokens_per_second:,.0f} tok/s",
        "speed": speed if event.mfu is None else f"{speed}  mfu {100 * event.mfu:.1f}%",
        "mem": f"mem {event.memory_gib:.2f}G",
        "data": f"data {100 * event.data_share:.0f}%",
    }
    if "mtp/loss_1" in event.extra:
        parts["mtp"] = f"mtp {event.extra['mtp/loss_1']:.4f}"
    if "experts/max_load" in event.extra:  # of the busiest one, relative to the mean
        parts["experts"] = f"experts {event.extra['experts/max_load']:.2f}x"
    if event.eta_seconds is not None:
        parts["eta"] = f"eta {duration(event.eta_seconds)}"
    for name in ("eta", "data", "lr", "mtp", "experts", "mem", "grad", "speed"):
        if columns is not None and len("  ".join(parts.values())) > columns:
            parts.pop(name, None)
    return "  ".join(parts.values())


def progress_line(event: Progress, seconds: float, done: float) -> str:
    """Return progress as one line; `done` in `seconds` is what was seen of it, for the rate and the time left."""
    amount = size if event.unit == "bytes" else lambda count: f"{count:,.0f}"
    unit = "" if event.unit == "bytes" else f" {event.unit}"
    total = "" if event.total is None else f" / {amount(event.total)}"
    text = f"{event.what:<10}{amount(event.done)}{total}{unit}"
    if seconds <= 0 or done <= 0:
        return text
    text += f"  {amount(done / seconds)}{unit}/s"
    if event.total is None or event.done >= event.total:
        return text
    return f"{text}  {duration((event.total - event.done) * seconds / done)} left"


def sparkline(values: list[float]) -> str:
    """Draw values as a row of bars, the newest last."""
    if len(values) > _CURVE_WIDTH:
        step = len(values) / _CURVE_WIDTH
        values = [values[int((i + 1) * step) - 1] for i in range(_CURVE_WIDTH)]
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)


def duration(seconds: float) -> str:
    """Write a duration in the two largest units that matter."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


def size(num_bytes: float) -> str:
    """Write a number of bytes."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError
