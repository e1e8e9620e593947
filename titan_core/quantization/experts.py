"""Experts whose products are float8 or MXFP8. Weights stay what they are."""

from __future__ import annotations

from functools import partial

import torch
from titan_kernels.fp8_grouped_gemm import fp8_grouped_linear
from torch import nn

from titan_core.config.quantize import FLOAT8_EXPERTS, MX_EXPERTS, rows_and_columns
from titan_core.config.schema import Config
from titan_core.nn.experts import Experts
from titan_core.quantization.machine import require, torchao


def in_float8(model: nn.Module, config: Config, device: torch.device) -> list[str]:
    """Let experts compute in float8; on a CPU with the same rounding, in fp32."""
    options = config.quantize.grouped_mm.float8
    found = _found(model, options.fqns)
    if device.type == "cuda" and torch.cuda.is_available():
        require(device, (8, 9), "float8", f"leave {FLOAT8_EXPERTS} out")
    for experts in found:
        experts.product = partial(fp8_grouped_linear, recipe=options.recipe_name)
    return [f"experts of {len(found)} block{'s' * (len(found) > 1)} in float8 ({options.recipe_name})"] if found else []


def in_mx(model: nn.Module, config: Config, device: torch.device) -> list[str]:
    """Let experts compute in MXFP8."""
    options = config.quantize.grouped_mm.mx
    found = _found(model, options.fqns)
    is_emulated = "emulated" in options.recipe_name
    if not is_emulated:
        other = options.recipe_name.replace("mxfp8", "mxfp8_emulated")
        tip = f"set {MX_EXPERTS}.recipe_name to {other}: the same rounding, in slower products"
        require(device, (10, 0), "MXFP8", tip)
    with torchao():
        from titan_core.quantization import mx_experts
    if not is_emulated:
        mx_experts.check_kernels()
    for experts in found:
        experts.product = mx_experts.product_of(options.recipe_name)
        experts.align = rows_and_columns(options.recipe_name)
    return [f"experts of {len(found)} block{'s' * (len(found) > 1)} in MXFP8 ({options.recipe_name})"] if found else []


def _found(model: nn.Module, fqns: list[str]) -> list[Experts]:
    """Return experts whose names contain one of `fqns`, or all; a stage of a pipeline may have none."""
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
    return [module for name, module in named if not fqns or any(part in name for part in fqns)]
