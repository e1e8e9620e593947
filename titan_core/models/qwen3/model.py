"""Qwen3 (Qwen team 2025): a pre-norm decoder with grouped-query attention, norms on queries and keys, SwiGLU.

Shape letters: B batch, T tokens, H query heads, K key/value heads, C head width.
"""

from __future__ import annotations

from torch import Tensor

from titan_core.models.qwen3.flavors import QwenSizes
from titan_core.nn.decoder import Decoder, GroupedQueryAttention, Place
from titan_core.nn.layers import RMSNorm


class Qwen3(Decoder):
    """Every layer attends alike."""

    def __init__(self, sizes: QwenSizes) -> None:
        super().__init__(sizes, lambda layer: NormedAttention(sizes))


class NormedAttention(GroupedQueryAttention):
    """Each head of queries and keys is normalised before the rotation."""

    def __init__(self, sizes: QwenSizes) -> None:
        super().__init__(sizes)
        self.q_norm = RMSNorm(sizes.head_dim, sizes.norm_eps)
        self.k_norm = RMSNorm(sizes.head_dim, sizes.norm_eps)

    def prepare(self, q_BTHC: Tensor, k_BTKC: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Return normalised, rotated queries and keys."""
        return super().prepare(self.q_norm(q_BTHC), self.k_norm(k_BTKC), place)
