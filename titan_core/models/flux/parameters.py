"""Flux: every parameter, and every attention layer."""

from __future__ import annotations

import math
from collections.abc import Iterator

from titan_core.declare.parameters import Attention, Constant, Init, Normal, Parameter, Role
from titan_core.models.flux.flavors import FluxSizes

TIME_DIM = 256  # width of the embedding of t and of the guidance
_IMAGE, _TEXT, _SAMPLE, _BOTH = ("image",), ("text",), ("sample",), ("text", "image")
_ZERO = Constant(0.0)


def parameters(sizes: FluxSizes) -> tuple[Parameter, ...]:
    """List the parameters in the order of the module."""
    dim, small = sizes.dim, Normal(0.02)
    listed = [*_linear("img_in", dim, sizes.in_channels, "input", _IMAGE)]
    listed += _linear("txt_in", dim, sizes.context_dim, "input", _TEXT)
    vectors = {"time_in": TIME_DIM, "vector_in": sizes.vector_dim}
    if sizes.guidance:
        vectors["guidance_in"] = TIME_DIM
    for name, width in vectors.items():
        listed += _linear(f"{name}.in_layer", dim, width, "condition", _SAMPLE, small)
        listed += _linear(f"{name}.out_layer", dim, dim, "condition", _SAMPLE, small)
    for number in range(sizes.n_double):
        listed += _double(sizes, f"double_blocks.{number}")
    for number in range(sizes.n_single):
        listed += _single(sizes, f"single_blocks.{number}")
    listed += _linear("final_layer.mod", 2 * dim, dim, "condition", _SAMPLE, _last(sizes, dim, 2 * dim))
    out = _last(sizes, dim, sizes.in_channels)
    listed += _linear("final_layer.linear", sizes.in_channels, dim, "output", _IMAGE, out)
    return tuple(listed)


def attentions(sizes: FluxSizes) -> tuple[Attention, ...]:
    """List the attention layers: text and image rows all meet each other."""
    heads, width = sizes.n_heads, sizes.head_dim
    one = Attention(heads, heads, width, width, causal=False, per=_BOTH)
    return (one,) * (sizes.n_double + sizes.n_single)


def _double(sizes: FluxSizes, prefix: str) -> Iterator[Parameter]:
    dim = sizes.dim
    streams = {"img": _IMAGE, "txt": _TEXT}
    for stream in streams:
        init = _last(sizes, dim, 6 * dim)
        yield from _linear(f"{prefix}.{stream}_mod", 6 * dim, dim, "condition", _SAMPLE, init)
    for stream, per in streams.items():
        for name in ("wq", "wk", "wv", "wo"):
            yield from _linear(f"{prefix}.attention.{stream}.{name}", dim, dim, "hidden", per)
        yield from _head_norms(sizes, f"{prefix}.attention.{stream}", per)
    for stream, per in streams.items():
        yield from _linear(f"{prefix}.{stream}_mlp.w1", sizes.mlp_dim, dim, "hidden", per)
        yield from _linear(f"{prefix}.{stream}_mlp.w2", dim, sizes.mlp_dim, "hidden", per)


def _single(sizes: FluxSizes, prefix: str) -> Iterator[Parameter]:
    dim = sizes.dim
    yield from _linear(f"{prefix}.mod", 3 * dim, dim, "condition", _SAMPLE, _last(sizes, dim, 3 * dim))
    for name in ("wq", "wk", "wv"):
        yield from _linear(f"{prefix}.mix.{name}", dim, dim, "hidden", _BOTH)
    weight, _no_bias = _linear(f"{prefix}.mix.wo", dim, dim, "hidden", _BOTH)
    yield weight
    yield from _head_norms(sizes, f"{prefix}.mix", _BOTH)
    yield from _linear(f"{prefix}.mix.w1", sizes.mlp_dim, dim, "hidden", _BOTH)
    yield from _linear(f"{prefix}.mix.w2", dim, sizes.mlp_dim, "hidden", _BOTH)


def _head_norms(sizes: FluxSizes, prefix: str, per: tuple[str, ...]) -> Iterator[Parameter]:
    for name in ("q_norm", "k_norm"):
        yield Parameter(f"{prefix}.{name}.weight", (sizes.head_dim,), "norm", Constant(1.0), per=per)


def _linear(
    name: str, out: int, into: int, role: Role, per: tuple[str, ...], init: Init | None = None
) -> tuple[Parameter, Parameter]:
    """Return weight and bias; without `init` the weight starts with Glorot & Bengio's deviation (2010)."""
    weight = Parameter(f"{name}.weight", (out, into), role, init or _glorot(into, out), per=per)
    return weight, Parameter(f"{name}.bias", (out,), "bias", _ZERO, per=per)


def _glorot(into: int, out: int) -> Normal:
    return Normal(math.sqrt(2 / (into + out)))


def _last(sizes: FluxSizes, into: int, out: int) -> Init:
    """Return how what opens a block, or the output, starts: at zero, or as all else does."""
    return _ZERO if sizes.zero_init else _glorot(into, out)
