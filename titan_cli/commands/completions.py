"""`titan completions`: scripts for bash, zsh and fish."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import typer

from titan_cli.complete import SCRIPTS, install_path
from titan_cli.context import no_flags, output_of
from titan_core.runtime.errors import UsageError

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    help="Complete commands, config keys and recipes in the shell.",
    epilog="\b\nExamples:\n  titan completions install\n  titan completions show zsh > ~/.zfunc/_titan",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Shell = Literal["bash", "zsh", "fish"]


@app.command()
def show(ctx: typer.Context, shell: Shell = typer.Argument(..., help="bash, zsh or fish.")) -> None:
    """Print the completion script of a shell."""
    no_flags(ctx)
    output_of(ctx).result(SCRIPTS[shell].rstrip(), shell=shell, script=SCRIPTS[shell])


@app.command()
def install(
    ctx: typer.Context, shell: Shell | None = typer.Option(None, help="bash, zsh or fish; default: yours.")
) -> None:
    """Write the script to where the shell looks for it."""
    no_flags(ctx)
    chosen = shell or Path(os.environ.get("SHELL", "")).name
    if chosen not in SCRIPTS:
        raise UsageError(f"no completion for the shell `{chosen}`", tip="--shell bash, zsh or fish")
    path = install_path(chosen, Path.home())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SCRIPTS[chosen], encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write `{path}`: {error.strerror}") from None
    more = "; put `fpath+=~/.zfunc` before `compinit` in ~/.zshrc" if chosen == "zsh" else ""
    output_of(ctx).result(f"wrote {path}; open a new shell{more}", shell=chosen, path=str(path))
