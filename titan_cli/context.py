"""What every command needs: the output, the config flags, and loading a config with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from titan_cli.output import Output
from titan_cli.overrides import Flags
from titan_core.runtime.errors import UsageError

if TYPE_CHECKING:
    from titan_core.config.load import Resolved


@dataclass
class State:
    """One call of the command line: its words as typed, how it speaks, its config flags, the config once it is read."""

    words: list[str]
    output: Output
    flags: Flags = field(default_factory=list)
    resolved: Resolved | None = None


def output_of(ctx: Any) -> Output:
    """Return the command's output, which now knows the command's whole name."""
    output = ctx.obj.output
    output.command = ctx.command_path.removeprefix("titan ")
    return output


def flags_of(ctx: Any) -> Flags:
    """Return the config flags of the command line."""
    return ctx.obj.flags


def words_of(ctx: Any) -> list[str]:
    """Return the command line as it was typed, without the program's name."""
    return ctx.obj.words


def config_of(ctx: Any, target: str | None) -> Resolved:
    """Load a recipe or file with the command line's config flags."""
    from titan_core.config.load import load  # not for the commands that read no config

    output = output_of(ctx)
    resolved = ctx.obj.resolved = load(target, flags_of(ctx))
    if output.verbose:
        from titan_core.config.fields import get
        from titan_core.config.values import toml_value

        for key, source in resolved.sources.items():
            output.say(f"{'set':<10}{key} = {toml_value(get(resolved.config, key))}  # {source.where}")
    return resolved


def no_flags(ctx: Any) -> None:
    """Refuse config flags where a command has no config."""
    output_of(ctx)
    flags = flags_of(ctx)
    if flags:
        raise UsageError(f"this command takes no config flag `--{flags[0][0]}`")
