"""The errors a user can meet, each with a place, a remedy and an exit code.

Everything that a user, a file, a machine or a network can cause is a `TitanError`: the command line shows it as a
sentence and never as a traceback. `assert` is for our own invariants only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class TitanError(Exception):
    """A failure that can be explained to a person: what is wrong, where, and what to do."""

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, tip: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.tip = tip

    def __str__(self) -> str:
        where = f" ({self.where})" if self.where else ""
        tip = f"; {self.tip}" if self.tip else ""
        return f"{self.message}{where}{tip}"

    def __reduce__(self) -> Any:  # keeps `where` and `tip` when an error crosses a process boundary
        return _rebuild, (type(self), self.message, self.where, self.tip)


def _rebuild(cls: type[TitanError], message: str, where: str | None, tip: str | None) -> TitanError:
    error = cls.__new__(cls)
    TitanError.__init__(error, message, where=where, tip=tip)
    return error


class RunFailed(TitanError):
    """The command ran and failed, or its answer is no (exit code 1)."""


class CollectiveFailed(RunFailed):
    """Ranks waited for one that did not come, or did not agree; `where` names the report (exit code 1)."""


class CheckpointError(RunFailed):
    """A checkpoint cannot be read or written, or is not what it says it is (exit code 1)."""


class DataError(RunFailed):
    """A data set or tokenizer is missing, empty or unreadable (exit code 1)."""


class UsageError(TitanError):
    """The command line or the config is wrong; nothing was started (exit code 2)."""

    exit_code = 2


class MachineError(TitanError):
    """This machine lacks something: a device, a driver, an optional package (exit code 3)."""

    exit_code = 3


class RemoteError(TitanError):
    """A remote service refused or could not be reached (exit code 4)."""

    exit_code = 4


class Interrupted(TitanError):
    """Stopped by a signal with nothing saved (exit code 130 for SIGINT, 143 for SIGTERM)."""

    exit_code = 130


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a config: the dotted key, what is wrong with it, where it was set, what to do."""

    key: str
    message: str
    where: str | None = None
    tip: str | None = None


class ConfigError(UsageError):
    """Every problem of a config at once (exit code 2, nothing was started)."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        first = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(first.message + more, where=first.where, tip=first.tip)

    def __reduce__(self) -> Any:
        return ConfigError, (self.problems,)


def missing_extra(package: str, extra: str) -> MachineError:
    """Build the error for an optional dependency that is not installed, with the line that installs it."""
    return MachineError(
        f"this needs the package `{package}`, which is not installed",
        tip=f"pip install 'titan-pretrain[{extra}]'",
    )
