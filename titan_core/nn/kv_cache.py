"""What attention keeps of the tokens so far, for decoding one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, or what they are made of: (B, capacity, K, C) each, of any two widths C."""

    def __init__(self, owner: KVCache, shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype):
        self.owner = owner
        self.k_BSKC, self.v_BSKC = (torch.empty(shape, device=device, dtype=dtype) for shape in shapes)

    def append(self, k_BTKC: Tensor, v_BTKC: Tensor) -> tuple[Tensor, Tensor]:
        """Store what belongs to new tokens and return that of all tokens so far."""
        start, stop = self.owner.length, self.owner.length + k_BTKC.shape[1]
        self.k_BSKC[:, start:stop] = k_BTKC
        self.v_BSKC[:, start:stop] = v_BTKC
        return self.k_BSKC[:, :stop], self.v_BSKC[:, :stop]


class KVCache:
    """One cache for a whole model: made once for `capacity` tokens, never grown.

    `kept` are each layer's heads and two widths.
    """

    def __init__(
        self,
        *,
        kept: Sequence[tuple[int, int, int]],
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers = [
            LayerCache(self, [(batch, capacity, heads, width) for width in widths], device, dtype)
            for heads, *widths in kept
        ]

    def layer(self, index: int) -> LayerCache:
        """Return the cache of one layer."""
        return self._layers[index]

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Return the positions of the next `tokens` tokens, (T)."""
        return torch.arange(self.length, self.length + tokens, device=device)

    def advance(self, tokens: int) -> None:
        """Count tokens as stored, after every layer has appended them."""
        self.length += tokens
