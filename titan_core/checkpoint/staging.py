"""A copy of the state in host memory, taken while training goes on.

Weights change only in the optimizer's step, so the copy runs beside forward and backward, and only the step has to wait
for it. Buffers are made once and used again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Stage:
    """Host buffers for one state."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned and torch.cuda.is_available()
        self._buffers: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None

    def copy(self, tensors: Mapping[str, Tensor], fence: torch.cuda.Event | None) -> dict[str, Tensor]:
        """Copy tensors to the host and return the copies, laid out as the originals are; done when it returns."""
        with torch.no_grad():
            if fence is None or self._stream is None:
                return {name: self._copy_one(name, tensor) for name, tensor in tensors.items()}
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(fence)
                copies = {name: self._copy_one(name, tensor) for name, tensor in tensors.items()}
            self._stream.synchronize()
            return copies

    def fence(self, tensors: Mapping[str, Tensor]) -> Any:
        """Return an event after all that the training thread has queued, for a copy to wait on.

        Called in the training thread: a new thread would take the first device of the machine for its own.
        """
        device = next((tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"), None)
        if device is None:
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return torch.cuda.current_stream(device).record_event()

    def _copy_one(self, name: str, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local = local.detach()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
            buffer = torch.empty(local.shape, dtype=local.dtype, device="cpu", pin_memory=self._pinned)
            self._buffers[name] = buffer
        buffer.copy_(local, non_blocking=self._pinned)
        if isinstance(tensor, DTensor):
            return DTensor(buffer, tensor._spec, requires_grad=False)  # pyright: ignore[reportCallIssue]
        return buffer
