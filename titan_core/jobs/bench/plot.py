"""The rows of a benchmark as a picture: one group of bars a case, one bar a backend."""

from __future__ import annotations

from pathlib import Path

from titan_core.jobs.bench.case import Row
from titan_core.jobs.bench.run import Report
from titan_core.runtime.errors import UsageError, missing_extra

_FORMATS = (".png", ".svg", ".pdf")


def check(out: str) -> None:
    """Refuse a file that could not be written, before anything is measured."""
    path = Path(out)
    if path.suffix not in _FORMATS:
        raise UsageError(f"`--plot` cannot be `{out}`", tip="a path that ends in .png, .svg or .pdf")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"`--plot {out}`: there is no folder `{path.parent}`", tip="make it, or name another one")
    try:
        import matplotlib  # noqa: F401 - asked for before an hour of measuring, not after it
    except ImportError:
        raise missing_extra("matplotlib", "plot") from None


def draw(report: Report, out: str) -> None:
    """Draw TFLOP/s, or GB/s of what multiplies nothing, and how much of the roofline the best backend reaches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    right = [row for row in report.rows if row.verdict == "right"]
    operations = list(dict.fromkeys(row.operation for row in right))
    if not operations:
        raise UsageError("nothing to draw: no backend was right", where="--plot")
    height = [len({(r.shape, r.part) for r in right if r.operation == name}) for name in operations]
    figure, panels = pyplot.subplots(
        len(operations),
        figsize=(8, 1.2 + 0.55 * sum(height) + 0.6 * len(height)),
        dpi=140,
        layout="constrained",
        squeeze=False,
        height_ratios=height,
    )
    for name, panel in zip(operations, panels[:, 0], strict=True):
        _panel(panel, name, [row for row in right if row.operation == name])
    figure.suptitle(report.device + (", reduced shapes" if report.reduced else ""), fontsize=9)
    try:
        figure.savefig(out)
    except OSError as error:
        raise UsageError(f"cannot write `{out}`: {error}", where="--plot") from None
    finally:
        pyplot.close(figure)


def _panel(panel, name: str, rows: list[Row]) -> None:
    cases = list(dict.fromkeys((row.shape, row.part) for row in rows))
    backends = list(dict.fromkeys(row.backend for row in rows))
    flops = all(row.tflops is not None for row in rows)
    thick = 0.8 / len(backends)
    for number, backend in enumerate(backends):
        found = {(row.shape, row.part): row for row in rows if row.backend == backend}
        places = [at + number * thick for at, case in enumerate(cases) if case in found]
        shown = [found[case] for case in cases if case in found]
        values = [row.tflops if flops else row.gigabytes_per_second for row in shown]
        bars = panel.barh(places, values, thick * 0.9, label=backend)
        shares = ["" if row.roofline is None else f"{row.roofline:.0%}" for row in shown]
        panel.bar_label(bars, shares, fontsize=6, padding=2)
    panel.set_yticks([at + 0.4 - thick / 2 for at in range(len(cases))], [" ".join(case) for case in cases], fontsize=7)
    panel.set_xlabel(("TFLOP/s" if flops else "GB/s") + "; % of the measured roofline", fontsize=7)
    panel.set_title(name, fontsize=8, loc="left")
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=6)
