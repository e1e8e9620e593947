"""The schedule as a function: its phases, its ends, and what holds for every setting."""

import itertools
import math

import pytest

from titan_core.config.schema import LRScheduler
from titan_core.optim.schedule import lr_factor

SHAPES = ("linear", "sqrt", "cosine")
CASES = [
    (steps, warmup, ratio, shape, floor)
    for steps in (1, 2, 7, 100)
    for warmup in (0, 1, 5, 100, 1000)
    for ratio in (None, 0.0, 0.3, 1.0)
    for shape in SHAPES
    for floor in (0.0, 0.1, 1.0)
]


def curve(steps: int, warmup: int, ratio: float | None, shape: str, floor: float) -> list[float]:
    config = LRScheduler(warmup, ratio, shape, floor)  # type: ignore[arg-type]
    return [lr_factor(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_what_holds_for_every_setting(steps: int) -> None:
    for case in (case for case in CASES if case[0] == steps):
        found = curve(*case)
        _, warmup, _, _, floor = case
        warm = min(warmup, steps)
        assert found[:warm] == pytest.approx([(s + 1) / warm for s in range(warm)]), case
        after = found[warm:]
        assert all(a >= b for a, b in itertools.pairwise(after)), case
        assert all(floor < factor <= 1 or floor == factor == 1 for factor in after), case  # the floor is never reached
        assert not after or after[0] == 1.0, case


@pytest.mark.parametrize("shape", SHAPES)
def test_the_decay_takes_its_share_of_the_steps(shape: str) -> None:
    found = curve(1000, 100, 0.2, shape, 0.0)
    assert found[100:801] == [1.0] * 701
    assert found[801] < 1.0
    progress = [(step - 800) / 200 for step in range(801, 1000)]
    forms = {
        "linear": [1 - p for p in progress],
        "sqrt": [1 - math.sqrt(p) for p in progress],
        "cosine": [(1 + math.cos(math.pi * p)) / 2 for p in progress],
    }
    assert found[801:] == pytest.approx(forms[shape])


def test_the_floor_scales_the_decay_only() -> None:
    plain, raised = (curve(50, 10, None, "cosine", floor) for floor in (0.0, 0.25))
    assert raised[:10] == plain[:10]
    assert raised[10:] == pytest.approx([0.25 + 0.75 * factor for factor in plain[10:]])


def test_past_the_end_the_floor_stays() -> None:
    config = LRScheduler(2, None, "linear", 0.1)
    assert [lr_factor(step, 10, config) for step in (10, 11, 500)] == [pytest.approx(0.1)] * 3


def test_a_longer_run_keeps_warmup_and_stable_phase() -> None:
    short, long = (curve(steps, 10, 0.5, "linear", 0.0) for steps in (100, 200))
    assert long[:50] == short[:50]
    assert long[60:90] == [1.0] * 30
