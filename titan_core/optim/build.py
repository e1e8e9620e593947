"""Optimizers and their parameter groups, by role and by name pattern."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titan_core.config import schema
from titan_core.declare.parameters import Parameter


def build_optimizer(
    named: Mapping[str, nn.Parameter], declared: Sequence[Parameter], config: schema.Optimizer
) -> torch.optim.Optimizer:
    """Build the optimizer; each group carries `lr_factor`, which multiplies the scheduled learning rate."""
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": config.implementation == "fused",
        "foreach": config.implementation == "foreach",
    }
    cls = torch.optim.AdamW if config.name == "AdamW" else torch.optim.Adam
    return cls(param_groups(named, declared, config), **options)


def param_groups(
    named: Mapping[str, nn.Parameter], declared: Sequence[Parameter], config: schema.Optimizer
) -> list[dict[str, Any]]:
    """Sort parameters into groups of equal weight decay and learning-rate factor, in a stable order."""
    roles = {parameter.name: parameter.role for parameter in declared}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named.items():
        decay = 0.0 if roles[name] in config.no_decay_roles else config.weight_decay
        factor = 1.0
        for group in config.param_groups:
            if fnmatch.fnmatchcase(name, group.pattern):
                factor = group.lr_factor
                decay = decay if group.weight_decay is None else group.weight_decay
                break
        entry = groups.setdefault(
            (decay, factor), {"params": [], "names": [], "weight_decay": decay, "lr_factor": factor}
        )
        entry["params"].append(parameter)
        entry["names"].append(name)
    return list(groups.values())


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr` times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by `optimizer.state.<parameter>.<kind>`, made if there is none yet.

    Names, not positions: the state then follows its parameter into any layout. The tensors are the optimizer's own, so
    loading into them is loading the optimizer.
    """
    tensors: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = optimizer.state[parameter]
            if not state:
                state["step"] = _step_tensor(parameter, group)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            for kind, value in state.items():
                tensors[f"optimizer.state.{name}.{kind}"] = value
    return tensors


def _step_tensor(parameter: Tensor, group: dict[str, Any]) -> Tensor:
    on_device = bool(group.get("fused"))
    return torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
