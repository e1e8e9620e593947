"""The one place that writes: results to stdout, everything else to stderr; for people, for pipes, or as JSON."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TextIO

from titan_core.runtime.errors import ConfigError, Problem, TitanError

Mode = Literal["human", "json", "quiet"]
Color = Literal["auto", "always", "never"]
_STYLES = {"error": "1;31", "warning": "1;33", "tip": "36", "bold": "1", "dim": "2", "good": "32"}


class PipeClosed(Exception):
    """Whoever read our results has left (`titan ... | head`). Not an OSError, which Typer would end with code 1."""


@dataclass
class Output:
    """How this command speaks. One is made a command; `command` names its JSON schema.

    `relay` takes a result that another process prints: with several ranks, the one that started them.
    """

    command: str = "titan"
    mode: Mode = "human"
    color: Color = "auto"
    traceback: bool = False
    verbose: bool = False
    relay: Callable[[dict[str, Any]], None] | None = None
    began: float = field(default_factory=time.perf_counter)

    def result(self, text: str = "", **data: Any) -> None:
        """Give the command's result: `text` for people on stdout, `data` as the one JSON object."""
        if self.mode != "json":
            if text:
                self.write(text + "\n")
        elif self.relay is not None:
            self.relay(data)
        else:
            self._json(True, data)

    def failed_checks(self, text: str, **data: Any) -> None:
        """Give a result whose answer is no."""
        if self.mode == "json":
            self._json(False, data)
        else:
            self.write(text + "\n")

    def write(self, text: str) -> None:
        """Write to stdout as it is; raises `PipeClosed` when nobody reads it any more."""
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:
            raise PipeClosed from None

    def say(self, text: str) -> None:
        """Tell a person something, on stderr; silent with `--quiet` and `--json`."""
        if self.mode == "human":
            self.tell(text + "\n")

    def warn(self, text: str) -> None:
        """Warn, on stderr, whatever the mode."""
        self.tell(f"{self.style('warning:', 'warning')} {text}\n")

    def tell(self, text: str) -> None:
        """Write to stderr as it is. Without a reader it is lost: no work ends because a terminal or pager is gone."""
        with contextlib.suppress(OSError):
            if sys.stderr is not None:  # None: closed from the start; print would then write to stdout
                print(text, end="", file=sys.stderr, flush=True)

    def error(self, error: TitanError) -> None:
        """Show an error: what, where, what to do."""
        if self.mode == "json":
            self._json(False, {"error": error_as_dict(error)})
            return
        for problem in problems_of(error):
            self.tell(f"{self.style('error:', 'error')} {problem.message}\n")
            if problem.where:
                self.tell(f"  --> {problem.where}\n")
            if problem.tip:
                self.tell(f"  {self.style('tip:', 'tip')} {problem.tip}\n")

    def style(self, text: str, name: str, stream: TextIO | None = None) -> str:
        """Colour a text if the stream that it goes to may have colour; none given means stderr."""
        return f"\033[{_STYLES[name]}m{text}\033[0m" if self.colored(stream or sys.stderr) else text

    def colored(self, stream: TextIO | None) -> bool:
        """May this stream have colour? Flags first, then NO_COLOR and FORCE_COLOR, then what it is."""
        if self.color != "auto":
            return self.color == "always"
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return False
        return bool(os.environ.get("FORCE_COLOR")) or _is_terminal(stream)

    def live(self) -> bool:
        """May the display redraw itself?"""
        return self.mode == "human" and _is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"

    def _json(self, ok: bool, data: dict[str, Any]) -> None:
        import msgspec  # unlike json it writes NaN as null: JSON has no NaN

        schema = f"titan.{self.command.replace(' ', '-')}/1"
        envelope = {"schema": schema, "ok": ok, "seconds": round(time.perf_counter() - self.began, 3)}
        self.write(msgspec.json.encode({**envelope, **data}, enc_hook=str).decode() + "\n")


def problems_of(error: TitanError) -> list[Problem]:
    """Return every problem of a config error, or the one that any other error is."""
    return error.problems if isinstance(error, ConfigError) else [Problem("", error.message, error.where, error.tip)]


def error_as_dict(error: TitanError) -> dict[str, Any]:
    """Return an error as JSON has it."""
    found: dict[str, Any] = {
        "code": error.exit_code,
        "kind": type(error).__name__,
        "message": error.message,
        "where": error.where,
        "tip": error.tip,
    }
    if isinstance(error, ConfigError):
        found["problems"] = [vars(problem) for problem in error.problems]
    return found


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()
