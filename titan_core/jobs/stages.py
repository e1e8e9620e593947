"""Staged checks: each runs even if one before it failed, unless it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from titan_core.runtime.errors import ConfigError, Problem, TitanError


@dataclass(frozen=True)
class Check:
    """One stage: its name, whether it holds (None: it was skipped), what was seen, and every problem if it fails."""

    name: str
    ok: bool | None
    text: str
    tip: str | None = None
    problems: tuple[Problem, ...] = ()


@dataclass
class Report:
    """All stages."""

    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Does none fail?"""
        return all(check.ok is not False for check in self.checks)

    def stage(self, name: str, work: Callable[[], str]) -> bool:
        """Run a stage; a `TitanError` in it is its failure."""
        try:
            self.checks.append(Check(name, True, work()))
        except KeyError as error:
            self.checks.append(Check(name, False, f"the checkpoint does not say its {error}"))
        except ConfigError as error:
            self.failed(name, error.problems)
        except TitanError as error:
            where = f" ({error.where})" if error.where else ""
            self.checks.append(Check(name, False, error.message + where, error.tip))
        return self.checks[-1].ok is True

    def failed(self, name: str, problems: list[Problem]) -> None:
        """Note a stage that fails with these problems."""
        if len(problems) > 1:
            self.checks.append(Check(name, False, f"{len(problems)} problems", problems=tuple(problems)))
            return
        where = f" ({problems[0].where})" if problems[0].where else ""
        self.checks.append(Check(name, False, problems[0].message + where, problems[0].tip, tuple(problems)))

    def skipped(self, name: str, why: str) -> None:
        """Note a stage that could not be run."""
        self.checks.append(Check(name, None, why))
