"""The command tree, bound lazily, and the one place where errors become messages and exit codes.

Importing this module, showing help and completing words never import torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import traceback
from typing import Any, cast

import typer
import typer.core

from titan_cli import overrides
from titan_cli.context import State
from titan_cli.output import Color, Output, PipeClosed
from titan_core.runtime.errors import Interrupted, TitanError, UsageError

COMPLETE = "_TITAN_COMPLETE"  # set by a shell's completion script
EVENT_FD = "TITAN_EVENT_FD"  # as in titan_cli.worker, which costs an import

# name -> (module, one line of help). The module holds a Typer `app`, and is imported when its command is used.
COMMANDS = {
    "train": ("titan_cli.commands.train", "Train or resume a model"),
    "download": ("titan_cli.commands.download", "Fetch weights and tokenizers from Hugging Face"),
    "convert": ("titan_cli.commands.convert", "Convert weights: Hugging Face, Meta, Black Forest Labs, DCP"),
    "data": ("titan_cli.commands.data", "Prepare data sets"),
    "validate": ("titan_cli.commands.validate", "Check a config, checkpoint or data; measure loss"),
    "config": ("titan_cli.commands.config", "Show, compare and explain configs"),
    "generate": ("titan_cli.commands.generate", "Generate text or images with a trained model"),
    "estimate-flops": ("titan_cli.commands.estimate_flops", "FLOPs, memory and time of a run, before it is paid for"),
    "bench": ("titan_cli.commands.bench", "Measure kernels, collectives, steps and saves"),
    "bench-kernels": ("titan_cli.commands.bench", "The same as bench"),
    "plot": ("titan_cli.commands.plot", "Draw the loss curves of runs"),
    "doctor": ("titan_cli.commands.doctor", "Is this machine ready?"),
    "completions": ("titan_cli.commands.completions", "Complete words in bash, zsh and fish"),
}

EPILOG = """\b
Options that every command takes, wherever they stand:
  --json                       one JSON object on stdout, and nothing else there
  -q, --quiet                  only results, warnings and errors
  -v, --verbose                what was set and where, and what the libraries log
  --color auto|always|never    colour; NO_COLOR and FORCE_COLOR are respected
  --traceback                  the traceback of an error

\b
Examples:
  titan train                          the smallest Llama, on text that is on this machine
  titan train llama3_8b --nproc 8      a recipe on eight GPUs
  titan config show llama3_8b --why    every value and where it comes from"""


class LazyGroup(typer.core.TyperGroup):
    """Commands in our order, each imported when it is used; group help needs their one-line help only."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of the table."""
        return list(COMMANDS)

    def one_line_helps(self) -> dict[str, str]:
        """Return every command with its one line of help, without importing it."""
        return {name: text for name, (_, text) in COMMANDS.items()}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command and return it, None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        target, help_text = COMMANDS[cmd_name]
        command = typer.main.get_command(importlib.import_module(target).app)
        command.name = cmd_name
        command.help = command.help or help_text
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands into the help from the table: nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self.one_line_helps().items()))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the words name; a misspelt one is answered with the nearest."""
        if not args[0].startswith("-") and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1, cutoff=0.5)
            tip = f"did you mean `{near[0]}`?" if near else "`titan --help` lists the commands"
            raise UsageError(f"no such command `{args[0]}`", tip=tip)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Typer would turn Ctrl-C into an exit code without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None


app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=False,
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback()
def _root(
    ctx: typer.Context,
    show_version: bool = typer.Option(False, "--version", help="Show the version and stop."),
) -> None:
    """Pre-train language, vision-language and text-to-image models, from a laptop's CPU to thousands of GPUs."""
    if show_version:
        from titan_core.runtime.version import titan_version  # costs 20 ms

        version = titan_version()
        ctx.obj.output.result(f"titan {version}", version=version)
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
    state = State(list(argv), Output())
    if EVENT_FD not in os.environ:
        return _run(state)
    from titan_cli import worker

    worker.stop_when_orphaned()
    state.output.relay = lambda data: worker.tell_parent(result=data)
    code = _run(state)
    worker.tell_parent(done=code)
    return code


def _run(state: State) -> int:
    try:
        divided = overrides.split(take_global_options(state.words, state.output))
        state.flags = divided.flags
        if state.output.verbose:
            import logging

            logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
        # without Typer's standalone mode errors and exit codes are ours
        code = typer.main.get_command(app).main(args=divided.words, prog_name="titan", standalone_mode=False, obj=state)
        return code if isinstance(code, int) else 0
    except TitanError as error:
        return _show(error, state.output, error)
    except KeyboardInterrupt as error:
        return _show(Interrupted("interrupted"), state.output, error)
    except (PipeClosed, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains when it flushes stdout at its end
        return 0
    except Exception as error:
        return _other(error, state)


def _show(error: TitanError, output: Output, cause: BaseException) -> int:
    """Show an error, or send it to the parent that shows one for all ranks."""
    trace = "".join(traceback.format_exception(cause)) if output.traceback else None
    if EVENT_FD in os.environ:
        from titan_cli import worker

        worker.report_error(error, trace)
        return error.exit_code
    if trace is not None:
        output.tell(trace)
    output.error(error)
    return error.exit_code


def take_global_options(argv: list[str], output: Output) -> list[str]:
    """Take the options that every command has out of the words, wherever they stand, and return the other words."""
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
                raise UsageError(f"`--color` cannot be `{value}`", tip="one of auto, always, never")
            output.color = cast(Color, value)
        else:
            rest.append(word)
    output.command = rest[0] if rest and rest[0] in COMMANDS else "titan"
    return rest


def _other(error: Exception, state: State) -> int:
    """Deal with Typer's own errors, and with what nobody expected."""
    if hasattr(error, "format_message"):  # a usage error of Typer's vendored Click
        return _show(_usage_error(error), state.output, error)
    exit_code = getattr(error, "exit_code", None)
    if isinstance(exit_code, int):
        return exit_code
    if type(error).__name__ == "Abort":
        return _show(Interrupted("interrupted"), state.output, error)
    from titan_cli.report import write_report

    unexpected = TitanError(
        f"something unexpected went wrong: {type(error).__name__}: {error}",
        where=write_report(error, state),
        tip="the file above has the details; run again with `--traceback` to see them here",
    )
    return _show(unexpected, state.output, error)


def _usage_error(error: Any) -> UsageError:
    """Say a usage error of Typer's in our words: what it suggests becomes the tip."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "titan"
    message = error.format_message().strip().rstrip(".")
    message = message[:1].lower() + message[1:]
    message = message.replace("int range", "integer").replace("float range", "number")
    found = re.search(r"[ .]*\(Possible options?: (.+)\)$|[ .]*Did you mean '?([^',?]+)'?.*$", message)
    if found is None:
        return UsageError(message, tip=f"`{where} --help` shows what it takes")
    near = (found.group(1) or found.group(2)).split(", ")  # in the order of the alphabet
    nearest = difflib.get_close_matches(str(getattr(error, "option_name", "")), near, n=1, cutoff=0.0)[0]
    return UsageError(message[: found.start()], tip=f"did you mean `{nearest}`?")
