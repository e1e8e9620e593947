"""Llama 3 (Dubey et al. 2024): a pre-norm decoder with grouped-query attention, rotary positions and SwiGLU.

It is the plain decoder of `titan_core.nn.decoder`, which reads top to bottom.
"""

from __future__ import annotations

from titan_core.models.llama3.flavors import LlamaSizes
from titan_core.nn.decoder import Decoder, GroupedQueryAttention


class Llama3(Decoder):
    """Every layer attends alike."""

    def __init__(self, sizes: LlamaSizes) -> None:
        super().__init__(sizes, lambda layer: GroupedQueryAttention(sizes))
