"""Llama 3: sizes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from titan_core.config.schema import Positive, PositiveFloat
from titan_core.declare.decoder import GroupedQuerySizes
from titan_core.declare.rope import RopeScaling


@dataclass(frozen=True, kw_only=True)
class LlamaSizes(GroupedQuerySizes):
    """Everything that determines the shape and the arithmetic of a Llama 3."""

    dim: Positive = 4096
    n_layers: Positive = 32
    n_heads: Positive = 32
    n_kv_heads: Positive = 8
    ffn_dim: Positive = 14336
    vocab_size: Positive = 128256
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 500000.0
    max_seq_len: Positive = 131072
    rope_scaling: RopeScaling | None = field(default_factory=RopeScaling)

    def __post_init__(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} does not divide dim {self.dim}")
        super().__post_init__()

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.n_heads


_DEBUG = LlamaSizes(dim=256, n_layers=6, n_heads=16, n_kv_heads=16, ffn_dim=768, vocab_size=2048)

FLAVORS = {
    "debugmodel": _DEBUG,
    "debugmodel_flex_attn": replace(_DEBUG, attention_mask="block_causal"),
    "1B": LlamaSizes(
        dim=2048,
        n_layers=16,
        n_heads=32,
        ffn_dim=8192,
        tied=True,
        rope_scaling=RopeScaling(factor=32.0),
    ),
    "3B": LlamaSizes(
        dim=3072,
        n_layers=28,
        n_heads=24,
        ffn_dim=8192,
        tied=True,
        rope_scaling=RopeScaling(factor=32.0),
    ),
    "8B": LlamaSizes(),
    "70B": LlamaSizes(dim=8192, n_layers=80, n_heads=64, ffn_dim=28672),
    "405B": LlamaSizes(dim=16384, n_layers=126, n_heads=128, ffn_dim=53248),
}
