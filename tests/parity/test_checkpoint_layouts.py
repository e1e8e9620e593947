"""A checkpoint saved in one layout goes on in any other: the losses that follow are those of one process alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.parity.test_layouts import ranks_of, settings_of
from tests.runs import losses, tiny

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "fsdp 2": {"dp": 2},
    "tensor 2": {"tp": 2},
    "pipeline 2": {"pp": 2, "schedule": "Interleaved1F1B"},
    "fsdp 2 x tensor 2": {"dp": 2, "tp": 2},
    "simple fsdp 2 x context 2": {"dp": 2, "cp": 2, "backend": "simple"},
}
SAVED, STEPS = 3, 6
ODD = {"model.args.vocab_size": 2049, "model.args.ffn_dim": 40}  # nothing divides the vocabulary


def run(layout: dict[str, Any], folder: Path, **more: Any) -> list[float]:
    changes = {
        **settings_of(layout, ODD),
        "training__steps": STEPS,
        "checkpoint__enable": True,
        "training__max_norm": 1.0,
    }
    return losses(tiny(folder, **changes), ranks_of(layout), **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run({}, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module", params=LAYOUTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, whole: list[float]) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    assert run(LAYOUTS[request.param], folder, until=SAVED) == pytest.approx(whole[:SAVED], rel=1e-5)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_goes_on_in(name: str, saved: Path, whole: list[float], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    assert run(LAYOUTS[name], folder) == pytest.approx(whole[SAVED:], rel=1e-5)


def test_what_is_saved_after_a_validation_is_the_same(whole: list[float], tmp_path: Path) -> None:
    """FSDP leaves parameters gathered after a forward without a backward."""
    layout = LAYOUTS["fsdp 2"]
    validation = {"validation__enable": True, "validation__freq": SAVED, "validation__steps": 1}
    changes = {**settings_of(layout, ODD), **validation, "training__steps": STEPS, "training__max_norm": 1.0}
    resolved = tiny(tmp_path, **changes, checkpoint__enable=True, validation__seq_len=32)
    assert losses(resolved, 2, until=SAVED) == pytest.approx(whole[:SAVED], rel=1e-5)
    assert losses(resolved, 2) == pytest.approx(whole[SAVED:], rel=1e-5)
