"""Completion in the shell: commands, options, config keys and their values, recipes.

The shell's script calls `titan` with `_TITAN_COMPLETE` set and the words so far, the one being typed last; every line
that comes back is a candidate, a tab, and its help. No torch is loaded on the way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

VARIABLE = "_TITAN_COMPLETE"
_WITH_CONFIG = {
    ("train",),
    ("estimate-flops",),
    ("config", "show"),
    ("validate", "config"),
    ("validate", "data"),
    ("data", "encode-flux"),
}
_WITH_RECIPE = _WITH_CONFIG | {("config", "diff")}
_COLORS = ("auto", "always", "never")
_WORDS = {"--resume": ("auto", "never"), "--nproc": ("auto",), "--device": ("cpu", "cuda")}
_GLOBAL = {
    "--help": "Show what a command takes.",
    "--json": "One JSON object on stdout.",
    "--quiet": "Only results and errors.",
    "--verbose": "What was set and where.",
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
# the first completion runs this file as the function, later ones the function that it defines
if [[ "${funcstack[1]}" == "_titan" ]]; then _titan "$@"; else compdef _titan titan; fi
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
    """Return (value, help) for the word being typed after complete `words`; none at all means files."""
    words = [word for word in words if word != "="]  # bash makes three words of `--key=value`
    typed = "" if typed == "=" else typed
    path, command = _command(words, root)
    if command is None:
        return []
    option, equals, begun = typed.partition("=")
    if equals and option.startswith("--"):
        values = _values(option, path, command) or {}
        return [(f"{option}={value}", text) for value, text in values.items() if value.startswith(begun)]
    if typed.startswith("-"):
        return _beginning(typed, _options(path, command))
    values = _values(words[-1], path, command) if words and words[-1].startswith("--") else None
    return _beginning(typed, _positional(path, command) if values is None else values)


def _positional(path: tuple[str, ...], command: Any) -> dict[str, str]:
    """Return what may stand next without an option: commands, recipes, keys, shells."""
    if hasattr(command, "list_commands"):
        helps = getattr(command, "one_line_helps", None)  # of the root: nothing is imported for it
        if helps is not None:
            return helps()
        return {name: _first_line(command.get_command(None, name).help) for name in command.list_commands(None)}
    if path in _WITH_RECIPE:
        from titan_core.config.catalog import describe, recipes

        return {name: describe(file) for name, file in recipes().items()}
    if path in (("config", "explain"), ("config", "list")):
        return {name[2:]: text for name, text in _keys().items()}
    return next((found for parameter in command.params if (found := _choices(parameter)) and not _named(parameter)), {})


def _values(option: str, path: tuple[str, ...], command: Any) -> dict[str, str] | None:
    """Return the values that an option takes: none if they cannot be listed, None if it takes no value."""
    from titan_core.config.fields import fields
    from titan_core.config.values import choices

    key = option[2:].replace("-", "_")
    if option in _GLOBAL:
        return dict.fromkeys(_COLORS, "") if option == "--color" else None
    if path in _WITH_CONFIG and key in fields():
        listed = ("true", "false") if fields()[key].type is bool else choices(fields()[key].type)
        return {str(value): "" for value in listed}
    if path in _WITH_CONFIG and option == "--run":
        return {}
    for parameter in command.params:
        if option in parameter.opts:
            if getattr(parameter, "is_flag", False):
                return None
            if option == "--allow-change":
                return {name[2:]: text for name, text in _keys().items()}
            return dict.fromkeys(_WORDS.get(option, ()), "") or _choices(parameter)
    return None


def _beginning(typed: str, found: dict[str, str]) -> list[tuple[str, str]]:
    return [(value, text) for value, text in found.items() if value.startswith(typed)]


def _command(words: list[str], root: Any) -> tuple[tuple[str, ...], Any]:
    """Walk down the tree along the words; the command is None if a word names none."""
    path: tuple[str, ...] = ()
    command = root
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("-") or before == "--color":
            continue
        if not hasattr(command, "list_commands"):
            break
        command = command.get_command(None, word)
        path = (*path, word)
        if command is None:
            break
    return path, command


def _options(path: tuple[str, ...], command: Any) -> dict[str, str]:
    found = {
        name: _first_line(getattr(parameter, "help", None))
        for parameter in command.params
        for name in _named(parameter)
    }
    if path in _WITH_CONFIG:
        found |= {"--run": "Folder of the run: short for --job.dump_folder.", **_keys()}
    return found | _GLOBAL


def _named(parameter: Any) -> list[str]:
    """Return the option's long names; none for a positional argument."""
    return [name for name in parameter.opts if name.startswith("--")]


def _choices(parameter: Any) -> dict[str, str]:
    return {str(choice): "" for choice in getattr(parameter.type, "choices", ())}


def _keys() -> dict[str, str]:
    from titan_core.config.fields import fields

    return {f"--{key}": field.help for key, field in fields().items()}


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]
