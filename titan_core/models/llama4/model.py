"""Llama 4's text model (Meta 2025): most layers rotate and see one chunk, every fourth sees all without rotation.

Shape letters: B batch, T tokens, H query heads, K key/value heads, C head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_core.models.llama4.flavors import Llama4Sizes
from titan_core.nn.attention import Mask, chunk_mask
from titan_core.nn.decoder import Decoder, GroupedQueryAttention, Place


class Llama4(Decoder):
    """Layers are local or global (iRoPE)."""

    def __init__(self, sizes: Llama4Sizes) -> None:
        super().__init__(sizes, lambda i: GlobalAttention(sizes) if sizes.is_global(i) else LocalAttention(sizes))

    def masks(self, mask: Mask, positions_T: Tensor, cached: int) -> Callable[[int], Mask]:
        """Return the mask of each layer: local ones see their own chunk."""
        sizes: Llama4Sizes = self.sizes
        if sizes.chunk is None:
            return lambda layer: mask
        local = chunk_mask(mask, sizes.chunk, positions_T, cached + positions_T.shape[0])
        return lambda layer: mask if sizes.is_global(layer) else local


class LocalAttention(GroupedQueryAttention):
    """Rotates, then normalises each head of queries and keys, without a scale."""

    def __init__(self, sizes: Llama4Sizes) -> None:
        super().__init__(sizes)
        self.eps = sizes.norm_eps if sizes.qk_norm else None

    def prepare(self, q_BTHC: Tensor, k_BTKC: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Return rotated, normalised queries and keys."""
        q_BTHC, k_BTKC = super().prepare(q_BTHC, k_BTKC, place)
        return self._normalise(q_BTHC), self._normalise(k_BTKC)

    def _normalise(self, x_BTHC: Tensor) -> Tensor:
        if self.eps is None:
            return x_BTHC
        return F.rms_norm(x_BTHC.float(), (x_BTHC.shape[-1],), eps=self.eps).to(x_BTHC.dtype)


class GlobalAttention(GroupedQueryAttention):
    """Has no positions but the mask's, and sharpens with the context's length."""

    def __init__(self, sizes: Llama4Sizes) -> None:
        super().__init__(sizes)
        self.temperature = sizes.temperature

    def prepare(self, q_BTHC: Tensor, k_BTKC: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Return queries scaled by their position, and keys as they are."""
        temperature = self.temperature
        if temperature is None:
            return q_BTHC, k_BTKC
        steps_T = torch.floor((place.positions_T.float() + 1.0) / temperature.floor)
        stretch_T = torch.log1p(steps_T) * temperature.scale + 1.0
        return (q_BTHC * stretch_T[:, None, None]).to(q_BTHC.dtype), k_BTKC
