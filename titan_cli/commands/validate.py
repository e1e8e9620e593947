"""`titan validate`: is this config, checkpoint or data sound, and how good is this checkpoint?"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import typer

from titan_cli.context import config_of, no_flags, output_of
from titan_cli.output import Output
from titan_core.runtime.errors import ConfigError

if TYPE_CHECKING:
    from titan_core.jobs.stages import Report

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    help="Check a config, a checkpoint or data; compare weights; measure a checkpoint's loss.",
    epilog="\b\nExamples:\n  titan validate config llama3_8b --world 64\n"
    "  titan validate checkpoint outputs/llama3_debugmodel\n"
    "  titan validate loss outputs/llama3_debugmodel --data embedded\n"
    "  titan validate parity Llama-3.1-8B weights/llama3_8b\n\n"
    "All checks run; the exit code is 1 if any fails.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def config(
    ctx: typer.Context,
    target: str = typer.Argument(..., metavar="RECIPE|FILE", help="Config to check."),
    world: int | None = typer.Option(None, min=1, help="Number of ranks to plan for."),
) -> None:
    """Check a config: keys and types, rules, layout, model, data."""
    from titan_core.jobs import validate_config as job

    try:
        resolved = config_of(ctx, target)
    except ConfigError as error:
        if not all(problem.key for problem in error.problems):  # no file, or not TOML: there is nothing to check
            raise
        report = job.unreadable(error.problems)
    else:
        report = job.run(resolved, world)
    _finish(output_of(ctx), report)


@app.command()
def checkpoint(
    ctx: typer.Context,
    path: str = typer.Argument(..., help="Run folder, checkpoint folder or step folder."),
    world: int | None = typer.Option(None, min=1, help="Number of ranks to resume on."),
) -> None:
    """Check a checkpoint: complete, undamaged, finite, resumable."""
    no_flags(ctx)
    from titan_core.jobs import validate as job

    _finish(output_of(ctx), job.checkpoint(path, world_size=world))


@app.command()
def data(
    ctx: typer.Context,
    target: str = typer.Argument(..., metavar="RECIPE|FILE", help="Config whose data to check."),
    samples: int = typer.Option(2, min=0, help="Decoded rows to show."),
) -> None:
    """Check a config's data: reachable, known tokens, rows without gaps."""
    resolved = config_of(ctx, target)
    from titan_core.jobs import validate as job

    report, decoded = job.data(resolved, samples=samples)
    if output_of(ctx).mode == "human":
        for number, text in enumerate(decoded):
            output_of(ctx).say(f"--- row {number}\n{text[:600]}")
    _finish(output_of(ctx), report, samples=decoded)


@app.command()
def loss(
    ctx: typer.Context,
    path: str = typer.Argument(..., metavar="CHECKPOINT", help="Run folder, checkpoint folder or step folder."),
    data: str = typer.Option("embedded", help="Data set name, or local files."),
    seq_len: int | None = typer.Option(None, min=1, help="Tokens a sequence; default: as trained."),
    batches: int = typer.Option(-1, help="Batches to read; -1: all."),
    batch_size: int = typer.Option(8, min=1, help="Sequences a batch."),
    text_key: str = typer.Option("text", help="Column that holds the text."),
    device: str | None = typer.Option(None, help="cpu or cuda."),
) -> None:
    """Measure loss, perplexity and bits per byte."""
    no_flags(ctx)
    from titan_cli.display import Display
    from titan_core.jobs import validate as job

    with Display(output_of(ctx)) as display:
        found = job.loss(
            path,
            data,
            seq_len=seq_len,
            batches=batches,
            batch_size=batch_size,
            text_key=text_key,
            device=device,
            listener=display,
        )
    text = (
        f"loss {found.loss:.4f}  perplexity {found.perplexity:.2f}  bits per byte {found.bits_per_byte:.4f}  "
        f"{found.tokens:,} tokens of {found.data}"
    )
    output_of(ctx).result(text, **dataclasses.asdict(found))


@app.command()
def parity(
    ctx: typer.Context,
    a: str = typer.Argument(..., metavar="A", help="Weights: a titan checkpoint, a Hugging Face or a Meta folder."),
    b: str = typer.Argument(..., metavar="B", help="Weights to compare them with."),
    tolerance: float = typer.Option(0.0, min=0.0, help="Largest difference, relative to a tensor's largest number."),
) -> None:
    """Compare two sets of weights of any format: names, shapes, numbers; logits where they are small."""
    no_flags(ctx)
    from titan_cli.display import Display
    from titan_core.jobs import parity as job

    with Display(output_of(ctx)) as display:
        report = job.run(a, b, tolerance=tolerance, listener=display)
    _finish(output_of(ctx), report)


def _finish(output: Output, report: Report, **more: object) -> None:
    """Show the stages and exit by them."""
    width = max(len(check.name) for check in report.checks)
    lines = []
    for number, check in enumerate(report.checks, 1):
        verdict = {True: "ok  ", False: "fail", None: "skip"}[check.ok]
        lines.append(f"[{number}/{len(report.checks)}] {check.name:<{width}}  {verdict}  {check.text}")
        indent = " " * (width + 14)
        if len(check.problems) > 1:
            for problem in check.problems:
                lines.append(indent + problem.message + (f" ({problem.where})" if problem.where else ""))
                lines += [f"{indent}  tip: {problem.tip}"] if problem.tip else []
        elif check.tip and not check.ok:
            lines.append(f"{indent}tip: {check.tip}")
    failed = sum(check.ok is False for check in report.checks)
    checks = [dataclasses.asdict(check) for check in report.checks]
    if report.ok:
        output.result("\n".join(lines), checks=checks, **more)
        return
    lines.append(f"{failed} of {len(report.checks)} checks failed")
    output.failed_checks("\n".join(lines), checks=checks, **more)
    raise typer.Exit(1)
