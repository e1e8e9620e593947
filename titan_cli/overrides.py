"""Config flags (`--section.key value`) are taken out of the words before Typer sees them.

Typer stays strict that way: what it gets are its own options only, and a misspelt one is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Flags = list[tuple[str, str | None]]


@dataclass
class Split:
    """The words for Typer, and the config flags: dotted key and word, None for a bare flag."""

    words: list[str] = field(default_factory=list)
    flags: Flags = field(default_factory=list)


def split(argv: list[str]) -> Split:
    """Separate config flags from all other words; everything after `--` is left alone.

    A config flag is an option with a dot in its name. Its value is what follows `=`, or the next word unless that is
    an option; `-1` and `-0.5` are values.
    """
    result = Split()
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if word == "--":
            result.words += argv[position - 1 :]
            break
        name, equals, value = word.partition("=")
        if name == "--run":
            name = "--job.dump_folder"
        if not (name.startswith("--") and (("." in name and "/" not in name) or name == "--job.dump_folder")):
            result.words.append(word)
            continue
        key = name[2:].replace("-", "_")
        if equals:
            result.flags.append((key, value))
        elif position < len(argv) and _is_value(argv[position], key):
            result.flags.append((key, argv[position]))
            position += 1
        else:
            result.flags.append((key, None))
    return result


def _is_value(word: str, key: str) -> bool:
    """Is the next word the value of a flag? A boolean takes one only if it looks like one."""
    if word.startswith("-") and not _is_number(word):
        return False
    from titan_core.config.fields import fields

    known = fields().get(key)
    section, _, name = key.rpartition(".")
    negated = known is None and name.startswith("no_") and f"{section}.{name[3:]}" in fields()
    if negated:
        return False
    if known is not None and known.type is bool:
        return word.lower() in ("true", "false", "1", "0")
    return True


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
