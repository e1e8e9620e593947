"""`titan data`: prepare data sets."""

from __future__ import annotations

import dataclasses

import typer

from titan_cli.context import config_of, output_of, words_of

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    help="Prepare data sets.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _group() -> None:
    """Prepare data sets."""


@app.command(
    name="encode-flux",
    epilog="\b\nExample:\n  titan data encode-flux flux_dev --out cc12m --samples 1000000 --nproc 8\n"
    "  titan train flux_dev --training.dataset_path cc12m --nproc 8\n\n"
    "Every config key is a flag; a call that was killed goes on when it is repeated.",
)
def encode_flux(
    ctx: typer.Context,
    target: str = typer.Argument(..., metavar="RECIPE|FILE", help="Recipe or TOML file: its data and its encoders."),
    out: str = typer.Option(..., metavar="DIR", help="Folder for what the encoders give."),
    samples: int | None = typer.Option(None, min=1, help="Take the first N samples; default: all."),
    samples_per_file: int = typer.Option(1024, min=1, help="Samples in each file."),
    validation: bool = typer.Option(False, "--validation", help="Encode the validation data instead."),
    nproc: str = typer.Option("1", metavar="N", help="Ranks to start, or `auto`: one a GPU."),
) -> None:
    """Run Flux's text encoders and autoencoder over a data set once; training then reads what they gave."""
    output = output_of(ctx)
    resolved = config_of(ctx, target)
    from titan_cli import launch, worker
    from titan_core.config.checks import check
    from titan_core.runtime.errors import ConfigError

    problems = check(resolved)
    if problems:
        raise ConfigError(problems)
    ranks = launch.Ranks.of(nproc)
    if ranks.must_spawn:
        raise typer.Exit(launch.spawn(ranks, 30, output, words_of(ctx)))
    from titan_cli.display import Display
    from titan_core.jobs import encode_flux as job

    with Display(output) as display, worker.worker_listener(display) as listener:
        done = job.run(
            resolved, out, samples=samples, per_file=samples_per_file, validation=validation, listener=listener
        )
    if worker.is_main_rank():
        left = f", {done.left_out} pictures left out" if done.left_out else ""
        text = f"{done.path}: {done.samples:,} samples in {done.files} files, {done.bytes / 1e9:.2f} GB{left}"
        output.result(text, **dataclasses.asdict(done))
