"""What quantized layers have in common: the weight of the layer that they replace, and a name for the arithmetic."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from titan_core.nn.layers import Linear


class Described(Protocol):
    """An arithmetic with a name."""

    @property
    def recipe(self) -> str:
        """What people call it."""
        ...


Kind = TypeVar("Kind", bound=Described)


class QuantizedLinear(Linear, Generic[Kind]):
    """A `Linear` with other matmuls; its weight is the one of the layer that it replaces."""

    def __init__(self, layer: Linear, arithmetic: Kind) -> None:
        rows, columns = layer.weight.shape
        with torch.device("meta"):
            super().__init__(columns, rows)
        self.weight = layer.weight
        self.bias = layer.bias
        self.compute_dtype = layer.compute_dtype
        self.arithmetic = arithmetic

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which a `Linear` would compute."""
        return self.compute_dtype or self.weight.dtype

    def add_bias(self, product: Tensor) -> Tensor:
        """Add the bias, if there is one, to what the matmul gave."""
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        """Show the sizes and the recipe."""
        return f"{super().extra_repr()}, {self.arithmetic.recipe}"
