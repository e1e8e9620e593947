"""Mixtures of experts go on in another layout where they stopped, biases and loads included; and leave as folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.test_expert_layouts import EXPERTS, MODELS
from tests.parity.test_layouts import ranks_of, settings_of
from tests.runs import losses, tiny

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "expert 2 x fsdp 2": {"dp": 4, "ep": 2},
    "expert over tensor": {"dp": 2, "tp": 2, "ep": 4},
    "expert x tensor": {"dp": 2, "tp": 2, "ep": 2, "etp": 2},
}
PAIRS = [("one", "expert x tensor"), ("expert 2 x fsdp 2", "expert over tensor"), ("expert x tensor", "one")]
SAVED, STEPS = 3, 6


def run(name: str, folder: Path, **more: Any) -> list[float]:
    changes = {"training__steps": STEPS, "checkpoint__enable": True, "training__max_norm": 1.0}
    layout = LAYOUTS[name]
    return losses(tiny(folder, **{**settings_of(layout, MODELS["balanced"]), **changes}), ranks_of(layout), **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run("one", tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_goes_on(saved: str, loaded: str, whole: list[float], tmp_path: Path) -> None:
    assert run(saved, tmp_path / "run", until=SAVED) == pytest.approx(whole[:SAVED], rel=1e-5)
    assert run(loaded, tmp_path / "run") == pytest.approx(whole[SAVED:], rel=1e-5)


def test_folders_of_transformers_go_into_any_layout_and_out(tmp_path: Path) -> None:
    """A run that starts from a folder on ranks of experts has its numbers, and its last step is such a folder."""
    from transformers import AutoModelForCausalLM

    plain = {**EXPERTS, "model.args.num_shared_experts": 0}
    first = settings_of({}, plain)
    losses(tiny(tmp_path / "a", **first, training__steps=1, checkpoint__enable=True, checkpoint__last_save_in_hf=True))
    (folder,) = (tmp_path / "a" / "checkpoint").rglob("config.json")
    start = {"checkpoint__enable": True, "checkpoint__initial_load_in_hf": True, "training__steps": 2}
    found = []
    for name in ("one", "expert x tensor"):
        settings = settings_of(LAYOUTS[name], plain)
        resolved = tiny(tmp_path / name, checkpoint__initial_load_path=str(folder.parent), **settings, **start)
        found.append(losses(resolved, ranks_of(LAYOUTS[name])))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    model = AutoModelForCausalLM.from_pretrained(folder.parent)
    with torch.no_grad():
        assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape[-1] == 2048
    shutil.rmtree(tmp_path / "a")
