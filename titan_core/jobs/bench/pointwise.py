"""RMSNorm and rotary embedding, forward and backward: what moves bytes and multiplies nothing.

Shape letters: N rows, D width, B batch, T tokens, H heads, C head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_core.jobs.bench import passes
from titan_core.jobs.bench.case import OWN, Call, Case
from titan_core.jobs.bench.inputs import Draw
from titan_core.jobs.bench.passes import Operands
from titan_core.jobs.bench.request import Request
from titan_core.nn import eager

EPS = 1e-6


@dataclass(frozen=True)
class _Operation:
    """`moved` is how many numbers of the first tensor's size move, forward and backward."""

    draw: Callable[[tuple[int, ...], Draw], Operands]
    moved: tuple[int, int]
    plain: Callable[..., Tensor]
    training: Callable[..., Tensor]
    titan: Callable[[], Callable[..., Tensor]]
    shapes: tuple[tuple[int, ...], ...]
    reduced: tuple[int, ...]


def cases(request: Request, draw: Draw) -> Iterator[Case]:
    """Give every operation at every shape, forward and backward."""
    for name, operation in _OPERATIONS.items():
        for shape in (operation.reduced,) if request.reduced else operation.shapes:
            for part in ("fwd", "bwd"):
                yield _case(name, operation, shape, part, draw)


def _case(name: str, operation: _Operation, shape: tuple[int, ...], part: str, draw: Draw) -> Case:
    functions: Mapping[str, Callable[[], Callable[..., Tensor]]] = {
        OWN: operation.titan,
        "training": lambda: operation.training,
        "eager": lambda: operation.plain,
        "compile": lambda: passes.compiled(operation.plain),
    }
    return Case(
        operation=name,
        shape="x".join(map(str, shape)),
        part=part,
        dtype="bf16",
        flops=0.0,
        moved=2.0 * operation.moved[part == "bwd"] * torch.Size(shape).numel(),
        inputs=lambda: operation.draw(shape, draw),
        reference=passes.truth(part, operation.plain),
        backends={backend: _prepare(find, part) for backend, find in functions.items()},
    )


def _prepare(find: Callable[[], Callable[..., Tensor]], part: str) -> Callable[[Operands], Call]:
    return lambda operands: passes.of(part, find())(operands)


# ------------------------------------------------------------------------------------------------ the operations


def _norm_operands(shape: tuple[int, ...], draw: Draw) -> Operands:
    return Operands([draw.normal(*shape), draw.normal(shape[-1])], [EPS], draw.normal(*shape))


def _plain_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    return F.rms_norm(x_ND.to(wide), (x_ND.shape[-1],), weight_D.to(wide), eps).to(x_ND.dtype)


def _titan_norm() -> Callable[..., Tensor]:
    from titan_kernels.rms_norm import rms_norm

    return rms_norm


def _rotary_operands(shape: tuple[int, ...], draw: Draw) -> Operands:
    _, tokens, _, width = shape
    turn = draw.normal(tokens, width // 2, scale=100.0, dtype=torch.float32)
    return Operands([draw.normal(*shape)], [turn.cos(), turn.sin()], draw.normal(*shape))


def _plain_rotary(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    pairs = x_BTHC.to(cos_TC.dtype).unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_TC.unsqueeze(-2), sin_TC.unsqueeze(-2)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x_BTHC.dtype)


def _titan_rotary() -> Callable[..., Tensor]:
    from titan_kernels.rotary import rotate_pairs

    return rotate_pairs


def _training_rotary(x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    return eager.RotatePairs.apply(x_BTHC, torch.complex(cos_TC, sin_TC))


_OPERATIONS = {
    "rms-norm": _Operation(
        _norm_operands,
        (2, 3),
        _plain_norm,
        eager.RMSNorm.apply,
        _titan_norm,
        ((16384, 4096), (16384, 8192)),
        (250, 1000),
    ),
    "rotary": _Operation(
        _rotary_operands,
        (2, 2),
        _plain_rotary,
        _training_rotary,
        _titan_rotary,
        ((2, 8192, 32, 128), (2, 8192, 8, 128)),
        (2, 60, 6, 64),
    ),
}
