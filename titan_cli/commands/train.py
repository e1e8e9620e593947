"""`titan train`: parse, check, start the ranks, run the job, say what came of it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from titan_cli.context import config_of, output_of, words_of
from titan_cli.output import Output
from titan_core.config.catalog import describe, recipes
from titan_core.runtime.errors import ConfigError

if TYPE_CHECKING:
    from titan_cli.launch import Ranks
    from titan_core.config.load import Resolved
    from titan_core.jobs.train import TrainResult

DEFAULT_RECIPE = "llama3_debugmodel"
STOPPED_AFTER_SAVING = 75

app = typer.Typer(rich_markup_mode=None, add_completion=False)
EPILOG = (
    "\b\nExamples:\n  titan train\n  titan train llama3_8b --nproc 8 --optimizer.lr 3e-4\n"
    "  titan train my.toml --run runs/a --dry-run\n\nEvery config key is a flag; `titan config list` names them."
)


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def train(
    ctx: typer.Context,
    target: str | None = typer.Argument(None, metavar="[RECIPE|FILE]", help="Recipe or TOML file."),
    list_recipes: bool = typer.Option(False, "--list", help="List the recipes and stop."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Build the plan without weights, print it and stop."),
    nproc: str = typer.Option("1", help="Ranks to start on this host, or `auto`: one a GPU."),
    resume: str = typer.Option("auto", help="auto, never, a step, or a checkpoint to start from."),
    until: int | None = typer.Option(None, min=1, help="Stop early, after this step, without touching the schedule."),
    allow_change: list[str] = typer.Option([], metavar="KEY", help="Config key that may differ from the resumed run."),
    grace: int = typer.Option(600, min=1, help="Seconds that ranks get to save when stopped."),
    nnodes: int = typer.Option(1, min=1, help="Hosts of the job."),
    node_rank: int = typer.Option(0, min=0, help="Number of this host."),
    rdzv: str | None = typer.Option(None, metavar="HOST:PORT", help="Address of host 0, for several hosts."),
) -> None:
    """Train or resume a model. Short form: `--run DIR` for `--job.dump_folder DIR`."""
    output = output_of(ctx)
    if list_recipes:
        _list(output)
        return
    from titan_cli import launch, worker  # not for --list, which is held to its start-up budget
    from titan_core.config import checks

    resolved = _named_run(config_of(ctx, target or DEFAULT_RECIPE), target)
    if resolved.config.metrics.disable_color_printing:
        output.color = "never"
    ranks = launch.Ranks.of(nproc, nnodes, node_rank, rdzv)
    if ranks.note is not None and worker.is_main_rank():
        output.warn(ranks.note)
    problems = checks.check(resolved, ranks.world_size)
    if problems:
        raise ConfigError(problems)
    if ranks.must_spawn and not dry_run:
        raise typer.Exit(launch.spawn(ranks, grace, output, words_of(ctx)))
    _train_here(output, resolved, target, resume, until, allow_change, dry_run, ranks)


def _train_here(
    output: Output,
    resolved: Resolved,
    target: str | None,
    resume: str,
    until: int | None,
    allow_change: list[str],
    dry_run: bool,
    ranks: Ranks,
) -> None:
    from titan_cli import worker
    from titan_cli.display import Display

    if dry_run:
        from titan_core.jobs import plan

        result = plan.run(resolved, ranks.world_size)
        output.result("\n".join(f"{topic:<12}{text}" for topic, text in result.rows), **dataclasses.asdict(result))
        return
    if worker.is_main_rank():
        if resolved.config.job.print_config:
            from titan_cli.commands.config import as_toml

            output.say(as_toml(resolved))
        output.say(f"{'start':<10}loading torch")
    from titan_core.jobs import train as job

    with Display(output) as display, worker.worker_listener(display) as listener:
        done = job.run(resolved, listener=listener, resume=resume, until=until, allow_change=allow_change)
    if worker.is_main_rank():
        output.result("", **dataclasses.asdict(done))
        _epilogue(output, done, target)
    if done.stopped_by and not done.finished:
        raise typer.Exit(STOPPED_AFTER_SAVING)


def _epilogue(output: Output, done: TrainResult, target: str | None) -> None:
    """Say what was made and what to do next."""
    if done.first_loss is None:
        output.say(f"{'done':<10}the run in {done.run} is at its last step, {done.step}, already")
    else:
        loss = f"loss {done.first_loss:.4f} -> {done.last_loss:.4f}"
        how = f"stopped by {done.stopped_by}" if done.stopped_by else "done"
        output.say(f"{how:<9} step {done.step}/{done.steps}, {done.tokens:,} tokens, {loss}, {done.seconds:.0f} s")
    name = target or ""
    again = f"titan train {name}".rstrip() + f" --run {done.run}"
    output.say(f"{'made':<10}{done.run}/metrics.jsonl" + (f", {done.checkpoint}" if done.checkpoint else ""))
    if done.checkpoint is None:
        return
    more = again if not done.finished else f"{again} --training.steps {2 * done.steps}"
    output.say(f"{'next':<10}{more}")
    output.say(f'{"":<10}titan generate llm --checkpoint {done.run} --prompt "def main():"')
    output.say(f"{'':<10}titan validate loss {done.run} --data embedded")


def _named_run(resolved: Resolved, target: str | None) -> Resolved:
    """Note where the config came from; a run that names no folder gets one, the same for the same command."""
    job = dataclasses.replace(resolved.config.job, config_file=target or DEFAULT_RECIPE)
    if "job.dump_folder" not in resolved.sources:
        job = dataclasses.replace(job, dump_folder=os.path.join("outputs", Path(target or DEFAULT_RECIPE).stem))
    return dataclasses.replace(resolved, config=dataclasses.replace(resolved.config, job=job))


def _list(output: Output) -> None:
    known = {name: describe(path) for name, path in recipes().items()}
    width = max(map(len, known))
    output.result("\n".join(f"{name:<{width}}  {text}" for name, text in known.items()), recipes=known)
