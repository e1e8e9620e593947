"""The experts' matrix products: forward, gradient of the rows, gradient of the weights.

Shape letters: R rows, ordered by expert, E experts, I inner width, O outer width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_core.jobs.bench import passes
from titan_core.jobs.bench.case import OWN, Absent, Call, Case, Prepared
from titan_core.jobs.bench.inputs import Draw
from titan_core.jobs.bench.request import Grouped, Request


@dataclass(frozen=True)
class Operands:
    """One grouped product's inputs; `ends` are where experts end, as numbers and on the device (int32)."""

    x_RI: Tensor
    weight_EOI: Tensor
    grad_RO: Tensor
    ends: list[int]
    ends_E: Tensor


def cases(request: Request, draw: Draw) -> Iterator[Case]:
    """Give every shape and pass that is asked for."""
    sizes = [_reduced(shape) if request.reduced else shape for shape in request.shapes]
    for size in dict.fromkeys(sizes):
        for part in request.passes:
            if request.dtype == "fp8":
                from titan_core.jobs.bench import moe_gemm_fp8

                yield from moe_gemm_fp8.cases(size, part, request.imbalance, draw)
            else:
                yield _case(size, part, request.imbalance, draw)


def share_rows(rows: int, groups: int, imbalance: float) -> list[int]:
    """Return each expert's rows: equal shares, of which the fraction `imbalance` goes to the first instead."""
    each, left = divmod(rows, groups)
    equal = [each + (number < left) for number in range(groups)]
    kept = [round(count * (1 - imbalance)) for count in equal]
    kept[0] += rows - sum(kept)
    return kept


def _reduced(shape: Grouped) -> Grouped:
    """Return what a CPU does in milliseconds: few rows, not a multiple of any tile, and narrower experts."""
    return Grouped(min(shape.rows, 509), _narrowed(shape.outer), _narrowed(shape.inner), min(shape.groups, 8))


def _narrowed(width: int) -> int:
    return width if width <= 64 else min(512, max(64, width // 16 // 8 * 8))


def _case(shape: Grouped, part: str, imbalance: float, draw: Draw) -> Case:
    counts = share_rows(shape.rows, shape.groups, imbalance)
    x, y = shape.rows * shape.inner, shape.rows * shape.outer
    weights = sum(count > 0 for count in counts) * shape.inner * shape.outer  # an expert without rows is not read
    if part == "dw":
        weights = shape.groups * shape.inner * shape.outer  # its gradient is written, as zeros
    return Case(
        operation="moe-gemm",
        shape=named(shape, imbalance),
        part=part,
        dtype="bf16",
        flops=2.0 * shape.rows * shape.inner * shape.outer,
        moved=2.0 * (x + y + weights),
        inputs=lambda: _operands(shape, counts, draw),
        reference=lambda operands: [_TRUTHS[part](operands)],
        backends={name: backend(part) for name, backend in _BACKENDS.items()},
    )


def named(shape: Grouped, imbalance: float) -> str:
    """Return how a shape is shown."""
    return str(shape) + (f" skew={imbalance:g}" if imbalance else "")


def _operands(shape: Grouped, counts: list[int], draw: Draw) -> Operands:
    ends = list(itertools.accumulate(counts))
    return Operands(
        draw.normal(shape.rows, shape.inner),
        draw.normal(shape.groups, shape.outer, shape.inner, scale=shape.inner**-0.5),
        draw.normal(shape.rows, shape.outer),
        ends,
        torch.tensor(ends, dtype=torch.int32, device=draw.device),
    )


def spans(ends: list[int]) -> list[slice]:
    """Return where each expert's rows lie."""
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


# ------------------------------------------------------------------------------------------------ the truth, in fp64


def _true_forward(o: Operands) -> Tensor:
    weights = zip(spans(o.ends), o.weight_EOI, strict=True)
    return torch.cat([o.x_RI[rows].double() @ w.double().T for rows, w in weights])


def _true_dx(o: Operands) -> Tensor:
    weights = zip(spans(o.ends), o.weight_EOI, strict=True)
    return torch.cat([o.grad_RO[rows].double() @ w.double() for rows, w in weights])


def _true_dw(o: Operands) -> Tensor:
    return torch.stack([o.grad_RO[rows].double().T @ o.x_RI[rows].double() for rows in spans(o.ends)])


_TRUTHS: Mapping[str, Callable[[Operands], Tensor]] = {"fwd": _true_forward, "dx": _true_dx, "dw": _true_dw}


# ------------------------------------------------------------------------------------------------ who computes it


def _differentiated(product: Callable[[Tensor, Tensor, Tensor], Tensor], part: str) -> Callable[[Operands], Call]:
    """Return the pass of a product that autograd knows; for a gradient the forward is done before the clock runs."""

    def prepare(o: Operands) -> Call:
        given = passes.Operands([o.x_RI, o.weight_EOI], [o.ends_E], o.grad_RO)
        if part == "fwd":
            return passes.forward(product, given)
        return passes.backward(product, given, [0 if part == "dx" else 1])

    return prepare


def _titan(part: str) -> Callable[[Operands], Call]:
    def prepare(o: Operands) -> Call:
        try:
            from titan_kernels.grouped_gemm import grouped_linear
        except ImportError as error:
            raise Absent(str(error)) from None
        return _differentiated(grouped_linear, part)(o)

    return prepare


def _torch(part: str) -> Callable[[Operands], Call]:
    def product(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(x_RI, weight_EOI.transpose(-2, -1), offs=ends_E)

    return _differentiated(product, part)


def _loop(part: str) -> Callable[[Operands], Call]:
    """One matmul an expert, by cuBLAS on a GPU, into one output; the host knows all offsets, so it never waits."""

    def forward(o: Operands) -> Call:
        out = o.x_RI.new_empty(o.x_RI.shape[0], o.weight_EOI.shape[1])
        return _each([(o.x_RI[r], w.T, out[r]) for r, w in zip(spans(o.ends), o.weight_EOI, strict=True)], out)

    def dx(o: Operands) -> Call:
        out = torch.empty_like(o.x_RI)
        return _each([(o.grad_RO[r], w, out[r]) for r, w in zip(spans(o.ends), o.weight_EOI, strict=True)], out)

    def dw(o: Operands) -> Call:
        out = torch.empty_like(o.weight_EOI)
        pieces = [(o.grad_RO[r].T, o.x_RI[r], out[number]) for number, r in enumerate(spans(o.ends))]
        return _each(pieces, out)

    return {"fwd": forward, "dx": dx, "dw": dw}[part]


def _each(products: list[tuple[Tensor, Tensor, Tensor]], out: Tensor) -> Call:
    def call() -> Tensor:
        for a, b, target in products:
            torch.mm(a, b, out=target)
        return out

    return call


def _deepgemm(part: str) -> Callable[[Operands], Prepared]:
    """DeepGEMM's contiguous layout wants every expert's rows to begin at a multiple of its alignment; they are laid out
    so before the clock runs, and padding is not counted as work."""

    def prepare(o: Operands) -> Prepared:
        gemm, align = find_deepgemm("m_grouped_bf16_gemm_nt_contiguous")
        if part != "fwd":
            raise Absent("DeepGEMM computes no bf16 gradients of this layout")
        place_R, experts_P = padded_layout(o.ends, align, o.x_RI.device)
        x_PI = o.x_RI.new_zeros(len(experts_P), o.x_RI.shape[1])
        x_PI[place_R] = o.x_RI
        out_PO = x_PI.new_empty(len(experts_P), o.weight_EOI.shape[1])

        def call() -> Tensor:
            gemm(x_PI, o.weight_EOI, out_PO, experts_P)
            return out_PO

        return Prepared(call, lambda out: out[place_R])

    return prepare


def find_deepgemm(name: str) -> tuple[Callable[..., Any], int]:
    """Return a function of DeepGEMM and the alignment of its groups' rows."""
    if not torch.cuda.is_available():
        raise Absent("DeepGEMM needs a GPU")
    try:
        import deep_gemm
    except ImportError:
        raise Absent("pip install deep_gemm") from None
    if not hasattr(deep_gemm, name):
        raise Absent(f"this DeepGEMM has no {name}")
    return getattr(deep_gemm, name), int(deep_gemm.get_m_alignment_for_contiguous_layout())


def padded_layout(ends: list[int], align: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where each row goes when experts begin at multiples of `align`, and the expert of every padded row."""
    places: list[Tensor] = []
    experts: list[Tensor] = []
    begin = 0
    for number, rows in enumerate(spans(ends)):
        count = rows.stop - rows.start
        padded = -(-count // align) * align
        places.append(torch.arange(begin, begin + count))
        experts.append(torch.full((padded,), number, dtype=torch.int32))
        begin += padded
    return torch.cat(places).to(device), torch.cat(experts).to(device)


_BACKENDS: Mapping[str, Callable[[str], Callable[[Operands], Call | Prepared]]] = {
    OWN: _titan,
    "grouped_mm": _torch,
    "loop": _loop,
    "deepgemm": _deepgemm,
}
