"""From names in `model.converters` to quantized layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from titan_core.config.layout import Layout
from titan_core.config.quantize import FLOAT8, FLOAT8_EXPERTS, MULTIPLE, MX, MX_EXPERTS
from titan_core.config.schema import Config
from titan_core.declare.family import Family
from titan_core.declare.sharding import matches
from titan_core.nn.layers import Linear
from titan_core.quantization import experts
from titan_core.quantization.choose import Choice, Rules, choose
from titan_core.quantization.machine import require, torchao
from titan_core.runtime.errors import ConfigError, Problem

_Made = TypeVar("_Made", bound=Linear)


def convert(
    model: nn.Module, family: Family, sizes: Any, config: Config, layout: Layout, device: torch.device
) -> list[str]:
    """Quantize a model, or a stage of one, on the meta device as `model.converters` says; returns what was done.

    Parameters keep their names, shapes and dtypes: checkpoints, initial weights, sharding and optimizers see no
    difference. Raises `MachineError` if torchao is missing or the device cannot, `ConfigError` if no layer is left.
    """
    said: list[str] = []
    for name in config.model.converters:
        if name == FLOAT8_EXPERTS:
            said += experts.in_float8(model, config, device)
        elif name == MX_EXPERTS:
            said += experts.in_mx(model, config, device)
        else:
            part = _Part(model, family, sizes, layout)
            said += (_float8 if name == FLOAT8 else _mx)(part, config, device)
    return said


@dataclass(frozen=True)
class _Part:
    model: nn.Module
    family: Family
    sizes: Any
    layout: Layout

    def choose(self, rules: Rules) -> Choice:
        return choose(self.model, self.family.parameters(self.sizes), rules, self.family.sharding, self.layout.tp)

    def swap(self, choice: Choice, made: Callable[[Linear], _Made], key: str) -> list[_Made]:
        """Put other layers in the place of those chosen. A stage of a pipeline may have none."""
        if not choice.chosen and self.layout.pp == 1:
            message = f"{key} has no linear layer to convert; left out: {choice.reasons()}"
            tip = f"a larger model, other {key}.filter_fqns, or no such converter"
            raise ConfigError([Problem("model.converters", message, where="model.converters", tip=tip)])
        layers = {name: made(layer) for name, layer in choice.chosen.items()}
        for name, layer in layers.items():
            self.model.set_submodule(name, layer)
        return list(layers.values())


def precompute_scales(module: nn.Module, config: Config) -> None:
    """Compute the scales of weights that are gathered in float8 in one reduction, where the config asks for it.

    `module` is what FSDP has sharded: a task, or a stage of a pipeline.
    """
    options = config.quantize.linear.float8
    if FLOAT8 in config.model.converters and options.precompute_float8_dynamic_scale_for_fsdp:
        from titan_core.quantization import float8  # torchao: 2 s

        float8.precompute_scales(module)


def wires(model: nn.Module, family: Family, config: Config) -> dict[str, Any]:
    """Return how the residual stream may travel to tensor-parallel regions, by their names: in float8, where all that
    is computed with it there is in float8, with one scale a tensor."""
    options = config.quantize.linear.float8
    if FLOAT8 not in config.model.converters or (options.recipe_name or "tensorwise") != "tensorwise":
        return {}
    from titan_core.quantization import float8

    regions = {name: module for name, module in model.named_modules() if matches(name, family.sharding.regions)}
    columns = {
        name: [m for inner, m in region.named_modules() if matches(f"{name}.{inner}", family.sharding.columns)]
        for name, region in regions.items()
    }
    return {
        name: float8.Float8Wire()
        for name, layers in columns.items()
        if layers and all(isinstance(layer, float8.Float8Linear) for layer in layers)
    }


def _float8(part: _Part, config: Config, device: torch.device) -> list[str]:
    options = config.quantize.linear.float8
    recipe = options.recipe_name or "tensorwise"
    if not options.emulate:
        require(device, (8, 9), "float8", f"set {FLOAT8}.emulate: the same rounding, in slower matmuls")
    with torchao():
        from titan_core.quantization import float8
    choice = part.choose(Rules.of(options.filter_fqns, MULTIPLE[FLOAT8], recipe))
    arithmetic = float8.Arithmetic.of(recipe, emulate=options.emulate)
    layers = part.swap(choice, lambda layer: float8.Float8Linear(layer, arithmetic), FLOAT8)
    if config.compile.enable:
        float8.prepare_compiler(recipe)
    said = _said(f"float8 {recipe}" + ", emulated," * options.emulate, choice)
    if options.enable_fsdp_float8_all_gather and part.layout.fsdp > 1:
        said.append(f"{float8.gather_in_float8(layers, part.layout.fsdp)} of them gathered in float8")
    elif options.enable_fsdp_float8_all_gather:
        said.append("nothing to gather in float8: weights are not sharded")
    return said


def _mx(part: _Part, config: Config, device: torch.device) -> list[str]:
    options = config.quantize.linear.mx
    if "emulated" not in options.recipe_name:
        other = options.recipe_name.replace("cublas", "emulated")
        require(device, (10, 0), "MXFP8", f"set {MX}.recipe_name to {other}: the same rounding, in slower matmuls")
    with torchao():
        from titan_core.quantization import mx
    choice = part.choose(Rules.of(options.filter_fqns, MULTIPLE[MX]))
    arithmetic = mx.Arithmetic.of(options.recipe_name, options.mxfp8_dim1_cast_kernel_choice)
    part.swap(choice, lambda layer: mx.MXLinear(layer, arithmetic), MX)
    return _said(options.recipe_name, choice)


def _said(what: str, choice: Choice) -> list[str]:
    said = f"{what} in {len(choice.chosen)} of {len(choice.chosen) + len(choice.left)} linear layers"
    if choice.left:
        said += f" (left out: {choice.reasons()})"
    unused = [f"`{pattern}` of filter_fqns matches nothing" for pattern in choice.unused]
    return [said, *unused]
