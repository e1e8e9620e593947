"""How a run's events look: a live line and a log in a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from typing import Any

from titan_cli.output import Output
from titan_core.runtime.events import (
    Event,
    Note,
    Phase,
    Planned,
    Progress,
    Saved,
    StepDone,
    Text,
    Validated,
    Warned,
)

_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 32


class Display:
    """A listener that shows events to a person on stderr. Use as a context manager: it restores the cursor."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self._losses: list[float] = []
        self._eta: float | None = None
        self._live: Any = None

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
            print(event.text, end="", flush=True)
        elif self.output.mode == "human":
            self._show(event)

    def _show(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._losses.append(event.loss)
            self._eta = event.eta_seconds
            self._line(step_line(event))
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
        elif isinstance(event, Saved):
            stall = f", training stood still {event.stall:.2f} s" if event.stall >= 0.01 else ""
            self._line(
                f"{self.output.style('saved', 'good')}     {event.path}  {size(event.bytes)} "
                f"in {event.seconds:.1f} s{stall}"
            )
        elif isinstance(event, Progress) and event.what == "step":
            self._update(int(event.done), int(event.total or 0))
        elif isinstance(event, Progress):
            total = "" if event.total is None else f" / {event.total:,.0f}"
            self._line(f"{event.what:<10}{event.done:,.0f}{total} {event.unit}")

    def _line(self, text: str) -> None:
        self._above(lambda: print(text, file=sys.stderr, flush=True))

    def _above(self, write: Any) -> None:
        """Write a permanent line, above the live one if there is one."""
        if self._live is not None:
            sys.stderr.write("\r\033[2K")
        write()
        if self._live is not None:
            sys.stderr.write(self._live)
            sys.stderr.flush()

    def _update(self, step: int, steps: int) -> None:
        """Draw the live line: how far, the curve of the loss, how long still."""
        if not self.output.live() or not self._losses:
            return
        done = step / steps
        bar = ("━" * round(24 * done)).ljust(24, "╌")
        eta = "" if self._eta is None else f"  {duration(self._eta)} left"
        text = f"{bar} step {step}/{steps}  {sparkline(self._losses)}{eta}"
        self._live = self.output.style(text, "good")
        sys.stderr.write(f"\r\033[2K{self._live}")
        sys.stderr.flush()
        if step >= steps:
            self._end_live()

    def _end_live(self) -> None:
        if self._live is not None:
            sys.stderr.write("\r\033[2K")
            sys.stderr.flush()
            self._live = None


def step_line(event: StepDone) -> str:
    """Return a step's numbers as one line."""
    width = len(str(event.steps))
    speed = f"{event.tflops * 1000:.0f} GFLOP/s" if event.tflops < 1 else f"{event.tflops:.0f} TFLOP/s"
    if event.mfu is not None:
        speed += f"  mfu {100 * event.mfu:.1f}%"
    eta = "" if event.eta_seconds is None else f"  eta {duration(event.eta_seconds)}"
    return (
        f"step {event.step:>{width}}/{event.steps}  loss {event.loss:.4f}  grad {event.grad_norm:.2f}  "
        f"lr {event.lr:.2e}  {event.tokens_per_second:,.0f} tok/s  {speed}  mem {event.memory_gib:.2f}G  "
        f"data {100 * event.data_share:.0f}%{eta}"
    )


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
