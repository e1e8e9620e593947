"""`titan train`: parse, check, start the ranks, run the job, say what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from titan_cli.context import config_of, output_of, words_of
from titan_cli.output import Output
from titan_core.config.catalog import describe, recipes
from titan_core.runtime.errors import ConfigError, Interrupted, UsageError

if TYPE_CHECKING:
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
    world_size: int | None = typer.Option(
        None,
        "--world-size",
        min=1,
        metavar="N",
        help="Ranks that --dry-run plans for, on GPUs; they need not be there.",
    ),
    nproc: str = typer.Option("1", metavar="N", help="Ranks to start on this host, or `auto`: one a GPU."),
    resume: str = typer.Option("auto", metavar="HOW", help="auto, never, a step, or a checkpoint to start from."),
    until: int | None = typer.Option(
        None, min=1, metavar="STEP", help="Stop early, after this step, without touching the schedule."
    ),
    allow_change: list[str] = typer.Option([], metavar="KEY", help="Config key that may differ from the resumed run."),
    grace: str = typer.Option("10m", metavar="TIME", help="What ranks get to save when stopped, e.g. 90s, 10m."),
    nnodes: int = typer.Option(1, min=1, metavar="N", help="Hosts of the job."),
    node_rank: int = typer.Option(0, min=0, metavar="N", help="Number of this host."),
    rdzv: str | None = typer.Option(None, metavar="HOST:PORT", help="Address of host 0, for several hosts."),
) -> None:
    """Train or resume a model. Short form: `--run DIR` for `--job.dump_folder DIR`."""
    output = output_of(ctx)
    if list_recipes:
        _list(output)
        return
    from titan_cli import launch, worker  # not for --list, which is held to its start-up budget
    from titan_core.config import checks
    from titan_core.jobs import precheck
    from titan_core.training.resume import check_allowed

    resolved = _named_run(config_of(ctx, target or DEFAULT_RECIPE), target)
    if resolved.config.metrics.disable_color_printing:
        output.color = "never"
    if resolved.config.experimental.custom_import:
        sys.path.append(os.getcwd())  # last: nothing that lies there can hide a package
    ranks = launch.Ranks.of(nproc, nnodes, node_rank, rdzv)
    if ranks.note is not None and worker.is_main_rank():
        output.warn(ranks.note)
    seconds = _seconds(grace)
    check_allowed(allow_change)
    dry_run = dry_run or resolved.config.memory_estimation.enable
    if world_size is not None and not dry_run:
        raise UsageError("--world-size says how many ranks --dry-run plans for", tip="start ranks with --nproc N")
    problems = precheck.run(resolved, world_size or ranks.world_size)
    if problems:
        raise ConfigError(problems)
    if not worker.in_worker() and worker.is_main_rank():
        for remark in checks.remarks(resolved.config):
            output.warn(remark)
    if dry_run:
        _plan(output, resolved, world_size or ranks.world_size, None if world_size is None else "cuda")
    elif ranks.must_spawn:
        raise typer.Exit(launch.spawn(ranks, seconds, output, words_of(ctx)))
    else:
        done = _train_here(output, resolved, resume, until, allow_change)
        _finish(output, resolved, done, words_of(ctx), until)


def _plan(output: Output, resolved: Resolved, world_size: int, device: str | None) -> None:
    from titan_core.jobs import plan

    result = plan.run(resolved, world_size, device)
    output.result("\n".join(f"{topic:<14}{text}" for topic, text in result.rows), **dataclasses.asdict(result))


def _train_here(
    output: Output, resolved: Resolved, resume: str, until: int | None, allow_change: list[str]
) -> TrainResult:
    """Run the job as the rank that this process is."""
    from titan_cli import worker
    from titan_cli.display import Display
    from titan_cli.notice import SignalNotice

    main = worker.is_main_rank()
    if main:
        if resolved.config.job.print_config:
            from titan_cli.commands.config import as_toml

            output.say(as_toml(resolved))
        output.say(f"{'start':<10}loading torch")
    from titan_core.jobs import train as job

    saves = resolved.config.checkpoint.enable and not resolved.config.checkpoint.load_only
    with Display(output) as display, worker.worker_listener(display) as listener:
        notice = SignalNotice(lambda name: display.stopping(_stopping(name, saves)))
        with notice if main and output.mode == "human" else contextlib.nullcontext():
            return job.run(resolved, listener=listener, resume=resume, until=until, allow_change=allow_change)


def _stopping(name: str, saves: bool) -> str:
    if not saves:
        return f"{name}: finishing the step; this run saves no checkpoints, so its work is lost"
    again = "; Ctrl-C again stops at once, without saving" if name == "SIGINT" else ""
    return f"{name}: finishing the step, then saving{again}"


def _finish(output: Output, resolved: Resolved, done: TrainResult, words: list[str], until: int | None) -> None:
    """Give the result, say what to do next, and exit by how the run ended."""
    from titan_cli import worker

    saved = done.checkpoint is not None and done.checkpoint.rstrip("/").endswith(f"step-{done.step}")
    stopped = done.stopped_by is not None and not done.finished
    if stopped and not saved:
        error = Interrupted(
            f"stopped by {done.stopped_by} at step {done.step}/{done.steps}; nothing was saved",
            tip="`--checkpoint.enable` saves, and the same command then goes on",
        )
        error.exit_code = 130 if done.stopped_by == "SIGINT" else 143
        raise error
    if worker.is_main_rank():
        output.result("", **dataclasses.asdict(done))
        _epilogue(output, resolved, done, words, until)
    if stopped:
        raise typer.Exit(STOPPED_AFTER_SAVING)


def _epilogue(output: Output, resolved: Resolved, done: TrainResult, words: list[str], until: int | None) -> None:
    """Say what was made and what to do next."""
    if done.first_loss is not None:
        loss = f"loss {done.first_loss:.4f} -> {done.last_loss:.4f}"
        how = f"stopped by {done.stopped_by} at" if done.stopped_by else f"{'done':<9}"
        output.say(f"{how} step {done.step}/{done.steps}, {done.tokens:,} tokens, {loss}, {done.seconds:.0f} s")
    elif done.finished:
        output.say(f"{'done':<10}the run in {done.run} is finished: it is at its last step, {done.step}, already")
    else:
        output.say(f"{'done':<10}the run in {done.run} is at step {done.step}, and `--until {until}` asks for no more")
    output.say(f"{'made':<10}{done.run}/metrics.jsonl" + (f", {done.checkpoint}" if done.checkpoint else ""))
    if done.checkpoint is None:
        return
    if _draws(resolved):
        prompt = "a large red circle in the center on a white background"
        follow = [_again(words, done), ["generate", "flux", "--checkpoint", done.run, "--prompt", prompt]]
    else:
        follow = _language(resolved, done, words)
    if done.first_loss is None and done.finished:
        follow.insert(1, _afresh(words, done.run))
    for number, command in enumerate(follow):
        output.say(f"{'' if number else 'next':<10}{shlex.join(['titan', *command])}")


def _draws(resolved: Resolved) -> bool:
    """Is the model one that draws images?"""
    from titan_core.models import FAMILIES, family

    name = resolved.config.model.name
    return name in FAMILIES and family(name).task == "flow_matching"


def _language(resolved: Resolved, done: TrainResult, words: list[str]) -> list[list[str]]:
    """Return what to do next with a language model."""
    validation, training = resolved.config.validation, resolved.config.training
    held_out = validation if validation.enable else training
    data = held_out.dataset_path or held_out.dataset
    prompt = "def main():" if training.dataset == "embedded" else "The "
    generate = ["generate", "llm", "--checkpoint", done.run, "--prompt", prompt]
    return [_again(words, done), generate, ["validate", "loss", done.run, "--data", data]]


def _again(words: list[str], done: TrainResult) -> list[str]:
    """Return the words that go on with the run: the same, and more steps if it is at its last."""
    kept = _without(words, "--until", "--resume", "--allow-change")
    if not done.finished:
        return kept
    return [*_without(kept, "--training.steps"), "--training.steps", str(2 * done.steps)]


def _afresh(words: list[str], run: str) -> list[str]:
    """Return the words that start the same run in a folder of its own."""
    folders = (f"{run.rstrip('/')}-{number}" for number in itertools.count(2))
    free = next(folder for folder in folders if not os.path.exists(folder))
    return [*_without(words, "--until", "--resume", "--run", "--job.dump_folder"), "--run", free]


def _without(words: list[str], *options: str) -> list[str]:
    """Leave options and their values out."""
    kept: list[str] = []
    following = iter(words)
    for word in following:
        name, equals, _ = word.partition("=")
        if name not in options:
            kept.append(word)
        elif not equals:
            next(following, None)
    return kept


def _seconds(text: str) -> int:
    found = re.fullmatch(r"(\d+)([smh]?)", text)
    if found is None or not int(found.group(1)):
        raise UsageError(f"`--grace` cannot be `{text}`", tip="a time, e.g. 90s, 10m or 1h")
    return int(found.group(1)) * {"": 1, "s": 1, "m": 60, "h": 3600}[found.group(2)]


def _named_run(resolved: Resolved, target: str | None) -> Resolved:
    """Note where the config came from; a run that names no folder gets one, the same for the same command."""
    job = dataclasses.replace(resolved.config.job, config_file=target or DEFAULT_RECIPE)
    if "job.dump_folder" not in resolved.sources:
        job = dataclasses.replace(job, dump_folder=os.path.join("outputs", _stem(target or DEFAULT_RECIPE)))
    return dataclasses.replace(resolved, config=dataclasses.replace(resolved.config, job=job))


def _stem(target: str) -> str:
    """Return the name of a recipe or file; a recipe may be written with dashes."""
    stem = Path(target).stem
    return stem.replace("-", "_") if stem.replace("-", "_") in recipes() else stem


def _list(output: Output) -> None:
    known = {name: describe(path) for name, path in recipes().items()}
    width = max(map(len, known))
    output.result("\n".join(f"{name:<{width}}  {text}" for name, text in known.items()), recipes=known)
