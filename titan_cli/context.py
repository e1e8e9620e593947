"""What every command needs: the output, the config flags, and loading a config with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from titan_cli.output import Output
from titan_cli.overrides import Flags
from titan_core.runtime.errors import UsageError

if TYPE_CHECKING:
    from titan_core.config.load import Resolved


def output_of(ctx: Any) -> Output:
    """Return the command's output."""
    return ctx.obj["output"]


def flags_of(ctx: Any) -> Flags:
    """Return the config flags of the command line."""
    return ctx.obj["flags"]


def config_of(ctx: Any, target: str | None) -> Resolved:
    """Load a recipe or file with the command line's config flags."""
    from titan_core.config.load import load

    return load(target, flags_of(ctx))


def no_flags(ctx: Any) -> None:
    """Refuse config flags where a command has no config."""
    flags = flags_of(ctx)
    if flags:
        raise UsageError(f"this command takes no config flag `--{flags[0][0]}`")
