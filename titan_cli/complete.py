"""Completion in the shell: commands, options, config keys and their values, recipes.

The shell's script calls `titan` with `_TITAN_COMPLETE` set and the words so far, the one being typed last; every line
that comes back is a candidate, a tab, and its help. No torch is loaded on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLE = "_TITAN_COMPLETE"
_WITH_CONFIG = {("train",), ("config", "show"), ("validate", "config"), ("validate", "data")}
_WITH_RECIPE = _WITH_CONFIG | {("config", "diff")}
_GLOBAL = {
    "--json": "One JSON object on stdout.",
    "--quiet": "Only results and errors.",
    "--color": "auto, always or never.",
    "--traceback": "Show the traceback of an error.",
}

SCRIPTS = {
    "bash": """\
# bash completion for titan
_titan_completion() {
    local IFS=$'\\n'
    COMPREPLY=( $(_TITAN_COMPLETE=1 titan "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null | cut -f1) )
}
complete -o default -F _titan_completion titan
""",
    "zsh": """\
#compdef titan
# zsh completion for titan
_titan() {
    local -a found
    local line
    for line in "${(@f)$(_TITAN_COMPLETE=1 titan "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        [[ -n "$line" ]] && found+=("${${line%%$'\\t'*}//:/\\\\:}:${line#*$'\\t'}")
    done
    if (( ${#found} )); then _describe titan found; else _files; fi
}
compdef _titan titan
""",
    "fish": """\
# fish completion for titan
function __titan_complete
    set -lx _TITAN_COMPLETE 1
    set -l words (commandline -opc)
    titan $words[2..] (commandline -ct) 2>/dev/null
end
complete -c titan -a '(__titan_complete)'
""",
}


def install_path(shell: str, home: Path) -> Path:
    """Return where a shell looks for a user's completions."""
    return {
        "bash": home / ".local/share/bash-completion/completions/titan",
        "zsh": home / ".zfunc/_titan",
        "fish": home / ".config/fish/completions/titan.fish",
    }[shell]


def answer(words: list[str], root: Any) -> str:
    """Return the candidates for the last of the words; `root` is the command tree."""
    return "\n".join(f"{value}\t{text}" for value, text in candidates(words[:-1], words[-1] if words else "", root))


def candidates(words: list[str], typed: str, root: Any) -> list[tuple[str, str]]:
    """Return (value, help) for the word being typed after complete `words`."""
    path, command = _command(words, root)
    previous = words[-1] if words else ""
    if previous.startswith("--"):
        values = list(_values(previous[2:]))
        if values:
            return [(value, "") for value in values if value.startswith(typed)]
    if typed.startswith("-"):
        found = {**_options(command), **_GLOBAL}
        if path in _WITH_CONFIG:
            found |= _keys()
        return [(name, text) for name, text in found.items() if name.startswith(typed)]
    commands = getattr(command, "list_commands", None)
    if commands is not None:
        named = [(name, command.get_command(None, name)) for name in commands(None)]
        return [(name, _first_line(one.help)) for name, one in named if name.startswith(typed)]
    if path in _WITH_RECIPE:
        from titan_core.config.catalog import describe, recipes

        return [(name, describe(path)) for name, path in recipes().items() if name.startswith(typed)]
    if path == ("config", "explain"):
        return [(name[2:], text) for name, text in _keys().items() if name[2:].startswith(typed)]
    return []


def _command(words: list[str], root: Any) -> tuple[tuple[str, ...], Any]:
    """Walk down the tree along the words; options and their values on the way are passed over."""
    path: tuple[str, ...] = ()
    command = root
    for word in words:
        if word.startswith("-") or not hasattr(command, "list_commands"):
            continue
        below = command.get_command(None, word)
        if below is not None:
            path, command = (*path, word), below
    return path, command


def _options(command: Any) -> dict[str, str]:
    return {
        name: _first_line(getattr(parameter, "help", None))
        for parameter in command.params
        for name in parameter.opts
        if name.startswith("--")
    }


def _keys() -> dict[str, str]:
    from titan_core.config.fields import fields

    return {f"--{key}": field.help for key, field in fields().items()}


def _values(key: str) -> Iterator[str]:
    """Yield the values that a config key can have, if they can be listed."""
    from titan_core.config.fields import fields
    from titan_core.config.values import choices

    if key in fields():
        if fields()[key].type is bool:
            yield from ("true", "false")
        yield from (str(choice) for choice in choices(fields()[key].type))


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]
