"""MXFP8 training arithmetic (OCP Microscaling 1.0) by torchao: e4m3 with a power-of-two scale for every 32 numbers.

The 32 numbers lie along the dimension that a matmul sums over, so each of a layer's three matmuls casts its operands
anew: along features for the output and the gradient of the input, along tokens for the gradient of the weight. A block
of tokens never spans two rows of a batch whose length is a multiple of 32, and parts of a split weight have sides that
are multiples of 32: so no layout of ranks changes the rounding, if each piece of a sequence is such a multiple too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchao.prototype.moe_training.mxfp8_linear import mx_mm
from torchao.prototype.mx_formats.config import (
    MXFP8Dim0CastKernelChoice,
    MXFP8Dim1CastKernelChoice,
    ScaleCalculationMode,
)
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from titan_core.quantization.layer import QuantizedLinear

BLOCK = 32


@dataclass(frozen=True)
class Arithmetic:
    """torchao's options for a recipe; one for all layers."""

    recipe: str
    kernels: KernelPreference
    cast_rows: MXFP8Dim0CastKernelChoice
    cast_columns: MXFP8Dim1CastKernelChoice
    rounding: ScaleCalculationMode

    @staticmethod
    def of(recipe: str, dim1_kernel: str) -> Arithmetic:
        """Read a recipe: `emulated` or not, `rceil` or not. An emulated one casts in plain torch, not by a kernel."""
        emulated = "emulated" in recipe
        return Arithmetic(
            recipe,
            KernelPreference.EMULATED if emulated else KernelPreference.AUTO,
            MXFP8Dim0CastKernelChoice.TORCH if emulated else MXFP8Dim0CastKernelChoice.TRITON,
            MXFP8Dim1CastKernelChoice("torch" if emulated else dim1_kernel),
            ScaleCalculationMode.RCEIL if recipe.endswith("rceil") else ScaleCalculationMode.FLOOR,
        )


class MXLinear(QuantizedLinear[Arithmetic]):
    """A `Linear` whose matmuls take MXFP8 operands."""

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype in which a `Linear` would compute."""
        weight, how, e4m3 = self.weight, self.arithmetic, torch.float8_e4m3fn
        dtype = self.dtype
        y = mx_mm.apply(
            x_ND.to(dtype).contiguous(), weight.to(dtype), e4m3, e4m3, e4m3, BLOCK,
            how.kernels, how.cast_rows, how.cast_columns, how.rounding, False,
        )  # fmt: skip
        return self.add_bias(y.to(dtype))  # the kernels give bf16
