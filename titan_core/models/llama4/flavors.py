"""Llama 4: sizes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from titan_core.config.schema import NonNegative, Positive, PositiveFloat
from titan_core.declare.decoder import GroupedQuerySizes
from titan_core.declare.experts import ExpertSizes
from titan_core.declare.parameters import Attention
from titan_core.declare.rope import RopeScaling


@dataclass(frozen=True)
class Temperature:
    """Longer contexts sharpen attention where there is no rotation (Nakanishi 2025): queries at position p are scaled
    by `1 + scale log(1 + floor((p + 1) / floor))`."""

    scale: PositiveFloat = 0.1
    floor: Positive = 8192


@dataclass(frozen=True, kw_only=True)
class Llama4Sizes(ExpertSizes, GroupedQuerySizes):
    """Everything that determines the shape and the arithmetic of a Llama 4.

    Every `global_every`-th layer has no rotation and sees all that came before (iRoPE); the others rotate and see their
    own chunk of `chunk` tokens, with `qk_norm` after the rotation. With `num_experts`, every `moe_every`-th layer is a
    mixture of experts.
    """

    head_dim: Positive = 128
    dim: Positive = 5120
    n_layers: Positive = 48
    n_heads: Positive = 40
    n_kv_heads: Positive = 8
    ffn_dim: Positive = 16384
    vocab_size: Positive = 202048
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 500000.0
    max_seq_len: Positive = 1048576
    rope_scaling: RopeScaling | None = None
    global_every: Positive = 4
    chunk: Positive | None = 8192
    qk_norm: bool = True
    temperature: Temperature | None = field(default_factory=Temperature)
    moe_every: Positive = 1
    expert_dim: Positive = 8192
    num_shared_experts: NonNegative = 1
    score: Literal["softmax", "sigmoid"] = "sigmoid"
    score_before_experts: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_experts()

    def is_mixture(self, layer: int) -> bool:
        """Is the MLP of this layer a mixture of experts?"""
        return self.num_experts > 0 and (layer + 1) % self.moe_every == 0

    def is_global(self, layer: int) -> bool:
        """Has this layer no rotation, and sees all that came before?"""
        return (layer + 1) % self.global_every == 0


def attentions(sizes: Llama4Sizes) -> tuple[Attention, ...]:
    """List the attention layers: local ones have a window."""
    shape = (sizes.n_heads, sizes.n_kv_heads, sizes.head_dim, sizes.head_dim)
    windows = [None if sizes.is_global(layer) else sizes.chunk for layer in range(sizes.n_layers)]
    return tuple(Attention(*shape, window=window) for window in windows)


_DEBUG = Llama4Sizes(
    dim=256, n_layers=6, n_heads=16, n_kv_heads=16, head_dim=16, ffn_dim=768, vocab_size=2048, chunk=256
)

FLAVORS = {
    "debugmodel": _DEBUG,
    "debugmodel_irope": replace(_DEBUG, attention_mask="block_causal"),
    "debugmodel_moe": replace(_DEBUG, num_experts=8, moe_every=2, expert_dim=512),
    "17bx16e": Llama4Sizes(  # Scout
        num_experts=16,
        max_seq_len=10485760,
        rope_scaling=RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0),
    ),
    "17bx128e": Llama4Sizes(num_experts=128, moe_every=2, qk_norm=False),  # Maverick
}
