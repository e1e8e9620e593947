"""Random inputs: fresh in every call of a benchmark, never zeros, which a GPU multiplies faster."""

from __future__ import annotations

import torch
from torch import Tensor


class Draw:
    """Draws tensors on one device in one dtype."""

    def __init__(self, device: torch.device, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal numbers, rounded to the dtype."""
        out = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return out.normal_(0.0, scale, generator=self.generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return integers from 0 to below `high`, int64."""
        return torch.randint(high, shape, device=self.device, generator=self.generator)
