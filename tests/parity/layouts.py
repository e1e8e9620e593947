"""Runs the first steps of tiny models on a layout, and returns all that must not depend on it.

Models that meet the same layout do so one after another on the same ranks: of a rank's CPU time (0.5 s on two ranks,
2 s on eight) most is the start, and DTensor's work of finding shardings, which it remembers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from titan_core.config.load import Resolved
from titan_core.runtime import distributed
from titan_core.runtime.events import silent
from titan_core.training.build import build
from titan_core.training.step import forward_backward

STEPS = 5


@dataclass(frozen=True)
class Seen:
    """Losses (nats) and gradient norms of the steps, targets a step, loads of experts, further parts of the loss, and
    the whole gradients of the first step."""

    losses: list[float]
    norms: list[float]
    targets: list[int]
    loads: list[dict[str, float]]
    further: list[dict[str, float]]
    gradients: dict[str, Tensor]


def first_steps(resolved: Resolved, ranks: int) -> Seen:
    """Train a few steps on so many ranks; every rank must report the same numbers."""
    return first_steps_of_each([resolved], ranks)[0]


def first_steps_of_each(runs: Sequence[Resolved], ranks: int) -> list[Seen]:
    """Train each a few steps, one after another on the same ranks."""
    if ranks == 1:
        return [_run(resolved) for resolved in runs]
    return [_agreed(everyone) for everyone in zip(*run_ranks(_run_each, ranks, runs), strict=True)]


def _run_each(runs: Sequence[Resolved]) -> list[Seen]:
    return [_run(resolved) for resolved in runs]


def _agreed(everyone: Sequence[Seen]) -> Seen:
    """Return what every rank saw: the same numbers, and each gradient as all have it that have it."""
    assert all(_numbers(one) == _numbers(everyone[0]) for one in everyone)
    gradients: dict[str, Tensor] = {}
    for one in everyone:
        for name, gradient in one.gradients.items():
            assert torch.equal(gradients.setdefault(name, gradient), gradient), f"ranks differ in {name}"
    return Seen(*_numbers(everyone[0]), gradients)


def _numbers(seen: Seen) -> tuple[Any, ...]:
    return seen.losses, seen.norms, seen.targets, seen.loads, seen.further


def _run(resolved: Resolved) -> Seen:
    world = distributed.start()
    parts = build(resolved.config, world, silent)
    seen = Seen([], [], [], [], [], {})
    for step in range(STEPS):
        outcome = forward_backward(parts, lambda: next(parts.loader))
        if step == 0:
            seen.gradients.update({name: _whole(p.grad) for name, p in parts.parameters.items()})
        seen.losses.append(outcome.loss)
        seen.norms.append(outcome.grad_norm)
        seen.targets.append(outcome.targets)
        seen.further.append(outcome.further)
        parts.update(1e-2)
        seen.loads.append(parts.balance.metrics())
    parts.loader.close()
    return seen


def _whole(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()


def assert_as_alone(models: dict[str, Resolved], ranks: int, alone: Callable[[str], Seen]) -> None:
    """Assert that so many ranks see of each model what one process sees."""
    for model, found in zip(models, first_steps_of_each([*models.values()], ranks), strict=True):
        try:
            assert_same(found, alone(model))
        except AssertionError as error:
            error.add_note(f"the model is `{model}`")
            raise


def assert_same(found: Seen, expected: Seen, tolerance: float = 1e-5) -> None:
    """Assert that two layouts gave the same numbers, to a tolerance relative to the largest gradient of a parameter."""
    assert found.targets == expected.targets
    for ours, alone in zip(found.loads + found.further, expected.loads + expected.further, strict=True):
        assert ours == pytest.approx(alone, rel=1e-5)
    for mine, theirs in zip(found.losses + found.norms, expected.losses + expected.norms, strict=True):
        assert abs(mine - theirs) <= tolerance * abs(theirs), (found.losses, expected.losses)
    assert set(found.gradients) == set(expected.gradients)
    for name, gradient in expected.gradients.items():
        error = (found.gradients[name] - gradient).abs().max().item()
        assert error <= tolerance * max(gradient.abs().max().item(), 1e-3), f"{name}: {error}"
