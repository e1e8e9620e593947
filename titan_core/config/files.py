"""TOML files: finding one by recipe name or path, what it extends, and the line of every key."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli

from titan_core.config.catalog import RECIPES, recipes
from titan_core.config.values import shown
from titan_core.runtime.errors import ConfigError, Problem

_QUOTES = re.compile(r'"""|\'\'\'')


@dataclass(frozen=True)
class TomlFile:
    """A parsed file. `label` is how messages name it; a recipe goes by its name, not by its path."""

    path: Path
    label: str
    tree: dict[str, Any]
    lines: dict[str, int]

    @property
    def is_recipe(self) -> bool:
        """Does it ship with titan?"""
        return self.path.parent == RECIPES

    def place(self, key: str) -> str:
        """Return `file:line` of a dotted key, of the table that holds it if it has no line of its own."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.label}:{self.lines[key]}" if key else self.label


def find(target: str, relative_to: Path | None = None, where: str | None = None) -> Path:
    """Return the file that a recipe name or a path stands for; raises `ConfigError` with the nearest recipe."""
    known = recipes()
    name = target.replace("-", "_")
    if name in known:
        return known[name]
    for base in (relative_to, Path()):
        if base is not None and os.path.isfile(base / target):  # Path.is_file raises for a name that is too long
            return base / target
    if os.path.isdir(target):
        tip = f"`titan config show {target}` shows the config of a run"
        raise ConfigError([Problem("", f"`{target}` is a folder, not a recipe or file", where, tip)])
    near = difflib.get_close_matches(target, known, n=1, cutoff=0.4)
    tip = f"did you mean the recipe `{near[0]}`?" if near else "`titan train --list` shows the recipes"
    kind = "file" if target.endswith(".toml") or "/" in target else "recipe or file"
    raise ConfigError([Problem("", f"no such {kind}: `{shown(target)}`", where, tip)])


def read_chain(target: str) -> list[TomlFile]:
    """Read a file and what it extends, the farthest ancestor first; raises `ConfigError`."""
    chain: list[TomlFile] = []
    path: Path | None = find(target)
    while path is not None:
        file = _parse(path)
        chain.append(file)
        if "extends" not in file.tree:
            break
        parent, where = file.tree.pop("extends"), file.place("extends")
        if not isinstance(parent, str) or not parent:
            tip = 'e.g. `extends = "llama3_8b"`'
            raise ConfigError([Problem("extends", "`extends` takes the name of a recipe or a file", where, tip)])
        path = find(parent, relative_to=path.parent, where=where)
        if path.resolve() in {file.path.resolve() for file in chain}:
            message = f"`{path}` extends itself" + (f", by way of `{chain[-1].label}`" if len(chain) > 1 else "")
            raise ConfigError([Problem("extends", message, where, tip="remove one `extends` line")])
    return chain[::-1]


def _parse(path: Path) -> TomlFile:
    label = f"recipe {path.stem}" if path.parent == RECIPES else str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except OSError as error:
        raise ConfigError([Problem("", f"cannot read `{path}`: {error.strerror}", label)]) from None
    except UnicodeDecodeError as error:
        message = f"`{path}` is not a text file (byte {error.start} is not UTF-8)"
        raise ConfigError([Problem("", message, label, tip="a config is a TOML file")]) from None
    try:
        return TomlFile(path, label, tomli.loads(text), _key_lines(text))
    except tomli.TOMLDecodeError as error:
        where = f"{label}:{error.lineno}:{error.colno}"
        tip = _advice(text.split("\n")[error.lineno - 1 : error.lineno])
        raise ConfigError([Problem("", f"not valid TOML: {error.msg}", where, tip)]) from None
    except RecursionError:
        message = "not valid TOML: brackets are nested more than 400 levels deep"
        raise ConfigError([Problem("", message, label)]) from None
    except ValueError:
        message = "not valid TOML: an integer has more than 4,300 digits"
        raise ConfigError([Problem("", message, label)]) from None


def _advice(lines: list[str]) -> str:
    """Guess from the line that broke what its author had in mind."""
    line = lines[0] if lines else ""
    value = line.partition("=")[2].partition("#")[0].strip()
    if value.lower() in ("true", "false"):
        return "TOML writes `true` and `false`"
    if value.lower() in ("none", "null", "~"):
        return "TOML has no empty value: leave the key out"
    if value and re.fullmatch(r"[A-Za-z_./~-][\w./~:-]*", value):
        return f'text stands in quotes: "{value}"'
    if re.fullmatch(r"\s*[\w.-]+\s*:.*", line):
        return "TOML writes `key = value`, not `key: value`"
    return "a config is a TOML file; see <https://toml.io>"


def _key_lines(text: str) -> dict[str, int]:
    """Map each dotted key to its line. Keys on lines of their own are found, which is how TOML is written."""
    lines: dict[str, int] = {}
    section, open_quote = "", None
    for number, line in enumerate(text.split("\n"), 1):
        was_open = open_quote
        for quote in _QUOTES.findall(line):
            if open_quote is None:
                open_quote = quote
            elif open_quote == quote:
                open_quote = None
        if was_open is not None:  # inside a string over several lines
            continue
        header = re.match(r"\s*\[+\s*([\w.\-\"' ]+?)\s*\]+\s*(#.*)?$", line)
        assignment = re.match(r"\s*([\w.\-\"' ]+?)\s*=", line)
        if header:
            section = _unquote(header.group(1)) + "."
            lines.setdefault(section[:-1], number)
        elif assignment:
            lines.setdefault(section + _unquote(assignment.group(1)), number)
    return lines


def _unquote(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))
