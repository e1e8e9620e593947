"""From TOML files and command-line words to one checked `Config`, with the source of every value.

Precedence, lowest first: defaults, the file or recipe named by `extends` (and what that extends), the file, the command
line. All problems are reported at once, each with the file and line that caused it.
"""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import tomli

from titan_core.config.catalog import RECIPES, recipes
from titan_core.config.fields import Field, fields, sections, suggest
from titan_core.config.schema import Config
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
    settings = _read_chain(target, problems) if target else []
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


# ---------------------------------------------------------------------------------------------- files


def find(target: str, relative_to: Path | None = None) -> Path:
    """Return the file that a recipe name or a path stands for; raises `ConfigError` with the nearest recipe."""
    known = recipes()
    if target in known:
        return known[target]
    for base in (relative_to, Path()):
        if base is not None and (base / target).is_file():
            return base / target
    import difflib

    near = difflib.get_close_matches(target, known, n=1, cutoff=0.4)
    tip = f"did you mean the recipe `{near[0]}`?" if near else "`titan train --list` shows the recipes"
    kind = "file" if target.endswith(".toml") or "/" in target else "recipe or file"
    raise ConfigError([Problem("", f"no such {kind}: `{target}`", tip=tip)])


def _read_chain(target: str, problems: list[Problem]) -> list[Setting | None]:
    """Read a file and what it extends; the settings of the extended file come first."""
    chain: list[list[Setting | None]] = []
    path, seen = find(target), []
    while path is not None:
        if path in seen:
            problems.append(Problem("extends", f"`{path}` extends itself", tip="remove one `extends` line"))
            break
        seen.append(path)
        tree, lines = _parse(path)
        parent = tree.pop("extends", None)
        is_recipe = path.parent == RECIPES
        label = f"recipe {path.stem}" if is_recipe else str(path)
        kind = "recipe" if is_recipe else "file"
        chain.append(
            [
                Setting(key, value, Source(kind, f"{label}:{lines[key]}" if key in lines else label))
                for key, value in _flatten(tree)
            ]
        )
        path = find(str(parent), relative_to=path.parent) if parent else None
    return [setting for settings in reversed(chain) for setting in settings]


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([Problem("", f"cannot read `{path}`: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        message = f"`{path}` is not a text file (byte {error.start} is not UTF-8)"
        raise ConfigError([Problem("", message, tip="a config is a TOML file")]) from None
    try:
        return tomli.loads(text), _key_lines(text)
    except tomli.TOMLDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise ConfigError([Problem("", f"not valid TOML: {error.msg}", where=where)]) from None


def _key_lines(text: str) -> dict[str, int]:
    """Map each dotted key to its line. Keys on lines of their own are found, which is how TOML is written."""
    lines: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.split("\n"), 1):
        header = re.match(r"\s*\[+\s*([\w.\-\"' ]+?)\s*\]+\s*(#.*)?$", line)
        assignment = re.match(r"\s*([\w.\-\"']+)\s*=", line)
        if header:
            section = _unquote(header.group(1)) + "."
            lines.setdefault(section[:-1], number)
        elif assignment:
            lines.setdefault(section + _unquote(assignment.group(1)), number)
    return lines


def _unquote(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


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
    flag = f"--{key}"
    key = key.replace("-", "_")
    source = Source("flag", flag)
    if key.startswith("model.args."):
        value = None if word == "none" else _literal(word if word is not None else "true")
        return Setting("model.args", {key.removeprefix("model.args."): value}, source)
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
        problems.append(Problem(key, f"`{flag}` needs a value", flag, tip=_expects(known)))
        return None
    return Setting(key, _parse_word(known, word), source)


def _parse_word(known: Field, word: str) -> Any:
    """Read a word as the key's type would have it; a word that does not fit is left for the type check to refuse."""
    plain, optional = _strip(known.type)
    if optional and word.lower() in ("none", "null", ""):
        return None
    if plain is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(word.lower(), word)
    if plain in (int, float):
        value = _literal(word.replace("_", ""))
        return value if isinstance(value, int | float) and not isinstance(value, bool) else word
    if typing.get_origin(plain) is list:
        if word.lstrip().startswith("["):
            return _literal(word)
        return [part.strip() for part in word.split(",") if part.strip()]
    if plain is dict or typing.get_origin(plain) is dict:
        return _literal(word)
    return word


def _literal(word: str) -> Any:
    """Read a word as a TOML value, or as the string that it is."""
    try:
        return tomli.loads(f"v = {word}")["v"]
    except tomli.TOMLDecodeError:
        return word


def _strip(hint: Any) -> tuple[Any, bool]:
    """Return the type without None and without Annotated, and whether None was allowed."""
    optional = False
    args = typing.get_args(hint)
    if type(None) in args:
        optional = True
        hint = next(a for a in args if a is not type(None))
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return hint, optional


# ---------------------------------------------------------------------------------------------- merge and check


def _merge(settings: list[Setting], problems: list[Problem]) -> Resolved:
    """Lay settings over the defaults, later over earlier, and check each value against its type."""
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    for setting in settings:
        key, value = setting.key, setting.value
        known = fields().get(key)
        if known is None:
            if key in sections():
                message = f"`{key}` is a section, not a value"
                problems.append(Problem(key, message, setting.source.where, tip=f"write `[{key}]`"))
            else:
                problems.append(_unknown(key, setting.source.where))
            continue
        if key == "model.args" and isinstance(value, dict):
            value = {**values.get(key, {}), **value}
        try:
            values[key] = msgspec.convert(value, type=known.type)
        except msgspec.ValidationError as error:
            problems.append(_mismatch(known, value, setting.source, error))
        else:
            sources[key] = setting.source
    notes = _deprecations(values, sources, problems)
    return Resolved(_build(Config, "", values), sources, notes)


def _build(cls: type, prefix: str, values: dict[str, Any]) -> Any:
    kwargs = {}
    for name, hint in typing.get_type_hints(cls).items():
        key = f"{prefix}{name}"
        if key in sections():
            kwargs[name] = _build(hint, key + ".", values)
        elif key in values:
            kwargs[name] = values[key]
    return cls(**kwargs)


def _unknown(key: str, where: str) -> Problem:
    near = suggest(key)
    tip = f"did you mean `{near}`?" if near else "`titan config list` shows every key"
    return Problem(key, f"unknown key `{key}`", where, tip)


def _mismatch(known: Field, value: Any, source: Source, error: Exception) -> Problem:
    allowed = choices(known.type)
    tip = _expects(known)
    if allowed and isinstance(value, str):
        import difflib

        near = difflib.get_close_matches(value, [str(c) for c in allowed], n=1, cutoff=0.5)
        if near:
            tip = f"did you mean `{near[0]}`? ({tip})"
    detail = "" if allowed else f": {str(error)[:1].lower()}{str(error)[1:]}"
    return Problem(known.key, f"`{known.key}` cannot be `{value}`{detail}", source.where, tip)


def choices(hint: Any) -> tuple[Any, ...]:
    """Return the values that a type allows, if it lists them."""
    plain, _ = _strip(hint)
    if typing.get_origin(plain) is list:
        plain = typing.get_args(plain)[0]
    return typing.get_args(plain) if typing.get_origin(plain) is Literal else ()


def _expects(known: Field) -> str:
    allowed = choices(known.type)
    if allowed:
        return "one of " + ", ".join(str(choice) for choice in allowed)
    return f"expects {type_name(known.type)}, e.g. `{toml_value(known.default)}`"


def type_name(hint: Any) -> str:
    """Return a type in words that a user of TOML knows."""
    allowed = choices(hint)
    plain, optional = _strip(hint)
    if allowed:
        name = " | ".join(str(choice) for choice in allowed)
    elif typing.get_origin(plain) is list:
        name = f"list of {type_name(typing.get_args(plain)[0])}"
    elif typing.get_origin(plain) is dict:
        name = "table"
    else:
        name = {int: "integer", float: "number", str: "string", bool: "true or false"}.get(
            plain, getattr(plain, "__name__", str(plain))
        )
    return f"{name}, optional" if optional else name


def toml_value(value: Any) -> str:
    """Write a plain value as TOML."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return msgspec.json.encode(value).decode()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, int | float):
        return repr(value)
    return toml_value(msgspec.to_builtins(value))


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
