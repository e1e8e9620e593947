"""From names in `model.converters` to quantized layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from titan_core.config.quantize import FLOAT8, MULTIPLE, MX
from titan_core.config.schema import Config
from titan_core.declare.parameters import Parameter
from titan_core.nn.layers import Linear
from titan_core.quantization.choose import Choice, Rules, choose
from titan_core.runtime.errors import ConfigError, MachineError, Problem, missing_extra

_Made = TypeVar("_Made", bound=Linear)


def convert(
    model: nn.Module, declared: Sequence[Parameter], config: Config, device: torch.device, shards: int
) -> list[str]:
    """Quantize a model on the meta device as `model.converters` says, and return a few words for each thing done.

    Parameters keep their names, shapes and dtypes: checkpoints, initial weights, sharding and optimizers see no
    difference. `shards` is the number of ranks that FSDP will shard a weight over. Raises `MachineError` if torchao is
    missing or the device cannot, `ConfigError` if no layer is left.
    """
    said: list[str] = []
    for name in config.model.converters:
        if name == FLOAT8:
            said += _float8(model, declared, config, device, shards)
        else:
            said += _mx(model, declared, config, device)
    return said


def precompute_scales(task: nn.Module, config: Config) -> None:
    """Compute the scales of weights that are gathered in float8 in one reduction, where the config asks for it.

    Called once a task has been laid out.
    """
    options = config.quantize.linear.float8
    if FLOAT8 in config.model.converters and options.precompute_float8_dynamic_scale_for_fsdp:
        from titan_core.quantization import float8  # torchao: 2 s

        float8.precompute_scales(task)


def _float8(
    model: nn.Module, declared: Sequence[Parameter], config: Config, device: torch.device, shards: int
) -> list[str]:
    options = config.quantize.linear.float8
    recipe = options.recipe_name or "tensorwise"
    if not options.emulate:
        _require(device, (8, 9), "float8", f"set {FLOAT8}.emulate: the same rounding, in slower matmuls")
    with _torchao():
        from titan_core.quantization import float8
    choice = choose(model, declared, Rules.of(options.filter_fqns, MULTIPLE[FLOAT8], recipe))
    arithmetic = float8.Arithmetic.of(recipe, emulate=options.emulate)
    layers = _swap(model, choice, lambda layer: float8.Float8Linear(layer, arithmetic), FLOAT8)
    if config.compile.enable:
        float8.prepare_compiler(recipe)
    said = _said(f"float8 {recipe}" + ", emulated," * options.emulate, choice)
    if options.enable_fsdp_float8_all_gather and shards > 1:
        said.append(f"{float8.gather_in_float8(layers, shards)} of them gathered in float8")
    elif options.enable_fsdp_float8_all_gather:
        said.append("nothing to gather in float8: weights are not sharded")
    return said


def _mx(model: nn.Module, declared: Sequence[Parameter], config: Config, device: torch.device) -> list[str]:
    options = config.quantize.linear.mx
    if "emulated" not in options.recipe_name:
        other = options.recipe_name.replace("cublas", "emulated")
        _require(device, (10, 0), "MXFP8", f"set {MX}.recipe_name to {other}: the same rounding, in slower matmuls")
    with _torchao():
        from titan_core.quantization import mx
    choice = choose(model, declared, Rules.of(options.filter_fqns, MULTIPLE[MX]))
    arithmetic = mx.Arithmetic.of(options.recipe_name, options.mxfp8_dim1_cast_kernel_choice)
    _swap(model, choice, lambda layer: mx.MXLinear(layer, arithmetic), MX)
    return _said(options.recipe_name, choice)


def _require(device: torch.device, capability: tuple[int, int], what: str, tip: str) -> None:
    """Refuse a device whose matmuls cannot take the operands; nothing falls back without a word."""
    if device.type != "cuda":
        raise MachineError(f"{what} matmuls need a GPU, and this run is on the {device.type.upper()}", tip=tip)
    found = torch.cuda.get_device_capability(device)
    if found < capability:
        raise MachineError(
            f"{what} matmuls need compute capability {capability[0]}.{capability[1]}, and "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}",
            tip=tip,
        )


def _swap(model: nn.Module, choice: Choice, made: Callable[[Linear], _Made], key: str) -> list[_Made]:
    if not choice.chosen:
        message = f"{key} has no linear layer to convert; left out: {choice.reasons()}"
        tip = f"a larger model, other {key}.filter_fqns, or no such converter"
        raise ConfigError([Problem("model.converters", message, where="model.converters", tip=tip)])
    layers = {name: made(layer) for name, layer in choice.chosen.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers.values())


def _said(what: str, choice: Choice) -> list[str]:
    said = f"{what} in {len(choice.chosen)} of {len(choice.chosen) + len(choice.left)} linear layers"
    if choice.left:
        said += f" (left out: {choice.reasons()})"
    unused = [f"`{pattern}` of filter_fqns matches nothing" for pattern in choice.unused]
    return [said, *unused]


@contextmanager
def _torchao() -> Iterator[None]:
    """Import what needs torchao. torchao 0.18 makes torch 2.14 log two deprecations that no user can act on."""
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except ImportError as error:
        if error.name and error.name.partition(".")[0] == "torchao":
            raise missing_extra("torchao", "quant") from None
        raise
    finally:
        logger.setLevel(level)
