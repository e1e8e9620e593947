"""The command tree, bound lazily, and the one place where errors become messages and exit codes.

Importing this module, showing help and completing words never import torch.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

import typer
import typer.core

from titan_cli import overrides
from titan_cli.output import Output
from titan_core.runtime.errors import Interrupted, TitanError

COMPLETE = "_TITAN_COMPLETE"  # set by a shell's completion script
EVENT_FD = "TITAN_EVENT_FD"  # set in the environment of a rank that `titan_cli.launch` started

# name -> (module, one line of help). The module holds a Typer `app`, and is imported when its command is used.
COMMANDS = {
    "train": ("titan_cli.commands.train", "Train or resume a model"),
    "validate": ("titan_cli.commands.validate", "Check a config, checkpoint or data; measure loss"),
    "config": ("titan_cli.commands.config", "Show, compare and explain configs"),
    "generate": ("titan_cli.commands.generate", "Generate text with a trained model"),
    "bench": ("titan_cli.commands.bench", "Measure speed beside other programs"),
    "plot": ("titan_cli.commands.plot", "Draw the loss curves of runs"),
    "doctor": ("titan_cli.commands.doctor", "Is this machine ready?"),
    "completions": ("titan_cli.commands.completions", "Complete words in bash, zsh and fish"),
}

EPILOG = """\b
Examples:
  titan train                                    the smallest Llama, on text that is on this machine
  titan train llama3_8b --nproc 8                a recipe on eight GPUs
  titan config show llama3_8b --why              every value and where it comes from"""


class LazyGroup(typer.core.TyperGroup):
    """Commands in our order, each imported when it is used; group help needs their one-line help only."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command itself if it is the one being run, else a stub that carries its help."""
        if cmd_name not in COMMANDS:
            return None
        target, help_text = COMMANDS[cmd_name]
        if cmd_name in sys.argv[1:] or (ctx is not None and cmd_name in ctx.args):
            command = typer.main.get_command(importlib.import_module(target).app)
            command.name = cmd_name
            command.help = command.help or help_text
            return command
        return typer.core.TyperCommand(cmd_name, help=help_text, callback=lambda: None)


app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=False,
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    ctx: typer.Context,
    show_version: bool = typer.Option(False, "--version", help="Show the version and stop."),
) -> None:
    """Pre-train language, vision-language and text-to-image models, from a laptop's CPU to thousands of GPUs."""
    if show_version:
        from importlib.metadata import version  # costs 20 ms

        print(f"titan {version('titan-pretrain')}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(0)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    words = sys.argv[1:] if argv is None else argv
    if COMPLETE in os.environ:
        from titan_cli.complete import answer

        print(answer(words, typer.main.get_command(app)))
        return
    sys.exit(run(words))


def run(argv: list[str]) -> int:
    """Run the command line and return its exit code; a worker also tells its parent how it ended."""
    rest, output = take_global_options(argv)
    if EVENT_FD not in os.environ:
        return _run(rest, output)
    from titan_cli import launch

    code = _run(rest, output)
    launch.tell_parent(done=code)
    return code


def _run(words: list[str], output: Output) -> int:
    divided = overrides.split(words)
    state = {"output": output, "flags": divided.flags}
    try:
        # without Typer's standalone mode errors and exit codes are ours
        code = typer.main.get_command(app).main(args=divided.words, prog_name="titan", standalone_mode=False, obj=state)
        return code if isinstance(code, int) else 0
    except TitanError as error:
        if output.traceback:
            traceback.print_exc()
        return _show(error, output)
    except KeyboardInterrupt:
        return _show(Interrupted("interrupted"), output)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _other(error, output)


def _show(error: TitanError, output: Output) -> int:
    """Show an error, or send it to the parent that shows one for all ranks."""
    if EVENT_FD in os.environ:
        from titan_cli import launch

        launch.report_error(error)
    else:
        output.error(error)
    return error.exit_code


def take_global_options(argv: list[str]) -> tuple[list[str], Output]:
    """Take the options that every command has out of the words, wherever they stand."""
    output = Output()
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == "--json":
            output.mode = "json"
        elif word in ("-q", "--quiet"):
            output.mode = "quiet"
        elif word in ("-v", "--verbose"):
            output.verbose = True
        elif word == "--traceback":
            output.traceback = True
        elif word == "--color" or word.startswith("--color="):
            value = word.partition("=")[2] or next(words, "")
            if value not in ("auto", "always", "never"):
                from titan_core.runtime.errors import UsageError

                error = UsageError(f"`--color` cannot be `{value}`", tip="one of auto, always, never")
                output.error(error)
                sys.exit(error.exit_code)
            output.color = value  # pyright: ignore[reportAttributeAccessIssue]
        else:
            rest.append(word)
    output.command = rest[0] if rest and not rest[0].startswith("-") else "titan"
    return rest, output


def _other(error: Exception, output: Output) -> int:
    """Deal with Typer's own errors, and with what nobody expected."""
    from titan_core.runtime.errors import UsageError

    format_message = getattr(error, "format_message", None)
    if format_message is not None:  # a usage error of Typer's vendored Click
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "titan"
        return _show(UsageError(_lower(format_message()), tip=f"`{where} --help` shows what it takes"), output)
    exit_code = getattr(error, "exit_code", None)
    if isinstance(exit_code, int):
        return exit_code
    if type(error).__name__ == "Abort":
        return Interrupted.exit_code
    if output.traceback:
        traceback.print_exception(error)
    from titan_cli.report import write_report

    unexpected = TitanError(
        f"something unexpected went wrong: {type(error).__name__}: {error}",
        where=write_report(error),
        tip="the file above has the details; run again with `--traceback` to see them here",
    )
    return _show(unexpected, output)


def _lower(message: str) -> str:
    message = message.strip().rstrip(".")
    return message[:1].lower() + message[1:]
