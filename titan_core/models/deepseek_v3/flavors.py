"""DeepSeek-V2 and V3: sizes, and the parameters of latent attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from titan_core.config.schema import NonNegative, Positive, PositiveFloat
from titan_core.declare import decoder
from titan_core.declare.decoder import DecoderSizes
from titan_core.declare.experts import ExpertSizes
from titan_core.declare.parameters import Attention, Constant, Normal, Parameter
from titan_core.declare.rope import Yarn


@dataclass(frozen=True, kw_only=True)
class DeepSeekSizes(ExpertSizes, DecoderSizes):
    """Everything that determines the shape and the arithmetic of a DeepSeek-V2 or V3; the defaults are V3's.

    A head has `qk_nope_dim` + `qk_rope_dim` numbers in queries and keys, of which the latter rotate, and `v_dim` in
    values. Queries come from a latent of `q_lora_rank`, or with 0 straight from the stream. The MLPs of the first
    `n_dense_layers` are `ffn_dim` wide, the others are mixtures of experts.

    With `num_mtp_layers` (`num_nextn_predict_layers` in V3's config), as many layers after the last learn to predict
    further tokens: the k-th the token k + 1 places ahead (DeepSeek-V3, section 2.2).
    """

    dim: Positive = 7168
    n_layers: Positive = 61
    n_dense_layers: NonNegative = 3
    n_heads: Positive = 128
    q_lora_rank: NonNegative = 1536
    kv_lora_rank: Positive = 512
    qk_nope_dim: Positive = 128
    qk_rope_dim: Positive = 64
    v_dim: Positive = 128
    ffn_dim: Positive = 18432
    vocab_size: Positive = 129280
    norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10000.0
    max_seq_len: Positive = 163840
    rope_scaling: Yarn | None = field(default_factory=Yarn)
    num_experts: Positive = 256
    top_k: Positive = 8
    expert_dim: Positive = 2048
    num_shared_experts: NonNegative = 1
    score: Literal["softmax", "sigmoid"] = "sigmoid"
    normalise_scores: bool = True
    route_scale: PositiveFloat = 2.5
    num_groups: Positive = 8
    top_groups: Positive = 4
    group_score: Literal["max", "top2"] = "top2"
    score_bias: bool = True
    num_mtp_layers: NonNegative = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_experts()
        if self.qk_nope_dim % 2 or self.kv_lora_rank % 2:
            raise ValueError("qk_nope_dim and kv_lora_rank must be even: pairs that rotate come after them")

    @property
    def head_dim(self) -> int:
        """Width of a head that rotates."""
        return self.qk_rope_dim

    @property
    def n_kv_heads(self) -> int:
        """Every head has keys and values of its own."""
        return self.n_heads

    @property
    def qk_dim(self) -> int:
        """Width of a head's queries and keys."""
        return self.qk_nope_dim + self.qk_rope_dim

    @property
    def softmax_scale(self) -> float:
        """What products of queries and keys are multiplied with."""
        return self.qk_dim**-0.5 * (1.0 if self.rope_scaling is None else self.rope_scaling.sharpness)

    def is_mixture(self, layer: int) -> bool:
        """Is the MLP of this layer a mixture of experts?"""
        return layer >= self.n_dense_layers


def attentions(sizes: DeepSeekSizes) -> tuple[Attention, ...]:
    """List the attention layers: a cache keeps one latent and one rotated key for all heads."""
    one = Attention(
        sizes.n_heads, sizes.n_heads, sizes.qk_dim, sizes.v_dim, cached=(1, sizes.kv_lora_rank, sizes.qk_rope_dim)
    )
    return (one,) * (sizes.n_layers + sizes.num_mtp_layers)


def parameters(sizes: DeepSeekSizes) -> tuple[Parameter, ...]:
    """List the parameters in the order of the module."""
    predicting = (one for depth in range(sizes.num_mtp_layers) for one in mtp_layer(sizes, depth))
    return (*decoder.parameters(sizes, latent_attention), *predicting)


def mtp_layer(sizes: DeepSeekSizes, depth: int) -> Iterator[Parameter]:
    """List the parameters of a layer that predicts a further token; embedding and head are the model's."""
    prefix, one = f"mtp.{depth}", Constant(1.0)
    table = sizes.vocab_size, sizes.dim
    tables, head = "tok_embeddings.weight", "tok_embeddings.weight" if sizes.tied else "output.weight"
    yield Parameter(f"{prefix}.{tables}", table, "embedding", Normal(1.0), tied_to=tables)
    yield Parameter(f"{prefix}.output.weight", table, "output", Normal(1.0), tied_to=head)
    yield Parameter(f"{prefix}.embedding_norm.weight", (sizes.dim,), "norm", one)
    yield Parameter(f"{prefix}.hidden_norm.weight", (sizes.dim,), "norm", one)
    yield Parameter(f"{prefix}.proj.weight", (sizes.dim, 2 * sizes.dim), "hidden", Normal(0.02))
    yield from decoder.block(sizes, f"{prefix}.block", sizes.n_layers + depth, latent_attention)
    yield Parameter(f"{prefix}.norm.weight", (sizes.dim,), "norm", one)


def latent_attention(sizes: DeepSeekSizes, prefix: str, inner: Normal, residual: Normal) -> Iterator[Parameter]:
    """List the parameters of `nn.latent_attention.LatentAttention`."""
    one, queries = Constant(1.0), sizes.n_heads * sizes.qk_dim
    if sizes.q_lora_rank:
        yield Parameter(f"{prefix}.wq_a.weight", (sizes.q_lora_rank, sizes.dim), "hidden", inner)
        yield Parameter(f"{prefix}.q_norm.weight", (sizes.q_lora_rank,), "norm", one)
        yield Parameter(f"{prefix}.wq_b.weight", (queries, sizes.q_lora_rank), "hidden", inner)
    else:
        yield Parameter(f"{prefix}.wq.weight", (queries, sizes.dim), "hidden", inner)
    latent, heads = sizes.kv_lora_rank, sizes.n_heads * (sizes.qk_nope_dim + sizes.v_dim)
    yield Parameter(f"{prefix}.wkv_a.weight", (latent + sizes.qk_rope_dim, sizes.dim), "hidden", inner)
    yield Parameter(f"{prefix}.kv_norm.weight", (latent,), "norm", one)
    yield Parameter(f"{prefix}.wkv_b.weight", (heads, latent), "hidden", inner)
    yield Parameter(f"{prefix}.wo.weight", (sizes.dim, sizes.n_heads * sizes.v_dim), "hidden", residual)


def _v2(**changes: object) -> DeepSeekSizes:
    """V2 scores experts by softmax, and keeps the scores as they are."""
    common = {
        "score": "softmax", "normalise_scores": False, "score_bias": False, "group_score": "max",
        "n_dense_layers": 1, "num_shared_experts": 2, "top_k": 6, "vocab_size": 102400,
        "rope_scaling": Yarn(mscale=0.707, mscale_all_dim=0.707),
    }  # fmt: skip
    return DeepSeekSizes(**{**common, **changes})  # pyright: ignore[reportArgumentType]


_LITE = {"q_lora_rank": 0, "num_groups": 1, "top_groups": 1, "route_scale": 1.0, "n_heads": 16}

FLAVORS = {
    "debugmodel": _v2(
        **_LITE, dim=256, n_layers=6, ffn_dim=1024, vocab_size=2048, num_experts=8, top_k=3, expert_dim=256
    ),
    "16B": _v2(**_LITE, dim=2048, n_layers=27, ffn_dim=10944, num_experts=64, expert_dim=1408),
    "236B": _v2(dim=5120, n_layers=60, ffn_dim=12288, num_experts=160, expert_dim=1536, top_groups=3, route_scale=16.0),
    "671B": DeepSeekSizes(num_mtp_layers=1),
}
