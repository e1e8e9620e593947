"""Weights that are stored in float8, for models that are not trained: half of bf16's bytes, and faster matmuls.

Weights have one scale a row, found once, and inputs one scale a row, found at each call.

Shape letters: N rows, O out, I in; D stands for all dimensions but the last.
"""

from __future__ import annotations

from typing import Any

import torch
from titan_kernels.quant import quantize_rowwise
from torch import Tensor, nn

from titan_core.config.quantize import FLOAT8, MULTIPLE
from titan_core.declare.family import Family
from titan_core.nn.layers import Linear
from titan_core.quantization.choose import Rules, choose
from titan_core.quantization.machine import require
from titan_core.runtime.errors import UsageError


class StoredFloat8(nn.Module):
    """A linear layer for inference; without a GPU its operands are rounded alike, and multiplied in fp32."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        weight_OI, scale_O = quantize_rowwise(layer.weight.detach())
        self.register_buffer("weight", weight_OI)
        self.register_buffer("scale", scale_O)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.dtype = layer.weight.dtype

    def forward(self, x_DI: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype of the layer that it replaces."""
        q_NI, scale_N = quantize_rowwise(x_DI.reshape(-1, x_DI.shape[-1]))
        y_NO = _product(q_NI, scale_N[:, None], self.weight, self.scale[None]).to(self.dtype)
        y_NO = y_NO if self.bias is None else y_NO + self.bias
        return y_NO.view(*x_DI.shape[:-1], -1)


def _product(q_NI: Tensor, scale_N1: Tensor, weight_OI: Tensor, scale_1O: Tensor) -> Tensor:
    if q_NI.is_cuda:
        return torch._scaled_mm(
            q_NI, weight_OI.t(), scale_a=scale_N1, scale_b=scale_1O, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    return (q_NI.float() * scale_N1) @ (weight_OI.float() * scale_1O.t()).t()


def check_device(device: torch.device) -> str | None:
    """Raise `MachineError` for a GPU without float8; return what is worth saying of another device."""
    if device.type == "cuda":
        require(device, (8, 9), "float8", "leave --quantize out")
        return None
    return f"a {device.type.upper()} has no float8: operands are rounded to it all the same, which makes nothing faster"


def layers(model: nn.Module, family: Family, sizes: Any) -> dict[str, Linear]:
    """Return the layers to store in float8, as `quantize.linear.float8` converts them; `UsageError` if none."""
    found = choose(model, family.parameters(sizes), Rules.of((), MULTIPLE[FLOAT8]), family.sharding, 1)
    if not found.chosen:
        raise UsageError(f"no layer of this model can be stored in float8; left out: {found.reasons()}")
    return found.chosen
