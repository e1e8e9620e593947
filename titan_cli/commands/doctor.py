"""`titan doctor`: is this machine ready? And why did the ranks of a run wait for each other?"""

from __future__ import annotations

import dataclasses
import sys

import typer

from titan_cli.context import no_flags, output_of
from titan_cli.output import Output

app = typer.Typer(rich_markup_mode=None, add_completion=False)
EPILOG = "\b\nExamples:\n  titan doctor\n  titan doctor --json > report.json\n  titan doctor --traces outputs/my_run"


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def doctor(
    ctx: typer.Context,
    folder: str = typer.Option("outputs", help="Where runs will be written."),
    traces: str | None = typer.Option(
        None, metavar="FOLDER", help="Say instead why a run's collective failed: the run's folder, or its traces'."
    ),
) -> None:
    """Say what this machine can do and what is wrong; exit code 3 if it cannot train."""
    no_flags(ctx)
    output = output_of(ctx)
    if traces is not None:
        _explain(output, traces)
        return
    from titan_core.jobs import doctor as job

    findings = job.run(folder)
    width = max(len(finding.name) for finding in findings)
    styles = {"ok": "good", "missing": "dim", "wrong": "error"}
    lines = []
    for finding in findings:
        state = output.style(f"{finding.state:<7}", styles[finding.state], sys.stdout)
        tip = f"  ({finding.tip})" if finding.tip else ""
        lines.append(f"{finding.name:<{width}}  {state}  {finding.text}{tip}")
    data = {"findings": [dataclasses.asdict(finding) for finding in findings]}
    if job.can_train(findings):
        output.result("\n".join(lines), **data)
        return
    output.failed_checks("\n".join(lines), **data)
    raise typer.Exit(3)


def _explain(output: Output, folder: str) -> None:
    """Print what the traces of a run's ranks say, as the run itself wrote it into its report."""
    from titan_core.runtime.hang_report import explain
    from titan_core.runtime.traces import find_folder, read_folder

    place = find_folder(folder)
    report = explain(read_folder(place))
    output.result(report.text.rstrip("\n"), folder=str(place), **report.as_dict())
