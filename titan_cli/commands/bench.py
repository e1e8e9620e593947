"""`titan bench`: how fast, and beside whom. The kernels' commands are in `bench_kernels`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import typer

from titan_cli.commands import bench_kernels
from titan_cli.context import no_flags, output_of
from titan_core.runtime.errors import UsageError

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    help="Measure kernels, collectives, training steps and saves, beside other programs.",
    epilog="\b\nExamples:\n  titan bench moe-gemm --shapes deepseek-v3\n  titan bench all --json > bench.json\n"
    "  titan bench train --peer transformers=/path/to/venv/bin/python\n\n"
    "Every kernel is compared with an fp64 reference first; what is wrong is never timed.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _group() -> None:
    """Measure speed beside other programs."""


for _name, (_function, _example) in bench_kernels.COMMANDS.items():
    app.command(_name, epilog=f"\b\nExample:\n  {_example}")(_function)


@app.command(
    epilog="\b\nExamples:\n  titan bench train\n"
    "  titan bench train --peer litgpt=envs/litgpt/bin/python --peer torchtitan=envs/torchtitan/bin/python"
)
def train(
    ctx: typer.Context,
    peer: list[str] = typer.Option(
        [], metavar="NAME=PYTHON", help="transformers, litgpt or torchtitan, and its Python."
    ),
    steps: int = typer.Option(5, min=2, help="Steps a run; the first is reported apart."),
    rounds: int = typer.Option(2, min=1, help="Runs of each, in turn."),
) -> None:
    """Train a 58M-parameter Llama on the CPU: CPU time and wall time a step, first step, peak memory."""
    no_flags(ctx)
    output = output_of(ctx)
    peers = dict(_split(item) for item in peer)
    from titan_cli.display import Display
    from titan_core.jobs import bench_train as job

    with Display(output) as display:
        rows = job.run(peers, steps=steps, rounds=rounds, listener=display)
    own = rows[0]["cpu_seconds"]
    lines = [
        f"{'':<14}{'CPU-s/step':>11}{'min':>8}{'max':>8}{'wall s':>8}{'first s':>9}{'peak GB':>9}{'loss':>8}  ratio"
    ]
    for row in rows:
        loss = "" if row["last_loss"] is None else f"{row['last_loss']:.3f}"
        lines.append(
            f"{row['name']:<14}{row['cpu_seconds']:>11.2f}{row['cpu_seconds_min']:>8.2f}{row['cpu_seconds_max']:>8.2f}"
            f"{row['wall_seconds']:>8.2f}{row['first_step_seconds']:>9.2f}{row['peak_gigabytes']:>9.2f}{loss:>8}"
            f"  {row['cpu_seconds'] / own:.2f}x"
        )
    output.result("\n".join(lines), rows=rows)


@app.command(epilog="\b\nExample:\n  titan bench save")
def save(
    ctx: typer.Context,
    rounds: int = typer.Option(3, min=1, help="Saves of each, in turn."),
) -> None:
    """Save 0.7 GB in the background: how long the training thread stands still, beside torch's async_save."""
    no_flags(ctx)
    from titan_core.jobs import bench_save as job

    rows = job.run(rounds=rounds)
    lines = [f"{'':<16}{'call ms':>10}{'wait ms':>10}{'save s':>9}"]
    lines += [
        f"{row.name:<16}{1000 * row.call_seconds:>10.1f}{1000 * row.wait_seconds:>10.1f}{row.total_seconds:>9.2f}"
        for row in rows
    ]
    output_of(ctx).result("\n".join(lines), rows=[dataclasses.asdict(row) for row in rows])


@app.command(epilog="\b\nExample:\n  titan bench convert --gigabytes 8 --folder /scratch")
def convert(
    ctx: typer.Context,
    gigabytes: float = typer.Option(1.0, min=0.1, help="Size of the weights; twice that is needed on the disk."),
    rounds: int = typer.Option(3, min=1, help="Runs of each, in turn."),
    folder: str | None = typer.Option(None, metavar="DIR", help="Where to write; default: the temporary folder."),
) -> None:
    """Convert a Hugging Face folder: wall and CPU time, beside a plain copy and torch's own way."""
    no_flags(ctx)
    output = output_of(ctx)
    from titan_cli.display import Display
    from titan_core.jobs import bench_convert as job

    with Display(output) as display:
        rows = job.run(gigabytes=gigabytes, rounds=rounds, folder=folder, listener=display)
    lines = [f"{'':<8}{'wall s':>8}{'CPU-s':>8}{'GB/CPU-s':>10}{'peak GB':>9}{'wall/cp':>9}"]
    lines += [
        f"{row.name:<8}{row.wall_seconds:>8.2f}{row.cpu_seconds:>8.2f}{row.gigabytes_per_cpu_second:>10.2f}"
        f"{row.peak_gigabytes:>9.2f}{row.wall_seconds / rows[0].wall_seconds:>8.2f}x"
        for row in rows
    ]
    output.result("\n".join(lines), rows=[dataclasses.asdict(row) for row in rows])


_ROUNDS = typer.Option(5, min=1, help="Turns of each, after one that is not counted.")
_DTYPE = typer.Option("float32", help="Dtype of weights and computation.")


@app.command(epilog="\b\nExample:\n  titan bench flux")
def flux(ctx: typer.Context, rounds: int = _ROUNDS, dtype: Literal["float32", "bfloat16"] = _DTYPE) -> None:
    """Train and sample the Flux debug model on the CPU, beside diffusers with the same weights: CPU time."""
    no_flags(ctx)
    from titan_core.jobs import bench_flux as job

    _side_by_side(ctx, functools.partial(job.run, rounds=rounds, dtype=dtype))


@app.command("moe-step", epilog="\b\nExample:\n  titan bench moe-step --dtype bfloat16")
def moe_step(ctx: typer.Context, rounds: int = _ROUNDS, dtype: Literal["float32", "bfloat16"] = _DTYPE) -> None:
    """Train DeepSeek's debug model on the CPU, beside transformers and a loop over the experts: CPU time."""
    no_flags(ctx)
    from titan_core.jobs import bench_moe_step as job

    _side_by_side(ctx, functools.partial(job.run, rounds=rounds, dtype=dtype))


def _side_by_side(ctx: typer.Context, run: Callable[..., Sequence[Any]]) -> None:
    """Show rows of CPU time, and their ratio to titan's."""
    output = output_of(ctx)
    from titan_cli.display import Display

    with Display(output) as display:
        rows = run(listener=display)
    own = {row.work: row.cpu_seconds for row in rows if row.name == "titan"}
    lines = [f"{'':<20}{'':<20}{'CPU s':>8}{'min':>8}{'max':>8}  ratio"]
    lines += [
        f"{row.work:<20}{row.name:<20}{row.cpu_seconds:>8.3f}{row.cpu_seconds_min:>8.3f}{row.cpu_seconds_max:>8.3f}"
        f"  {row.cpu_seconds / own[row.work]:.2f}x"
        for row in rows
    ]
    output.result("\n".join(lines), rows=[dataclasses.asdict(row) for row in rows])


def _split(item: str) -> tuple[str, str]:
    name, equals, python = item.partition("=")
    if not equals:
        raise UsageError(f"`--peer` cannot be `{item}`", tip="NAME=PYTHON, e.g. litgpt=envs/litgpt/bin/python")
    return name, python
