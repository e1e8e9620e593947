"""`titan plot`: the loss curves of runs, from their metrics files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from titan_core.runtime.errors import UsageError, missing_extra


@dataclass(frozen=True)
class Curve:
    """One run: loss by step, and validation loss by step."""

    name: str
    steps: list[int]
    losses: list[float]
    validated_steps: list[int]
    validated_losses: list[float]


def run(folders: Sequence[str], out: str) -> list[Curve]:
    """Draw the curves of runs into a PNG, SVG or PDF file, by its ending."""
    try:
        import matplotlib
    except ImportError:
        raise missing_extra("matplotlib", "plot") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = [read_curve(folder) for folder in folders]
    figure, axes = pyplot.subplots(figsize=(7.5, 3.6), dpi=140, layout="constrained")
    for curve in curves:
        (line,) = axes.plot(curve.steps, curve.losses, linewidth=1.6, label=curve.name)
        if curve.validated_steps:
            label = f"{curve.name}, held-out"
            axes.plot(curve.validated_steps, curve.validated_losses, "o--", ms=3.5, color=line.get_color(), label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot write `{out}`: {error}", where="--out", tip="a path ending in .png, .svg or .pdf"
        ) from None
    finally:
        pyplot.close(figure)
    return curves


def read_curve(folder: str) -> Curve:
    """Read a run's metrics; where a step was done twice the last counts."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise UsageError(f"`{folder}` is not a run folder: it has no metrics.jsonl")
    losses: dict[int, float] = {}
    validated: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the line in which a run was killed
        kept = {"stepdone": losses, "validated": validated}.get(record["event"])
        if kept is not None:
            kept[record["step"]] = record["loss"]
    if not losses:
        raise UsageError(f"`{path}` holds no steps yet")
    steps, held_out = sorted(losses), sorted(validated)
    return Curve(Path(folder).name, steps, [losses[s] for s in steps], held_out, [validated[s] for s in held_out])
