"""Experts whose products are float8."""

from __future__ import annotations

import torch
from torch import nn

from titan_core.config.quantize import FLOAT8_EXPERTS
from titan_core.config.schema import Config
from titan_core.nn.experts import Experts
from titan_core.runtime.errors import ConfigError, MachineError, Problem


def convert_experts(model: nn.Module, config: Config, device: torch.device, *, whole: bool) -> list[str]:
    """Let experts compute in float8: those whose names contain one of `fqns`, or all. Weights stay what they are.

    A model that is not `whole`, a stage of a pipeline, may have none.
    """
    options = config.quantize.grouped_mm.float8
    found = [m for n, m in model.named_modules() if isinstance(m, Experts) and _named(n, options.fqns)]
    if not found and whole:
        message = f"{FLOAT8_EXPERTS} finds no experts" + (f" named {', '.join(options.fqns)}" if options.fqns else "")
        where = f"{FLOAT8_EXPERTS}.fqns" if options.fqns else "model.converters"
        raise ConfigError([Problem(where, message, where=where, tip="a model with experts, or no such converter")])
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise MachineError(f"{name} has no float8", where="model.converters", tip=f"leave {FLOAT8_EXPERTS} out")
    for experts in found:
        experts.backend = "float8_blockwise" if options.recipe_name == "blockwise" else "float8_rowwise"
    return [f"experts of {len(found)} blocks in float8 ({options.recipe_name})"] if found else []


def _named(name: str, parts: list[str]) -> bool:
    return not parts or any(part in name for part in parts)
