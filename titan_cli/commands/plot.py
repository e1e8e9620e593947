"""`titan plot`: loss curves."""

from __future__ import annotations

import dataclasses

import typer

from titan_cli.context import no_flags, output_of

app = typer.Typer(rich_markup_mode=None, add_completion=False)
EPILOG = "\b\nExample:\n  titan plot outputs/llama3_debugmodel --out loss.png"


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def plot(
    ctx: typer.Context,
    runs: list[str] = typer.Argument(..., metavar="RUN...", help="Run folders."),
    out: str = typer.Option("loss.png", help="File to write; its ending is its format."),
) -> None:
    """Draw the loss curves of runs into one picture."""
    no_flags(ctx)
    from titan_core.jobs import plot as job

    curves = job.run(runs, out)
    lines = [f"{c.name}: loss {c.losses[0]:.4f} -> {c.losses[-1]:.4f} in {c.steps[-1]} steps" for c in curves]
    output_of(ctx).result("\n".join([*lines, f"wrote {out}"]), out=out, curves=[dataclasses.asdict(c) for c in curves])
