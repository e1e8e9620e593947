"""`titan doctor`: is this machine ready?"""

from __future__ import annotations

import dataclasses
import sys

import typer

from titan_cli.context import no_flags, output_of

app = typer.Typer(rich_markup_mode=None, add_completion=False)
EPILOG = "\b\nExamples:\n  titan doctor\n  titan doctor --json > report.json"


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def doctor(
    ctx: typer.Context,
    folder: str = typer.Option("outputs", help="Where runs will be written."),
) -> None:
    """Say what this machine can do and what is wrong; exit code 3 if it cannot train."""
    no_flags(ctx)
    output = output_of(ctx)
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
