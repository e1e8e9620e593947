"""Values of the config: read from words, checked against a type, and shown in words that a user of TOML knows."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import tomli

_WIDEST = 80  # characters of a value that a message shows
_INT64 = 1 << 63


def parse_word(hint: Any, word: str) -> Any:
    """Read a word of the command line as a type would have it; `convert` refuses one that does not fit."""
    plain, optional = strip(hint)
    if optional and word.lower() in ("none", "null", ""):
        return None
    if plain is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(word.lower(), word)
    if plain in (int, float):
        return _number(word, whole=plain is int)
    if typing.get_origin(plain) is list:
        if word.lstrip().startswith("["):
            return literal(word)
        return [part.strip() for part in word.split(",") if part.strip()]
    if plain is dict or typing.get_origin(plain) is dict:
        return literal(word)
    return word


def literal(word: str) -> Any:
    """Read a word as a TOML value, or as the string that it is."""
    try:
        return tomli.loads(f"v = {word}")["v"]
    except (ValueError, RecursionError):  # not TOML; more digits or brackets than it reads
        return word


def convert(hint: Any, value: Any) -> Any:
    """Check a value against a type and return it as that type; raises `ValueError` with what is wrong, in words."""
    try:
        converted = msgspec.convert(value, type=hint)
    except msgspec.ValidationError as error:
        raise ValueError(_in_words(str(error))) from None
    for leaf in _leaves(value):
        if isinstance(leaf, float) and not math.isfinite(leaf):
            raise ValueError("it is not a finite number")
        if isinstance(leaf, int) and not -_INT64 <= leaf < _INT64:
            raise ValueError("it has more than 64 bits")
        if isinstance(leaf, str) and "\0" in leaf:
            raise ValueError("it contains a zero byte")
    unknown = _unknown_name(hint, value)
    if unknown is not None:
        raise ValueError(unknown)
    return converted


def choices(hint: Any) -> tuple[Any, ...]:
    """Return the values that a type allows, if it lists them."""
    plain, _ = strip(hint)
    if typing.get_origin(plain) is list:
        plain = typing.get_args(plain)[0]
    return typing.get_args(plain) if typing.get_origin(plain) is Literal else ()


def expects(hint: Any, default: Any) -> str:
    """Say what a key takes."""
    allowed = choices(hint)
    if allowed:
        return "one of " + ", ".join(str(choice) for choice in allowed)
    return f"expects {type_name(hint)}, e.g. `{toml_value(default)}`"


def nearest_choice(hint: Any, value: Any) -> str | None:
    """Return the allowed value that a wrong one looks like; in a list, for its first item that is not allowed."""
    allowed = [str(choice) for choice in choices(hint)]
    wrong = [item for item in (value if isinstance(value, list) else [value]) if item not in allowed]
    if not allowed or not wrong or not isinstance(wrong[0], str):
        return None
    lowered = {choice.lower(): choice for choice in allowed}
    near = difflib.get_close_matches(wrong[0].lower(), lowered, n=1, cutoff=0.5)
    return lowered[near[0]] if near else None


def type_name(hint: Any) -> str:
    """Return a type in words that a user of TOML knows."""
    allowed = choices(hint)
    plain, optional = strip(hint)
    if allowed:
        name = " | ".join(str(choice) for choice in allowed)
    elif typing.get_origin(plain) in (list, tuple):
        name = f"list of {type_name(typing.get_args(plain)[0])}"
    elif typing.get_origin(plain) is dict:
        name = "table"
    elif dataclasses.is_dataclass(plain):
        name = "table with " + ", ".join(field.name for field in dataclasses.fields(plain))
    else:
        name = {int: "integer", float: "number", str: "string", bool: "true or false"}[plain]
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


def shown(value: Any) -> str:
    """Return a value, or a key that nobody knows, as a message may show it: on one line, short, without escapes."""
    try:
        text = value if isinstance(value, str) else toml_value(value)
    except ValueError:  # an integer with more digits than Python writes
        text = "a huge number"
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def strip(hint: Any) -> tuple[Any, bool]:
    """Return the type without None and without Annotated, and whether None was allowed."""
    optional = False
    args = typing.get_args(hint)
    if type(None) in args:
        optional = True
        hint = next(a for a in args if a is not type(None))
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    return hint, optional


def _number(word: str, *, whole: bool) -> Any:
    value = literal(word.replace("_", ""))
    if isinstance(value, str):
        try:
            value = float(word)  # TOML has no `.5` and no `1.`
        except ValueError:
            return word
        if not math.isfinite(value):
            return word
    if whole and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e4 steps
    return value if isinstance(value, int | float) and not isinstance(value, bool) else word


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _unknown_name(hint: Any, value: Any) -> str | None:
    """Name a key that a table, alone or in a list, does not have; msgspec passes over them."""
    plain, _ = strip(hint)
    if typing.get_origin(plain) is list and value is not None:
        return next((found for item in value if (found := _unknown_name(typing.get_args(plain)[0], item))), None)
    if not dataclasses.is_dataclass(plain) or not isinstance(value, dict):
        return None
    known = [field.name for field in dataclasses.fields(plain)]
    for name in (name for name in value if name not in known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        return f"it has no `{shown(name)}`" + (f"; did you mean `{near[0]}`?" if near else "")
    return None


def _in_words(message: str) -> str:
    """Say a message of msgspec's in TOML's words: types, and the place inside a list counted from 1."""
    message, _, place = message.partition(" - at `$")
    for theirs, ours in (
        ("object", "table"), ("array", "list"), ("int", "integer"), ("float", "number"),
        ("str", "string"), ("bool", "true or false"), ("null", "nothing"),
    ):  # fmt: skip
        message = message.replace(f"`{theirs}", f"`{ours}")
    message = message.replace("`", "")
    message = message[:1].lower() + message[1:]
    head, _, rest = place.strip("`").strip("[").partition("]")
    if head.isdigit():
        message += f" in item {int(head) + 1}" + (f", {rest.strip('.')}" if rest.strip(".") else "")
    return message
