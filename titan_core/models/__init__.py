"""The table of model families. Adding a model is adding a folder here and a line to `FAMILIES`."""

from __future__ import annotations

import difflib
import importlib

from titan_core.declare.family import Family
from titan_core.runtime.errors import UsageError

FAMILIES = {"llama3": "titan_core.models.llama3"}


def family(name: str) -> Family:
    """Return a family by name; its module is imported now, torch is not."""
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.4)
        known = ", ".join(FAMILIES)
        tip = f"did you mean `{near[0]}`? known: {known}" if near else f"known families: {known}"
        raise UsageError(f"no model family `{name}`", where="model.name", tip=tip)
    return importlib.import_module(FAMILIES[name]).FAMILY
