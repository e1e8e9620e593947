"""Float8 and MXFP8 arithmetic written anew in fp64, without torchao and without torch's float8 dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """Explicit bits of the mantissa, exponent of the smallest normal number, largest number."""

    bits: int
    lowest: int
    largest: float


E4M3, E5M2 = Format(3, -6, 448.0), Format(2, -14, 57344.0)


def rounded(x: Tensor, to: Format) -> Tensor:
    """Round to the nearest number of a format, ties to even, beyond the largest to the largest; fp64."""
    x = x.double()
    exponent = (torch.frexp(x).exponent - 1).clamp(min=to.lowest)
    step = torch.exp2((exponent - to.bits).double())
    return (torch.round(x / step) * step).clamp(-to.largest, to.largest)


def scaled(x: Tensor, to: Format, dim: int | None = None, power_of_two: bool = False) -> Tensor:
    """Scale a tensor, or each line along `dim`, to the format's largest number, round, and scale back."""
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (to.largest / largest.double()).float()
    if power_of_two:
        scale = torch.exp2((torch.frexp(scale).exponent - 1).float())
    return rounded(x.float() * scale, to) / scale.double()


def mx(x: Tensor, dim: int, up: bool) -> Tensor:
    """Share a power of two among 32 neighbours along `dim`, its exponent rounded down or up."""
    blocks = x.double().movedim(dim, -1).unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    power = torch.ceil(torch.log2(largest / 448)) if up else torch.floor(torch.log2(largest)) - 8
    scale = torch.exp2(power.clamp(min=-126))
    return (rounded(blocks / scale, E4M3) * scale).flatten(-2).movedim(-1, dim)


Operand = Callable[[Tensor], Tensor]


class Recipe(NamedTuple):
    """How each matmul rounds its operands: x (N, in), w (out, in), g (N, out), the gradient of the output."""

    x: Operand
    w: Operand
    g_for_x: Operand
    w_for_x: Operand
    g_for_w: Operand
    x_for_w: Operand


def _rows(x: Tensor) -> Tensor:
    return scaled(x, E4M3, 1, power_of_two=True)


def _columns(x: Tensor) -> Tensor:
    return scaled(x, E4M3, 0, power_of_two=True)


def _tensor(x: Tensor) -> Tensor:
    return scaled(x, E4M3)


def _gradient(x: Tensor) -> Tensor:
    return scaled(x, E5M2)


def _mx_recipe(up: bool) -> Recipe:
    def along(dim: int) -> Operand:
        return lambda x: mx(x, dim, up)

    return Recipe(along(1), along(1), along(1), along(0), along(0), along(0))


RECIPES = {
    "tensorwise": Recipe(_tensor, _tensor, _gradient, _tensor, _gradient, _tensor),
    "rowwise": Recipe(_rows, _rows, _rows, _columns, _columns, _columns),
    "rowwise_with_gw_hp": Recipe(
        _rows, _rows, _rows, lambda w: scaled(w, E4M3, power_of_two=True), Tensor.double, Tensor.double
    ),
    "mxfp8_emulated": _mx_recipe(up=False),
    "mxfp8_emulated_rceil": _mx_recipe(up=True),
}


def linear(x: Tensor, w: Tensor, g: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and the gradients of x and w of a layer; x (N, in), w (out, in), g (N, out)."""
    output = recipe.x(x) @ recipe.w(w).T
    grad_x = recipe.g_for_x(g) @ recipe.w_for_x(w)
    grad_w = recipe.g_for_w(g).T @ recipe.x_for_w(x)
    return output, grad_x, grad_w
