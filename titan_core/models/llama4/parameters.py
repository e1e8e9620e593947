"""Llama 4: every parameter, its role and its initial distribution; every attention layer."""

from __future__ import annotations

from collections.abc import Iterator

from titan_core.declare.parameters import Attention, Constant, Normal, Parameter
from titan_core.models.llama4.flavors import Llama4Sizes


def parameters(sizes: Llama4Sizes) -> tuple[Parameter, ...]:
    """List the parameters in the order of the module. A tied table starts as a head does: it makes the logits."""
    table, head = (sizes.vocab_size, sizes.dim), Normal(sizes.dim**-0.5, cut=3.0)
    listed = [Parameter("tok_embeddings.weight", table, "embedding", head if sizes.tied else Normal(1.0))]
    for layer in range(sizes.n_layers):
        listed += _block(sizes, layer)
    listed.append(Parameter("norm.weight", (sizes.dim,), "norm", Constant(1.0)))
    tied_to = "tok_embeddings.weight" if sizes.tied else None
    listed.append(Parameter("output.weight", table, "output", head, tied_to=tied_to))
    return tuple(listed)


def attentions(sizes: Llama4Sizes) -> tuple[Attention, ...]:
    """List the attention layers."""
    shape = (sizes.n_heads, sizes.n_kv_heads, sizes.head_dim, sizes.head_dim)
    windows = [None if sizes.is_global(layer) else sizes.chunk for layer in range(sizes.n_layers)]
    return tuple(Attention(*shape, window=window) for window in windows)


def _block(sizes: Llama4Sizes, layer: int) -> Iterator[Parameter]:
    """Projections start at deviation 0.02; those that write to the residual stream shrink with depth (GPT-2)."""
    dim, ffn_dim = sizes.dim, sizes.ffn_dim
    query, key = sizes.n_heads * sizes.head_dim, sizes.n_kv_heads * sizes.head_dim
    depth = layer + 1 if sizes.depth_init else sizes.n_layers
    inner, residual, one = Normal(0.02), Normal(0.02 / (2 * depth) ** 0.5), Constant(1.0)
    prefix = f"layers.{layer}"
    yield Parameter(f"{prefix}.attention_norm.weight", (dim,), "norm", one)
    yield Parameter(f"{prefix}.attention.wq.weight", (query, dim), "hidden", inner)
    yield Parameter(f"{prefix}.attention.wk.weight", (key, dim), "hidden", inner)
    yield Parameter(f"{prefix}.attention.wv.weight", (key, dim), "hidden", inner)
    yield Parameter(f"{prefix}.attention.wo.weight", (dim, query), "hidden", residual)
    yield Parameter(f"{prefix}.ffn_norm.weight", (dim,), "norm", one)
    yield Parameter(f"{prefix}.feed_forward.w1.weight", (ffn_dim, dim), "hidden", inner)
    yield Parameter(f"{prefix}.feed_forward.w2.weight", (dim, ffn_dim), "hidden", residual)
    yield Parameter(f"{prefix}.feed_forward.w3.weight", (ffn_dim, dim), "hidden", residual)
