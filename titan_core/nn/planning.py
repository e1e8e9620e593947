"""Which device a computation is for: its own, or that of a plan made with tensors that hold no data.

Plans are made with fake CPU tensors wherever they are made; what they plan for may be a GPU, whose code paths differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_STEPS = 8
_PLANNED: ContextVar[str | None] = ContextVar("planned", default=None)


@contextmanager
def plan_for(device_type: str) -> Iterator[None]:
    """Compute with fake tensors as that type of device would."""
    token = _PLANNED.set(device_type)
    try:
        yield
    finally:
        _PLANNED.reset(token)


def planning() -> bool:
    """Is this a plan, whose tensors hold no data?"""
    return _planned() is not None


def device_type(x: Tensor) -> str:
    """Return the type of the device that a tensor is on, or is planned for."""
    return _planned() or x.device.type


def _planned() -> str | None:
    """Return what is planned for. Nothing is compiled in a plan, and the compiler of torch 2.11 cannot ask."""
    return None if torch.compiler.is_compiling() else _PLANNED.get()


def step_of(step: int, total: int) -> int:
    """Return in which steps to walk over `total`: as asked, but in a plan in few, as each costs time and no memory."""
    return max(step, -(-total // _STEPS)) if planning() else max(1, step)
