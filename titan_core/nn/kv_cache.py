"""Keys and values of the tokens so far, for decoding one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, (B, capacity, K, C) each."""

    def __init__(self, owner: KVCache, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype):
        self.owner = owner
        self.k_BSKC = torch.empty(shape, device=device, dtype=dtype)
        self.v_BSKC = torch.empty(shape, device=device, dtype=dtype)

    def append(self, k_BTKC: Tensor, v_BTKC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens and return those of all tokens so far."""
        start, stop = self.owner.length, self.owner.length + k_BTKC.shape[1]
        self.k_BSKC[:, start:stop] = k_BTKC
        self.v_BSKC[:, start:stop] = v_BTKC
        return self.k_BSKC[:, :stop], self.v_BSKC[:, :stop]


class KVCache:
    """One cache for a whole model: made once for `capacity` tokens, never grown."""

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.capacity = capacity
        self.length = 0
        shape = (batch, capacity, kv_heads, head_dim)
        self._layers = [LayerCache(self, shape, device, dtype) for _ in range(layers)]

    def layer(self, index: int) -> LayerCache:
        """Return the cache of one layer."""
        return self._layers[index]

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Return the positions of the next `tokens` tokens, (T)."""
        return torch.arange(self.length, self.length + tokens, device=device)

    def advance(self, tokens: int) -> None:
        """Count tokens as stored, after every layer has appended them."""
        self.length += tokens
