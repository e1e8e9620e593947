"""From TOML files and command-line words to one checked `Config`, with the source of every value.

Precedence, lowest first: defaults, the file or recipe named by `extends` (and what that extends), the file, the command
line. All problems are reported at once, each with the file and line that caused it.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from titan_core.config.fields import Field, fields, sections, suggest
from titan_core.config.files import read_chain
from titan_core.config.schema import Config
from titan_core.config.values import choices, convert, expects, literal, nearest_choice, parse_word, shown
from titan_core.runtime.errors import ConfigError, Problem


@dataclass(frozen=True)
class Source:
    """Where a value came from: `where` is `file:line`, or the flag."""

    kind: Literal["recipe", "file", "flag"]
    where: str


@dataclass(frozen=True)
class Setting:
    """A value that somebody set, before it is checked."""

    key: str
    value: Any
    source: Source


@dataclass(frozen=True)
class Resolved:
    """A checked config, where each value that is not a default came from, and remarks for the user."""

    config: Config
    sources: dict[str, Source] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def load(target: str | None, flags: list[tuple[str, str | None]] | None = None) -> Resolved:
    """Resolve a recipe name or TOML path and `--section.key value` flags into a checked config.

    `flags` holds dotted keys with their words as typed; None stands for a bare boolean. Raises `ConfigError` with
    every problem found.
    """
    problems: list[Problem] = []
    settings: list[Setting | None] = list(_from_files(target)) if target else []
    settings += [_from_flag(key, word, problems) for key, word in flags or []]
    resolved = _merge([s for s in settings if s is not None], problems)
    if problems:
        raise ConfigError(problems)
    return resolved


def from_dict(tree: dict[str, Any], where: str = "saved config") -> Config:
    """Build a config from a nested dict, as `to_dict` made it; unknown keys are errors."""
    problems: list[Problem] = []
    source = Source("file", where)
    settings = [Setting(key, value, source) for key, value in _flatten(tree)]
    resolved = _merge(settings, problems)
    if problems:
        raise ConfigError(problems)
    return resolved.config


def to_dict(config: Config) -> dict[str, Any]:
    """Return a config as nested dicts of plain values."""
    return msgspec.to_builtins(config)


def _from_files(target: str) -> Iterator[Setting]:
    """Read a file and what it extends; the settings of the extended file come first."""
    for file in read_chain(target):
        for key, value in _flatten(file.tree):
            yield Setting(key, value, Source("recipe" if file.is_recipe else "file", file.place(key)))


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Turn nested tables into dotted keys; a table that is itself a value (`model.args`) stays whole."""
    flat: list[tuple[str, Any]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in fields() and (value or key in sections()):
            flat += _flatten(value, key + ".")
        else:
            flat.append((key, value))
    return flat


# ---------------------------------------------------------------------------------------------- flags


def _from_flag(key: str, word: str | None, problems: list[Problem]) -> Setting | None:
    """Turn the words of `--section.key value` into a setting, by the type of the key."""
    flag = f"--{shown(key)}"
    key = key.replace("-", "_")
    source = Source("flag", flag)
    if key.startswith("model.args."):
        value = None if word == "none" else literal(word if word is not None else "true")
        for part in reversed(key.split(".")[2:]):
            value = {part: value}
        return Setting("model.args", value, source)
    section, _, name = key.rpartition(".")
    if key not in fields() and name.startswith("no_") and f"{section}.{name[3:]}" in fields():
        return Setting(f"{section}.{name[3:]}", False, source)
    known = fields().get(key)
    if known is None:
        problems.append(_unknown(key, flag))
        return None
    if word is None:
        if known.type is bool:
            return Setting(key, True, source)
        problems.append(Problem(key, f"`{flag}` needs a value", flag, tip=expects(known.type, known.default)))
        return None
    return Setting(key, parse_word(known.type, word), source)


# ---------------------------------------------------------------------------------------------- merge and check


def _merge(settings: list[Setting], problems: list[Problem]) -> Resolved:
    """Lay settings over the defaults, later over earlier, and check each value against its type."""
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    for setting in settings:
        key, value = setting.key, setting.value
        known = fields().get(key)
        if known is None:
            problems.append(_unknown(key, setting.source.where))
            continue
        if key == "model.args" and isinstance(value, dict):
            value = _laid_over(values.get(key, {}), value)
        try:
            values[key] = convert(known.type, value)
        except ValueError as error:
            problems.append(_mismatch(known, value, setting.source, str(error)))
        else:
            sources[key] = setting.source
    notes = _deprecations(values, sources, problems)
    config = _build(Config, "", values)
    warmup, steps = config.lr_scheduler.warmup_steps, config.training.steps
    if warmup >= steps:
        notes.append(f"lr_scheduler.warmup_steps {warmup} covers all {steps} steps: the learning rate only rises")
    return Resolved(config, sources, notes)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return two nested tables as one; `above` wins."""
    both = {
        name: _laid_over(below[name], value) if isinstance(value, dict) and isinstance(below[name], dict) else value
        for name, value in above.items()
        if name in below
    }
    return {**below, **above, **both}


_hints = functools.cache(typing.get_type_hints)


def _build(cls: type, prefix: str, values: dict[str, Any]) -> Any:
    kwargs = {}
    for name, hint in _hints(cls).items():
        key = f"{prefix}{name}"
        if key in sections():
            kwargs[name] = _build(hint, key + ".", values)
        elif key in values:
            kwargs[name] = values[key]
    return cls(**kwargs)


def _unknown(key: str, where: str) -> Problem:
    if key in sections():
        return Problem(
            key, f"`{key}` is a section, not a value", where, tip=f"`titan config list {key}.` shows its keys"
        )
    near = suggest(key)
    section = key.partition(".")[0]
    every = (
        f"`titan config list {section}.` shows its keys" if section in sections() else "`titan config list` shows all"
    )
    tip = f"did you mean `{near}`?" if near else every
    return Problem(key, f"unknown key `{shown(key)}`", where, tip)


def _mismatch(known: Field, value: Any, source: Source, reason: str) -> Problem:
    tip = expects(known.type, known.default)
    near = nearest_choice(known.type, value)
    if near is not None:
        tip = f"did you mean `{near}`? ({tip})"
    detail = "" if choices(known.type) and isinstance(value, str) else f": {reason}"
    return Problem(known.key, f"`{known.key}` cannot be `{shown(value)}`{detail}", source.where, tip)


def _deprecations(values: dict[str, Any], sources: dict[str, Source], problems: list[Problem]) -> list[str]:
    """Carry over what older files say in words that are gone."""
    notes = []
    old = values.pop("model.tokenizer_path", None)
    if old:
        where = sources.pop("model.tokenizer_path")
        if old.endswith("tokenizer.model"):
            problems.append(
                Problem(
                    "model.tokenizer_path",
                    f"`{old}` names a file, and the key is deprecated",
                    where.where,
                    tip="set `model.hf_assets_path` to the folder that holds it",
                )
            )
        else:
            notes.append(f"`model.tokenizer_path` is deprecated, use `model.hf_assets_path` ({where.where})")
            values.setdefault("model.hf_assets_path", old)
            sources.setdefault("model.hf_assets_path", where)
    return notes
