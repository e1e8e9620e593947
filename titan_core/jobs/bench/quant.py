"""Casts to float8 with scales: of 1 x 128 and 128 x 1 blocks of activations, of 128 x 128 blocks of weights, of rows.

Shape letters: R rows, K width, E experts, O and I widths of weights, B blocks of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_core.jobs.bench.case import OWN, Absent, Call, Case, Prepared
from titan_core.jobs.bench.inputs import Draw
from titan_core.jobs.bench.request import Request

BLOCK = 128
LARGEST = 448.0  # of e4m3
# Casts may differ where a value lies between two of float8: a few steps of a sixteenth among the values of a row. Of
# twelve draws on a CPU the worst short row was off by 2.5e-2; a scale that is off, or of another block, gives far more.
LIMIT = 6e-2

Cast = Callable[[Tensor], Any]


@dataclass(frozen=True)
class _Operation:
    """A cast: `blocks` is how many values along the last two dimensions share a scale, 0 for all of them; `copies` how
    many float8 results it writes; `values` reads (values, scales) out of what titan and its reference return."""

    blocks: tuple[int, int]
    copies: int
    values: Callable[[Any], tuple[Tensor, Tensor]]
    shapes: tuple[tuple[int, ...], ...]
    reduced: tuple[int, ...]


def cases(request: Request, draw: Draw) -> Iterator[Case]:
    """Give every cast at every shape."""
    for name, operation in _OPERATIONS.items():
        for shape in (operation.reduced,) if request.reduced else operation.shapes:
            yield _case(name, operation, shape, draw)


def _case(name: str, operation: _Operation, shape: tuple[int, ...], draw: Draw) -> Case:
    numbers = torch.Size(shape).numel()
    group = (operation.blocks[0] or shape[-2]) * (operation.blocks[1] or shape[-1])
    return Case(
        operation="quant",
        shape=f"{name} " + "x".join(map(str, shape)),
        part="fwd",
        dtype="bf16",
        flops=0.0,
        moved=numbers * (2.0 + operation.copies) + 4.0 * numbers / group,
        inputs=lambda: draw.normal(*shape),
        reference=lambda x: _truth(x, operation.blocks),
        backends={
            OWN: lambda x: _prepared(_of_titan(f"quantize_{name}"), x, operation),
            "eager": lambda x: _prepared(_of_titan(f"reference_quantize_{name}"), x, operation),
            "compile": lambda x: _prepared(_compiled(f"reference_quantize_{name}"), x, operation),
            **({"torchao": _torchao} if name == "1x128" else {}),
        },
        limit=LIMIT,
    )


def _truth(x: Tensor, blocks: tuple[int, int]) -> Sequence[Tensor]:
    """Return the values that are stood for, and their scales, with scales and quotients in fp64."""
    rows, columns = (size or length for size, length in zip(blocks, x.shape[-2:], strict=True))
    wide = x.double()
    missing = (-wide.shape[-1] % columns, -wide.shape[-2] % rows)
    padded = torch.nn.functional.pad(wide, (0, missing[0], 0, missing[1]))
    tiles = padded.unflatten(-1, (-1, columns)).unflatten(
        -3, (-1, rows)
    )  # (..., row blocks, rows, column blocks, columns)
    scale = tiles.abs().amax((-3, -1), keepdim=True) / LARGEST
    values = (
        ((tiles / scale).to(torch.float32).to(torch.float8_e4m3fn).double() * scale).flatten(-2, -1).flatten(-3, -2)
    )
    return [values[..., : x.shape[-2], : x.shape[-1]], scale[..., 0, :, 0]]


def _prepared(cast: Cast, x: Tensor, operation: _Operation) -> Prepared:
    def values(found: Any) -> list[Tensor]:
        values, scale = operation.values(found)
        return [values[..., : x.shape[-2], :], scale]  # without the rows that fill a block

    return Prepared(lambda: cast(x), values)


def _of_titan(name: str) -> Cast:
    try:
        from titan_kernels import quant
    except ImportError as error:
        raise Absent(str(error)) from None
    return getattr(quant, name)


def _compiled(name: str) -> Cast:
    if not torch.cuda.is_available():
        raise Absent("compiled peers are tried on a GPU only")
    return torch.compile(_of_titan(name), dynamic=False)


def _torchao(x: Tensor) -> Call | Prepared:
    if not torch.cuda.is_available():
        raise Absent("torchao's kernel needs a GPU")
    try:
        from torchao.prototype.blockwise_fp8_training import kernels
    except ImportError:
        raise Absent("pip install 'titan-pretrain[quant]'") from None

    def values(found: tuple[Tensor, Tensor]) -> list[Tensor]:
        q, scale = found  # it gives the scale's reciprocal in some releases: the larger one is that
        scale = scale.reciprocal() if float(scale.mean()) > 1 else scale
        return [q.double() * scale.double().repeat_interleave(BLOCK, 1)[:, : q.shape[1]], scale]

    return Prepared(lambda: kernels.triton_fp8_blockwise_act_quant_lhs(x, BLOCK), values)


# ------------------------------------------------------------------------------------------------ what is returned


def _values_1x128(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    from titan_kernels.quant import dequantize_1x128

    return dequantize_1x128(*found), found[1]


def _values_128x1(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    from titan_kernels.quant import dequantize_128x1

    return dequantize_128x1(*found), found[1]


def _values_128x128(found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    from titan_kernels.quant import dequantize_128x128

    q_EOI, q_EIO, scale = found
    same = torch.equal(q_EOI.view(torch.uint8), q_EIO.view(torch.uint8).transpose(1, 2))
    values = dequantize_128x128(q_EOI, scale)
    return values if same else values * torch.nan, scale


def _values_of_rows(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return found[0].float() * found[1][..., None], found[1][..., None]


_OPERATIONS = {
    "1x128": _Operation((1, BLOCK), 1, _values_1x128, ((32768, 7168), (32768, 2048)), (250, 320)),
    "128x1": _Operation((BLOCK, 1), 1, _values_128x1, ((32768, 7168),), (250, 320)),
    "128x128": _Operation((BLOCK, BLOCK), 2, _values_128x128, ((32, 4096, 7168),), (2, 250, 320)),
    "rowwise": _Operation((1, 0), 1, _values_of_rows, ((32768, 7168),), (250, 320)),
}
