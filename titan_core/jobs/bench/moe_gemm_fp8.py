"""The experts' matrix products in float8: all are given the same float8 operands, and compared with their values.

Two recipes: scales of 1 x 128 and 128 x 128 blocks (DeepSeek-V3), and one scale a row; and the whole layer's forward,
casts included, from bf16.

Shape letters: R rows, E experts, I inner width, O outer width, B blocks of 128.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_core.jobs.bench.case import OWN, Absent, Call, Case, Prepared
from titan_core.jobs.bench.inputs import Draw
from titan_core.jobs.bench.moe_gemm import find_deepgemm, named, padded_layout, share_rows, spans
from titan_core.jobs.bench.request import Grouped

# What rounding to float8 costs: 3.6e-2 of a row's norm with one rounding of each operand (e4m3 has steps of 2^-3)
CAST_LIMIT = 8e-2


@dataclass(frozen=True)
class Operands:
    """Left and right operand with their scales, as the recipe lays them out, and the fp32 values that they stand for.

    For fwd and dx `left` is (R, K) and `right` (E, N, K); for dw (O, R) and (I, R).
    """

    left: Tensor
    left_scale: Tensor
    right: Tensor
    right_scale: Tensor
    left_values: Tensor
    right_values: Tensor
    ends: list[int]
    ends_E: Tensor


def cases(shape: Grouped, part: str, imbalance: float, draw: Draw) -> Iterator[Case]:
    """Give a pass of a shape by both recipes; with the forward the whole layer too."""
    counts = share_rows(shape.rows, shape.groups, imbalance)
    for recipe in ("blockwise", "rowwise"):
        if (recipe, part) in _BACKENDS:
            yield _product(shape, part, recipe, counts, named(shape, imbalance), draw)
    if part == "fwd":
        yield _linear(shape, counts, named(shape, imbalance), draw)


def _product(shape: Grouped, part: str, recipe: str, counts: list[int], name: str, draw: Draw) -> Case:
    weights = sum(count > 0 for count in counts) * shape.inner * shape.outer
    x, y = shape.rows * shape.inner, shape.rows * shape.outer
    read, written = {"fwd": (x + weights, y), "dx": (y + weights, x)}.get(
        part, (x + y, shape.groups * shape.inner * shape.outer)
    )
    return Case(
        operation="moe-gemm",
        shape=f"{name} {recipe}",
        part=part,
        dtype="fp8",
        flops=2.0 * shape.rows * shape.inner * shape.outer,
        moved=read + 2.0 * written,
        inputs=lambda: _operands(shape, part, recipe, counts, draw),
        reference=_true_gradient if part == "dw" else _true_product,
        backends=_BACKENDS[recipe, part],
    )


def _operands(shape: Grouped, part: str, recipe: str, counts: list[int], draw: Draw) -> Operands:
    from titan_kernels import quant

    ends = list(itertools.accumulate(counts))
    ends_E = torch.tensor(ends, dtype=torch.int32, device=draw.device)
    if part == "dw":
        grad, x = draw.normal(shape.rows, shape.outer), draw.normal(shape.rows, shape.inner)
        (q, s), (r, t) = quant.quantize_128x1(grad, ends_E), quant.quantize_128x1(x, ends_E)
        return Operands(q, s, r, t, quant.dequantize_128x1(q, s), quant.dequantize_128x1(r, t), ends, ends_E)
    width, out = (shape.inner, shape.outer) if part == "fwd" else (shape.outer, shape.inner)
    left, right = draw.normal(shape.rows, width), draw.normal(shape.groups, out, width, scale=width**-0.5)
    if recipe == "rowwise":
        (q, s), (r, t) = quant.quantize_rowwise(left), quant.quantize_rowwise(right)
        return Operands(q, s, r, t, q.float() * s[:, None], r.float() * t[..., None], ends, ends_E)
    (q, s), (r, _, t) = quant.quantize_1x128(left), quant.quantize_128x128(right)
    return Operands(q, s, r, t, quant.dequantize_1x128(q, s), quant.dequantize_128x128(r, t), ends, ends_E)


def _true_product(o: Operands) -> Sequence[Tensor]:
    weights = zip(spans(o.ends), o.right_values, strict=True)
    return [torch.cat([o.left_values[rows].double() @ w.double().T for rows, w in weights])]


def _true_gradient(o: Operands) -> Sequence[Tensor]:
    products = [o.left_values[rows].double().T @ o.right_values[rows].double() for rows in spans(o.ends)]
    return [torch.stack(products)]


# ------------------------------------------------------------------------------------------------ who computes it


def _titan(name: str) -> Callable[[Operands], Call]:
    def prepare(o: Operands) -> Call:
        from titan_kernels import fp8_grouped_gemm

        product = getattr(fp8_grouped_gemm, name)
        return lambda: product(o.left, o.left_scale, o.right, o.right_scale, o.ends_E, torch.bfloat16)

    return prepare


def _bf16(o: Operands) -> Call:
    """Titan's bf16 product of the same values: what float8 has to beat."""
    from titan_kernels.grouped_gemm import grouped_linear

    x, weight = o.left_values.bfloat16(), o.right_values.bfloat16()
    return lambda: grouped_linear(x, weight, o.ends_E)


def _scaled_grouped_mm(o: Operands) -> Call:
    if o.left.device.type != "cuda":
        raise Absent("torch's scaled_grouped_mm needs a GPU")
    right = o.right.transpose(-2, -1)
    return lambda: torch._scaled_grouped_mm(
        o.left, right, o.left_scale, o.right_scale, offs=o.ends_E, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _deepgemm(o: Operands) -> Prepared:
    """Experts begin at multiples of DeepGEMM's alignment; the padding is not counted as work."""
    gemm, align = find_deepgemm("m_grouped_fp8_gemm_nt_contiguous")
    place_R, experts_P = padded_layout(o.ends, align, o.left.device)
    left = torch.zeros(len(experts_P), o.left.shape[1], dtype=torch.uint8, device=o.left.device)
    left[place_R] = o.left.view(torch.uint8)
    scale = torch.ones(len(experts_P), o.left_scale.shape[1], device=o.left.device)
    scale[place_R] = o.left_scale
    out = torch.empty(len(experts_P), o.right.shape[1], dtype=torch.bfloat16, device=o.left.device)
    operands = (left.view(o.left.dtype), scale), (o.right, o.right_scale.contiguous())

    def call() -> Tensor:
        gemm(*operands, out, experts_P)
        return out

    return Prepared(call, lambda found: found[place_R])


_FORTH = {OWN: _titan("blockwise_product"), "bf16": _bf16, "deepgemm": _deepgemm}
_BY_ROW = {OWN: _titan("rowwise_product"), "bf16": _bf16, "scaled_grouped_mm": _scaled_grouped_mm}
_BACKENDS: Mapping[tuple[str, str], Mapping[str, Callable[[Any], Call | Prepared]]] = {
    ("blockwise", "fwd"): _FORTH,
    ("blockwise", "dx"): _FORTH,
    ("blockwise", "dw"): {OWN: _titan("blockwise_weight_gradient")},
    ("rowwise", "fwd"): _BY_ROW,
    ("rowwise", "dx"): _BY_ROW,
}


# ------------------------------------------------------------------------------------------------ the whole layer


@dataclass(frozen=True)
class _Layer:
    x_RI: Tensor
    weight_EOI: Tensor
    ends: list[int]
    ends_E: Tensor


def _linear(shape: Grouped, counts: list[int], name: str, draw: Draw) -> Case:
    def inputs() -> _Layer:
        ends = list(itertools.accumulate(counts))
        x = draw.normal(shape.rows, shape.inner)
        weight = draw.normal(shape.groups, shape.outer, shape.inner, scale=shape.inner**-0.5)
        return _Layer(x, weight, ends, torch.tensor(ends, dtype=torch.int32, device=draw.device))

    def truth(o: _Layer) -> Sequence[Tensor]:
        weights = zip(spans(o.ends), o.weight_EOI, strict=True)
        return [torch.cat([o.x_RI[rows].double() @ w.double().T for rows, w in weights])]

    weights = sum(count > 0 for count in counts) * shape.inner * shape.outer
    return Case(
        operation="moe-gemm",
        shape=f"{name} with casts",
        part="fwd",
        dtype="fp8",
        flops=2.0 * shape.rows * shape.inner * shape.outer,
        moved=2.0 * (shape.rows * (shape.inner + shape.outer) + weights),
        inputs=inputs,
        reference=truth,
        backends={
            OWN: lambda o: _titan_layer(o, "blockwise"),
            "titan-rowwise": lambda o: _titan_layer(o, "rowwise"),
            "torchao": _torchao_layer,
        },
        limit=CAST_LIMIT,
    )


def _titan_layer(o: _Layer, recipe: str) -> Call:
    from titan_kernels.fp8_grouped_gemm import fp8_grouped_linear

    return lambda: fp8_grouped_linear(o.x_RI, o.weight_EOI, o.ends_E, recipe)  # pyright: ignore[reportArgumentType]


def _torchao_layer(o: _Layer) -> Call:
    if o.x_RI.device.type != "cuda":
        raise Absent("torchao's float8 grouped product needs a GPU")
    try:
        from torchao.prototype.moe_training.fp8_grouped_mm import _to_fp8_rowwise_then_scaled_grouped_mm as product
    except ImportError:
        raise Absent("pip install 'titan-pretrain[quant]'") from None
    return lambda: product(o.x_RI, o.weight_EOI.transpose(-2, -1), o.ends_E)
