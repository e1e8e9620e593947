"""Products of experts in MXFP8 (OCP Microscaling 1.0): e4m3 with a power-of-two scale for every 32 numbers.

The 32 numbers lie along the dimension that a product sums over: along features for the output and the gradient of the
rows, along the rows of an expert for the gradient of its weight. No block may hold rows of two experts, so those of
each begin at a multiple of 32 (of 128 where torchao's kernels write scales for matrix units), with zeros in between.
Scales are rounded up, so that nothing saturates.

Shape letters: R rows, E experts, O out, I in.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from titan_kernels.grouped_gemm import grouped_linear
from torch import Tensor
from torchao.prototype.moe_training import mxfp8_grouped_mm
from torchao.prototype.moe_training.kernels.mxfp8 import quant
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx

from titan_core.nn.experts import Product
from titan_core.quantization.mx import BLOCK
from titan_core.runtime.errors import MachineError


def product_of(recipe: str) -> Product:
    """Read a recipe: `emulated` or not, `wgrad_with_hp` (the gradient of weights in high precision) or not."""
    exact = recipe.endswith("wgrad_with_hp")
    return partial(emulated if "emulated" in recipe else multiplied, exact_weight_gradient=exact)


def check_kernels() -> None:
    """Raise `MachineError` if torchao cannot form these products on this machine's GPU."""
    tip = "set quantize.grouped_mm.mx.recipe_name to mxfp8_emulated: the same rounding, in slower products"
    missing = quant._missing_cutedsl_runtime_packages()
    if missing:
        line = "pip install nvidia-cutlass-dsl apache-tvm-ffi"
        raise MachineError(f"torchao's MXFP8 casts need {', '.join(missing)}", tip=f"{line}, or {tip}")
    if not (mxfp8_grouped_mm._SM100_KERNELS_AVAILABLE and quant._mxfp8_cutedsl_kernels_available):
        raise MachineError(
            "this torchao has no MXFP8 products of experts for this GPU: they are for compute capability 10 and "
            "CUDA 12.8 or later",
            tip=tip,
        )


def multiplied(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, exact_weight_gradient: bool) -> Tensor:
    """Multiply the rows of each expert with its matrix by torchao's kernels, which give bf16."""
    y_RO = mxfp8_grouped_mm._to_mxfp8_then_scaled_grouped_mm(
        x_RI.contiguous(), weight_EOI.contiguous().transpose(1, 2), ends_E, wgrad_with_hp=exact_weight_gradient
    )
    return y_RO.to(x_RI.dtype)


def emulated(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, exact_weight_gradient: bool) -> Tensor:
    """Do the same to rounded operands in high precision, on any device."""
    return _Emulated.apply(x_RI, weight_EOI, ends_E, exact_weight_gradient)


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, exact: bool) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI, ends_E)
        ctx.exact = exact
        return grouped_linear(rounded(x_RI, 1), rounded(weight_EOI, 2), ends_E)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_RI, weight_EOI, ends_E = ctx.saved_tensors
        ops = torch.ops.titan_kernels
        grad_x = ops.grouped_input_gradient(rounded(grad_RO, 1), rounded(weight_EOI, 1), ends_E)
        if not ctx.exact:
            grad_RO, x_RI = rounded(grad_RO, 0), rounded(x_RI, 0)
        return grad_x, ops.grouped_weight_gradient(grad_RO, x_RI, ends_E), None, None


def rounded(x: Tensor, dim: int) -> Tensor:
    """Round to what MXFP8 can say with a scale for every 32 numbers along `dim`, whose size is a multiple of 32."""
    lines = x.movedim(dim, -1).contiguous()
    scale, numbers = to_mx(lines, torch.float8_e4m3fn, BLOCK, ScaleCalculationMode.RCEIL)
    blocks = numbers.unflatten(-1, (-1, BLOCK)).float() * scale.float().unsqueeze(-1)
    return blocks.flatten(-2).to(x.dtype).movedim(-1, dim).contiguous()
