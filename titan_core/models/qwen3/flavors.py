"""Qwen3: sizes of the dense models and of the mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass

from titan_core.config.schema import Positive, PositiveFloat
from titan_core.declare.decoder import GroupedQuerySizes
from titan_core.declare.experts import ExpertSizes

HEAD_NORMS = ("q_norm", "k_norm")  # between projection and rotation, one scale for each place in a head


@dataclass(frozen=True, kw_only=True)
class QwenSizes(ExpertSizes, GroupedQuerySizes):
    """Everything that determines the shape and the arithmetic of a Qwen3. Heads have a width of their own.
    With `num_experts`, every layer is a mixture of experts."""

    head_dim: Positive = 128
    dim: Positive = 4096
    n_layers: Positive = 36
    n_heads: Positive = 32
    n_kv_heads: Positive = 8
    ffn_dim: Positive = 12288
    vocab_size: Positive = 151936
    norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 1000000.0
    max_seq_len: Positive = 40960
    normalise_scores: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_experts()

    def is_mixture(self, layer: int) -> bool:
        """Is the MLP of this layer a mixture of experts?"""
        return self.num_experts > 0


FLAVORS = {
    "debugmodel": QwenSizes(
        dim=256, n_layers=8, n_heads=16, n_kv_heads=8, ffn_dim=3072, vocab_size=2048, tied=True, max_seq_len=4096
    ),
    "0.6B": QwenSizes(dim=1024, n_layers=28, n_heads=16, ffn_dim=3072, tied=True),
    "1.7B": QwenSizes(dim=2048, n_layers=28, n_heads=16, ffn_dim=6144, tied=True),
    "4B": QwenSizes(dim=2560, n_layers=36, n_heads=32, ffn_dim=9728, tied=True),
    "8B": QwenSizes(),
    "14B": QwenSizes(dim=5120, n_layers=40, n_heads=40, ffn_dim=17408),
    "32B": QwenSizes(dim=5120, n_layers=64, n_heads=64, ffn_dim=25600),
    "debugmodel_moe": QwenSizes(
        dim=256,
        n_layers=8,
        n_heads=16,
        n_kv_heads=8,
        ffn_dim=3072,
        vocab_size=2048,
        max_seq_len=4096,
        num_experts=64,
        top_k=8,
        expert_dim=768,
    ),
    "30B-A3B": QwenSizes(dim=2048, n_layers=48, n_kv_heads=4, ffn_dim=6144, num_experts=128, top_k=8, expert_dim=768),
    "235B-A22B": QwenSizes(
        dim=4096, n_layers=94, n_heads=64, n_kv_heads=4, ffn_dim=12288, num_experts=128, top_k=8, expert_dim=1536
    ),
}
