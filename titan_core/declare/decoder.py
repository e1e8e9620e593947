"""What decoder-only families have in common, as data: sizes, parameters, attention layers, places to split.

Blocks of attention and SwiGLU MLP, each behind a norm, between an embedding and a norm with a head. `nn.decoder` is the
module that these words describe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from titan_core.config.schema import Positive, PositiveFloat
from titan_core.declare import experts
from titan_core.declare.parameters import Attention, Constant, Normal, Parameter
from titan_core.declare.sharding import Sharding

SHARDING = Sharding(
    embeddings=("tok_embeddings",),
    columns=(
        "layers.*.attention.wq",
        "layers.*.attention.wk",
        "layers.*.attention.wv",
        "layers.*.feed_forward.w1",
        "layers.*.feed_forward.w3",
        "layers.*.moe.experts.w1",
        "layers.*.moe.experts.w3",
        "layers.*.moe.shared_experts.w1",
        "layers.*.moe.shared_experts.w3",
        "output",
    ),
    rows=(
        "layers.*.attention.wo",
        "layers.*.feed_forward.w2",
        "layers.*.moe.experts.w2",
        "layers.*.moe.shared_experts.w2",
    ),
    regions=("layers.*.attention", "layers.*.feed_forward", "layers.*.moe"),
    closing=("norm",),
    experts=("layers.*.moe.experts",),
    mixtures=("layers.*.moe",),
    shared=("layers.*.moe.shared_experts",),
    loads=("layers.*.moe.router.load",),
    attentions=("layers.*.attention.attend",),
    first=("tok_embeddings",),
    last=("norm", "output"),
)
BLOCKS = ("layers.*",)


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """Sizes that every decoder has. A family adds `head_dim`, as a size or derived: what rotates of a head; and
    `n_kv_heads`, and what else it needs."""

    dim: Positive
    n_layers: Positive
    n_heads: Positive
    ffn_dim: Positive
    vocab_size: Positive
    norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    max_seq_len: Positive
    tied: bool = False
    depth_init: bool = True
    attention_mask: Literal["causal", "block_causal"] = "causal"

    def __post_init__(self) -> None:
        head_dim = getattr(self, "head_dim")  # noqa: B009 - a field in one family, a property in another
        if head_dim % 2:
            raise ValueError(f"a head is {head_dim} wide, which is odd: no rotation")

    def is_mixture(self, layer: int) -> bool:
        """Is the MLP of this layer a mixture of experts?"""
        return False


@dataclass(frozen=True, kw_only=True)
class GroupedQuerySizes(DecoderSizes):
    """Sizes of decoders whose query heads share `n_kv_heads` heads of keys and values."""

    n_kv_heads: Positive

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} does not divide n_heads {self.n_heads}")
        super().__post_init__()


AttentionParameters = Callable[[Any, str, Normal, Normal], Iterator[Parameter]]
"""Lists the parameters of an attention module: sizes, its name, how projections start, and how those start that write
to the residual stream."""


def grouped_query(
    sizes: Any, prefix: str, inner: Normal, residual: Normal, head_norms: Sequence[str] = ()
) -> Iterator[Parameter]:
    """List the parameters of `nn.decoder.GroupedQueryAttention`; `head_norms` have one scale for a head's width."""
    query, key = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
    yield Parameter(f"{prefix}.wq.weight", (query, sizes.dim), "hidden", inner)
    yield Parameter(f"{prefix}.wk.weight", (key, sizes.dim), "hidden", inner)
    yield Parameter(f"{prefix}.wv.weight", (key, sizes.dim), "hidden", inner)
    yield Parameter(f"{prefix}.wo.weight", (sizes.dim, query), "hidden", residual)
    for norm in head_norms:
        yield Parameter(f"{prefix}.{norm}.weight", (sizes.head_dim,), "norm", Constant(1.0))


def parameters(sizes: Any, attention: AttentionParameters = grouped_query) -> tuple[Parameter, ...]:
    """List the parameters in the order of the module. A tied table starts as a head does: it makes the logits."""
    table, head = (sizes.vocab_size, sizes.dim), Normal(sizes.dim**-0.5, cut=3.0)
    listed = [Parameter("tok_embeddings.weight", table, "embedding", head if sizes.tied else Normal(1.0))]
    for layer in range(sizes.n_layers):
        listed += block(sizes, f"layers.{layer}", layer, attention)
    listed.append(Parameter("norm.weight", (sizes.dim,), "norm", Constant(1.0)))
    tied_to = "tok_embeddings.weight" if sizes.tied else None
    listed.append(Parameter("output.weight", table, "output", head, tied_to=tied_to))
    return tuple(listed)


def attentions(sizes: Any) -> tuple[Attention, ...]:
    """List the attention layers."""
    one = Attention(sizes.n_heads, sizes.n_kv_heads, sizes.head_dim, sizes.head_dim)
    return (one,) * sizes.n_layers


def deviations(sizes: Any, layer: int) -> tuple[Normal, Normal]:
    """Return how projections start: at deviation 0.02, and those that write to the residual stream shrink with depth
    (GPT-2)."""
    depth = layer + 1 if sizes.depth_init else sizes.n_layers
    return Normal(0.02), Normal(0.02 / (2 * depth) ** 0.5)


def block(sizes: Any, prefix: str, layer: int, attention: AttentionParameters) -> Iterator[Parameter]:
    """List the parameters of the block at a depth."""
    one = Constant(1.0)
    yield Parameter(f"{prefix}.attention_norm.weight", (sizes.dim,), "norm", one)
    yield from attention(sizes, f"{prefix}.attention", *deviations(sizes, layer))
    yield Parameter(f"{prefix}.ffn_norm.weight", (sizes.dim,), "norm", one)
    yield from mlp(sizes, prefix, layer)


def mlp(sizes: Any, prefix: str, layer: int) -> Iterator[Parameter]:
    """List the parameters of a block's MLP, or mixture of experts."""
    inner, residual = deviations(sizes, layer)
    if sizes.is_mixture(layer):
        yield from experts.parameters(f"{prefix}.moe", sizes, inner, residual)
    else:
        yield from experts.swiglu(f"{prefix}.feed_forward", sizes.dim, sizes.ffn_dim, inner, residual)
