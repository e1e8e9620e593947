"""The table of model families. Adding a model is adding a folder here and a line to `FAMILIES`."""

from __future__ import annotations

import difflib
import importlib
import typing
from typing import Any

import msgspec

from titan_core.config import schema
from titan_core.config.values import convert, expects, shown
from titan_core.declare.family import Family
from titan_core.runtime.errors import ConfigError, Problem

FAMILIES = {
    "deepseek_v3": "titan_core.models.deepseek_v3",
    "flux": "titan_core.models.flux",
    "flux_autoencoder": "titan_core.models.flux_autoencoder",
    "llama3": "titan_core.models.llama3",
    "llama4": "titan_core.models.llama4",
    "qwen3": "titan_core.models.qwen3",
}


def family(name: str) -> Family:
    """Return a family by name; its module is imported now, torch is not."""
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.4)
        known = ", ".join(FAMILIES)
        tip = f"did you mean `{near[0]}`? known: {known}" if near else f"known families: {known}"
        raise ConfigError([Problem("model.name", f"no model family `{name}`", where="model.name", tip=tip)])
    return importlib.import_module(FAMILIES[name]).FAMILY


def resolve(config: schema.Model) -> tuple[Family, Any]:
    """Return the family and the sizes that `[model]` names; raises `ConfigError` for what the family does not have."""
    chosen = family(config.name)
    flavors = ", ".join(chosen.flavors)
    if config.flavor not in chosen.flavors:
        near = difflib.get_close_matches(config.flavor, chosen.flavors, n=1, cutoff=0.3)
        tip = f"did you mean `{near[0]}`? {config.name} has {flavors}" if near else f"one of {flavors}"
        message = f"{config.name} has no flavor `{config.flavor}`"
        raise ConfigError([Problem("model.flavor", message, where="model.flavor", tip=tip)])
    flavor = chosen.flavors[config.flavor]
    found, changes = [], {}
    hints = typing.get_type_hints(type(flavor), include_extras=True)
    for name, value in config.args.items():
        where = f"model.args.{name}"
        try:
            changes[name] = convert(hints[name], value)
        except KeyError:
            near = difflib.get_close_matches(name, hints, n=1, cutoff=0.4)
            tip = f"did you mean `{near[0]}`?" if near else "it has " + ", ".join(hints)
            found.append(Problem(where, f"{config.name} has no size `{shown(name)}`", where, tip))
        except ValueError as error:
            message = f"`{where}` cannot be `{shown(value)}`: {error}"
            found.append(Problem(where, message, where, expects(hints[name], getattr(flavor, name))))
    if found:
        raise ConfigError(found)
    try:
        return chosen, chosen.sizes(config.flavor, **changes)
    except ValueError as error:  # sizes that do not fit each other
        raise ConfigError([Problem("model.args", f"{config.name} {config.flavor}: {error}", "model.args")]) from None


def problems(config: schema.Model) -> list[Problem]:
    """Return what is wrong with `[model]`: known before torch is loaded."""
    try:
        resolve(config)
    except ConfigError as error:
        return error.problems
    return []


def sizes_from_dict(chosen: Family, saved: dict[str, Any]) -> Any:
    """Rebuild the sizes that a checkpoint recorded."""
    cls = type(next(iter(chosen.flavors.values())))
    return msgspec.convert(saved, cls)
