"""What the design promises of the rooms, where a program can see it."""

import re
from pathlib import Path

import pytest

import titan_core

LAYOUT_WORDS = re.compile(r"\b(mesh|rank|ranks|DTensor|ProcessGroup|torch\.distributed|all_reduce|all_gather)\b")
MODELS = Path(titan_core.__file__).parent / "models"
ENGINES = ("parallel", "interop", "optim", "estimation", "checkpoint", "quantization")


@pytest.mark.parametrize("path", sorted(MODELS.rglob("*.py")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_models_know_no_layout(path: Path) -> None:
    assert LAYOUT_WORDS.findall(path.read_text()) == []


@pytest.mark.parametrize("room", ENGINES)
def test_engines_name_no_model(room: str) -> None:
    families = "|".join(folder.name for folder in MODELS.iterdir() if (folder / "model.py").exists())
    named = re.compile(rf"\b({families})\b")
    for path in (MODELS.parent / room).rglob("*.py"):
        assert named.findall(path.read_text()) == [], path
