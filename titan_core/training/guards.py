"""What to do with a step whose numbers are wrong."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from titan_core.config import schema

Verdict = Literal["go", "skip", "rollback", "stop"]
_RECENT = 50


@dataclass
class Guard:
    """Judges every step before its update, by the global loss and gradient norm; so all ranks judge alike.

    A spike is a loss above the running mean by `spike_factor` running deviations. Skipped steps and rollbacks are
    counted; more than `max_skips` of them stop the run. `recent` holds the last losses and norms, for the dump.

    Loss and norm are numbers on the host, so judging waits for the device once a step. It must be before the update:
    a NaN that has reached the weights cannot be skipped.
    """

    config: schema.Guard
    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    skipped: int = 0
    reason: str = ""
    recent: list[tuple[float, float]] = field(default_factory=list)

    def judge(self, loss: float, grad_norm: float) -> Verdict:
        """Return what to do with a step of this loss (nats) and gradient norm; `reason` then says why."""
        self.recent = [*self.recent[1 - _RECENT :], (loss, grad_norm)]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.reason = f"loss {loss:g}, gradient norm {grad_norm:g}"
            return self._act(self.config.non_finite)
        if self._is_spike(loss):
            self.reason = f"loss {loss:.4g} against a running mean of {self.mean:.4g}"
            verdict = "go" if self.config.spike == "ignore" else self._act(self.config.spike)
            if verdict != "go":
                return verdict
        self._remember(loss)
        return "go"

    def state_dict(self) -> dict[str, float]:
        """Return the running numbers."""
        return {"mean": self.mean, "variance": self.variance, "seen": self.seen, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back."""
        for name, value in state.items():
            setattr(self, name, value)

    def _is_spike(self, loss: float) -> bool:
        if self.seen < self.config.spike_window:
            return False
        return loss > self.mean + self.config.spike_factor * math.sqrt(self.variance)

    def _act(self, policy: str) -> Verdict:
        if policy == "stop":
            return "stop"
        self.skipped += 1
        if self.skipped > self.config.max_skips:
            self.reason += f"; more than guard.max_skips = {self.config.max_skips} steps went wrong"
            return "stop"
        return "skip" if policy == "skip" else "rollback"

    def _remember(self, loss: float) -> None:
        """Exponential mean and variance over about `spike_window` steps; plain averages until it is filled."""
        self.seen += 1
        share = 1.0 / min(self.seen, self.config.spike_window)
        difference = loss - self.mean
        self.mean += share * difference
        self.variance = (1 - share) * (self.variance + share * difference * difference)


def dump(folder: str, step: int, reason: str, norms: dict[str, float], rows: int, guard: Guard) -> str:
    """Write what is known of the step that stopped a run, and return the file, or why it could not be written.

    Gradient norms by parameter, not finite and largest first; where the data was; the last losses and norms, the
    step's own at the end. Numbers that are not finite are strings.
    """
    path = Path(folder) / f"stopped-at-step-{step}.json"
    worst = sorted(norms.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else -math.inf)
    settings = {**dataclasses.asdict(guard.config), **guard.state_dict()}
    content = {
        "step": step,
        "reason": reason,
        "first_row": rows,
        "guard": settings,
        "recent_losses": [_plain(loss) for loss, _ in guard.recent],
        "recent_grad_norms": [_plain(norm) for _, norm in guard.recent],
        "grad_norms": {name: _plain(value) for name, value in worst},
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, allow_nan=False))
    except OSError as failed:  # the step that went wrong is the news, not the disk
        return f"{path} could not be written: {failed.strerror}"
    return str(path)


def _plain(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
