"""What this machine has for low precision: torchao, and a device whose matmuls take the operands."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from titan_core.runtime.errors import MachineError, missing_extra


def require(device: torch.device, capability: tuple[int, int], what: str, tip: str) -> None:
    """Refuse a device whose matmuls cannot take the operands; nothing falls back without a word."""
    if device.type != "cuda":
        raise MachineError(f"{what} matmuls need a GPU, and this run is on the {device.type.upper()}", tip=tip)
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        raise MachineError(
            f"{what} matmuls need compute capability {capability[0]}.{capability[1]}, and "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}",
            tip=tip,
        )


@contextmanager
def torchao() -> Iterator[None]:
    """Import what needs torchao. torchao 0.18 makes torch 2.14 log two deprecations that no user can act on."""
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except ImportError as error:
        if error.name and error.name.partition(".")[0] == "torchao":
            raise missing_extra("torchao", "quant") from None
        raise
    finally:
        logger.setLevel(level)
