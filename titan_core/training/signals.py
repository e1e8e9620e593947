"""Stopping in good order: signals and the time limit, agreed on by all ranks at the same step."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from titan_core.runtime.errors import Interrupted

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PATIENCE_SECONDS = 1.0  # a Ctrl-C sooner than this after the first is the same one, repeated by a launcher
_TIME_LIMIT = 1000  # the flag's value for the time limit; signals stand for themselves


class StopRequest:
    """A flag that signals and the time limit raise, and that all ranks read alike.

    Every step posts an all-reduce of the flag on a CPU group and reads the answer of the step before: nothing waits
    for a device, and every rank stops at the same step, at most two steps after the signal. A second Ctrl-C, a second
    or more after the first, raises `Interrupted` at once; `unsaved_steps` then says what that loses. Signals reach
    only the main thread: elsewhere the time limit and the other ranks' signals still count.
    """

    def __init__(
        self,
        group: Any = None,
        time_limit_minutes: float | None = None,
        unsaved_steps: Callable[[], int] | None = None,
    ) -> None:
        self.group = group
        self.deadline = None if time_limit_minutes is None else time.monotonic() + 60 * time_limit_minutes
        self.flag = 0
        self._unsaved_steps = unsaved_steps
        self._first_ctrl_c: float | None = None
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if self._pending is not None and error is None:  # after an error the other ranks may never answer
            self._pending[0].wait()
            self._pending = None
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set outside of Python
        self._before = {}

    def agreed(self) -> str | None:
        """Return why to stop, or None; call it once a step, on every rank."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.flag = self.flag or _TIME_LIMIT
        if self.group is None:
            return self._name(self.flag)
        answer = 0
        if self._pending is not None:
            work, value = self._pending
            work.wait()
            answer = int(value.item())
        mine = torch.tensor([self.flag], dtype=torch.int64)
        self._pending = (dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self.group, async_op=True), mine)
        return self._name(answer)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:  # after a SIGTERM, too, the first Ctrl-C still saves
            now = time.monotonic()
            if self._first_ctrl_c is None:
                self._first_ctrl_c = now
            elif now - self._first_ctrl_c >= _PATIENCE_SECONDS:
                raise Interrupted(
                    f"stopped at once, without saving{self._loss()}",
                    tip="the same command goes on from the last checkpoint",
                )
        self.flag = self.flag or number

    def _loss(self) -> str:
        if self._unsaved_steps is None:
            return ""
        steps = self._unsaved_steps()
        return f": {steps} step{'' if steps == 1 else 's'} since the last checkpoint are lost"

    @staticmethod
    def _name(flag: int) -> str | None:
        if flag == 0:
            return None
        return "the time limit" if flag == _TIME_LIMIT else signal.Signals(flag).name
