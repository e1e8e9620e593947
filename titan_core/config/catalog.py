"""The recipes that ship with titan, by name; listing them reads no schema."""

from __future__ import annotations

from pathlib import Path

RECIPES = Path(__file__).parent / "recipes"


def recipes() -> dict[str, Path]:
    """Return the recipes by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


def describe(path: Path) -> str:
    """Return the first comment line of a recipe: its one-line description."""
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    return first.lstrip("# ").strip() if first.startswith("#") else ""
