"""Broken configs, generated: whatever is in a file, it ends in a config or in a message."""

import random
import string
from pathlib import Path

import pytest

from titan_core.config.catalog import recipes
from titan_core.config.checks import check
from titan_core.config.fields import fields
from titan_core.config.load import load
from titan_core.runtime.errors import ConfigError

VALUES = [
    "''", "'x'", "-1", "0", "1", "99999999999999999999", "1.5", "-0.0", "inf", "nan", "true", "false", "[]", "[1]",
    "['x']", "[[]]", "{}", "{a = 1}", "[{}]", "[{a = 1}]", "1979-05-27", "07:32:00", "'none'", '"""\nx\n"""',
    "[[[[]]]]", "+1", "1e9",
]  # fmt: skip


def scribble(text: str, dice: random.Random) -> str:
    """Break text anywhere: drop, double, swap or replace a few characters or lines."""
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(text))
        size = dice.choice([1, 1, 1, 5, 40])
        middle = text[at : at + size]
        new = dice.choice(["", middle * 2, middle[::-1], "".join(dice.choices(string.printable, k=size)), "\0", "é"])
        text = text[:at] + new + text[at + size :]
    return text


def assert_is_explained(path: Path) -> bool:
    """Load a file; True if it was refused, and then with a message, a place and no more than that."""
    try:
        found = check(load(str(path)), 2)
    except ConfigError as error:
        found = error.problems
    for problem in found:
        assert problem.message
        assert problem.message.isprintable(), problem
        assert len(problem.message) < 600
        assert problem.where or problem.tip
    return bool(found)


def test_values_of_every_kind_for_every_key(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    dice = random.Random(0)
    refused = 0
    for key in fields():
        section, _, name = key.rpartition(".")
        for value in dice.sample(VALUES, 6):
            path.write_text(f"[{section}]\n{name} = {value}\n")
            refused += assert_is_explained(path)
    assert refused > 3 * len(fields())


@pytest.mark.parametrize("name", recipes())
def test_scribbled_files(name: str, tmp_path: Path) -> None:
    text = recipes()[name].read_text()
    path = tmp_path / "a.toml"
    dice = random.Random(name)
    refused = 0
    for _ in range(200):
        path.write_text(scribble(text, dice), encoding="utf-8", newline="")
        refused += assert_is_explained(path)
    assert refused > 100


def test_random_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    dice = random.Random(0)
    for _ in range(100):
        path.write_bytes(b"[training]\n" + dice.randbytes(dice.randint(1, 40)))
        assert assert_is_explained(path)
