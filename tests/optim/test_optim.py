"""Schedules against listed curves, groups by role and pattern, state by name."""

import dataclasses

import pytest
import torch
from torch import nn

from titan_core.config.schema import LRScheduler, Optimizer, ParamGroup
from titan_core.declare.parameters import Constant, Parameter
from titan_core.optim.build import build_optimizer, param_groups, set_lr, state_tensors
from titan_core.optim.schedule import lr_factor

CURVES = {
    (2, None, "linear", 0.0): [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
    (2, None, "cosine", 0.1): [0.5, 1, 1, 0.966, 0.868, 0.722, 0.55, 0.378, 0.232, 0.134],
    (2, None, "sqrt", 0.0): [0.5, 1, 1, 0.646, 0.5, 0.388, 0.293, 0.209, 0.134, 0.065],
    (2, 0.5, "linear", 0.0): [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2],
    (2, 0.0, "linear", 0.0): [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    (20, None, "linear", 0.0): [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
}


@pytest.mark.parametrize("key", CURVES)
def test_listed_curves(key: tuple) -> None:
    config = LRScheduler(*key)
    assert [lr_factor(step, 10, config) for step in range(10)] == pytest.approx(CURVES[key], abs=6e-4)


def model_and_table() -> tuple[dict[str, nn.Parameter], list[Parameter]]:
    roles = {
        "emb": "embedding",
        "layers.0.w": "hidden",
        "layers.0.norm": "norm",
        "layers.1.w": "hidden",
        "out": "output",
    }
    named = {name: nn.Parameter(torch.full((2, 2), float(i + 1))) for i, name in enumerate(roles)}
    table = [Parameter(name, (2, 2), role, Constant(0.0)) for name, role in roles.items()]  # type: ignore[arg-type]
    return named, table


def test_groups_follow_roles_and_patterns() -> None:
    named, table = model_and_table()
    config = Optimizer(
        no_decay_roles=["norm", "embedding"],
        param_groups=[ParamGroup("layers.1.*", lr_factor=0.5), ParamGroup("out", weight_decay=0.3)],
    )
    found = {
        name: (g["weight_decay"], g["lr_factor"]) for g in param_groups(named, table, config) for name in g["names"]
    }
    assert found == {
        "emb": (0.0, 1.0),
        "layers.0.w": (0.1, 1.0),
        "layers.0.norm": (0.0, 1.0),
        "layers.1.w": (0.1, 0.5),
        "out": (0.3, 1.0),
    }


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_update_equals_torch(name: str, implementation: str) -> None:
    named, table = model_and_table()
    config = dataclasses.replace(Optimizer(), name=name, implementation=implementation, no_decay_roles=[])
    ours = build_optimizer(named, table, config)
    copies = [nn.Parameter(p.detach().clone()) for p in named.values()]
    cls = getattr(torch.optim, name)
    theirs = cls(copies, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        set_lr(ours, 0.02)
        for one, other in zip(named.values(), copies, strict=True):
            one.grad = torch.randn(2, 2, generator=generator)
            other.grad = one.grad.clone()
        ours.step()
        theirs.step()
    for one, other in zip(named.values(), copies, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_state_follows_names() -> None:
    named, table = model_and_table()
    first = build_optimizer(named, table, Optimizer())
    for parameter in named.values():
        parameter.grad = torch.ones(2, 2)
    first.step()
    saved = {name: tensor.clone() for name, tensor in state_tensors(first).items()}
    again, _ = model_and_table()
    second = build_optimizer(again, table, Optimizer())
    for name, tensor in state_tensors(second).items():
        assert tensor.abs().sum() == 0
        tensor.copy_(saved[name])
    for parameter, other in zip(again.values(), named.values(), strict=True):
        parameter.data.copy_(other)
        parameter.grad = torch.ones(2, 2)
        other.grad = torch.ones(2, 2)
    first.step()
    second.step()
    assert all(torch.equal(a, b) for a, b in zip(again.values(), named.values(), strict=True))
    assert set(saved) == {f"optimizer.state.{n}.{k}" for n in named for k in ("step", "exp_avg", "exp_avg_sq")}
