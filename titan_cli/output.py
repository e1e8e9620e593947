"""The one place that writes: results to stdout, everything else to stderr; for people, for pipes, or as JSON."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from titan_core.runtime.errors import ConfigError, Problem, TitanError

Mode = Literal["human", "json", "quiet"]
Color = Literal["auto", "always", "never"]
_STYLES = {"error": "1;31", "warning": "1;33", "tip": "36", "bold": "1", "dim": "2", "good": "32"}


@dataclass
class Output:
    """How this command speaks. One is made a command; `command` names its JSON schema."""

    command: str = "titan"
    mode: Mode = "human"
    color: Color = "auto"
    traceback: bool = False
    verbose: bool = False
    began: float = field(default_factory=time.perf_counter)

    def result(self, text: str = "", **data: Any) -> None:
        """Give the command's result: `text` for people on stdout, `data` as the one JSON object."""
        if self.mode == "json":
            self._json(True, data)
        elif text:
            print(text, flush=True)

    def failed_checks(self, text: str, **data: Any) -> None:
        """Give a result whose answer is no."""
        if self.mode == "json":
            self._json(False, data)
        else:
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Tell a person something, on stderr; silent with `--quiet` and `--json`."""
        if self.mode == "human":
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Warn, on stderr, whatever the mode."""
        print(f"{self.style('warning:', 'warning')} {text}", file=sys.stderr, flush=True)

    def error(self, error: TitanError) -> None:
        """Show an error: what, where, what to do."""
        if self.mode == "json":
            self._json(False, {"error": error_as_dict(error)})
            return
        problems = error.problems if isinstance(error, ConfigError) else [_problem(error)]
        for problem in problems:
            print(f"{self.style('error:', 'error')} {problem.message}", file=sys.stderr)
            if problem.where:
                print(f"  --> {problem.where}", file=sys.stderr)
            if problem.tip:
                print(f"  {self.style('tip:', 'tip')} {problem.tip}", file=sys.stderr)
        sys.stderr.flush()

    def style(self, text: str, name: str, stream: IO[str] | None = None) -> str:
        """Colour a text if the stream that it goes to may have colour."""
        return f"\033[{_STYLES[name]}m{text}\033[0m" if self.colored(stream or sys.stderr) else text

    def colored(self, stream: IO[str]) -> bool:
        """May this stream have colour? Flags first, then NO_COLOR and FORCE_COLOR, then what it is."""
        if self.color != "auto":
            return self.color == "always"
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return False
        return bool(os.environ.get("FORCE_COLOR")) or stream.isatty()

    def live(self) -> bool:
        """May the display redraw itself?"""
        return self.mode == "human" and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def _json(self, ok: bool, data: dict[str, Any]) -> None:
        import json

        seconds = round(time.perf_counter() - self.began, 3)
        envelope = {"schema": f"titan.{self.command.replace(' ', '-')}/1", "ok": ok, "seconds": seconds}
        print(json.dumps({**envelope, **data}, default=str), flush=True)


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


def _problem(error: TitanError) -> Problem:
    return Problem("", error.message, error.where, error.tip)
