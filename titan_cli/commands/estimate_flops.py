"""`titan estimate-flops`: what a run costs, before anything is paid for. Never loads torch."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

import typer

from titan_cli.context import config_of, flags_of, output_of
from titan_core.runtime.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from titan_core.estimation.devices import Device
    from titan_core.estimation.memory import Memory
    from titan_core.jobs.estimate import Estimate, Fit

app = typer.Typer(rich_markup_mode=None, add_completion=False)
EPILOG = """\b
Examples:
  titan estimate-flops llama3_8b --gpus 8 --gpu h100 --tokens 1T
  titan estimate-flops deepseek_v3_671b --gpus 1024 --gpu h200 --fit"""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_GIB = 1 << 30


@app.command(name="estimate-flops", epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def estimate_flops(
    ctx: typer.Context,
    target: str | None = typer.Argument(None, metavar="[RECIPE|FILE]", help="Config to count."),
    gpus: int = typer.Option(1, min=1, metavar="N", help="Ranks of the run."),
    gpu: str | None = typer.Option(None, metavar="NAME", help="Their kind: a100, h100, h200, b200, mi300x, ..."),
    mfu: float = typer.Option(0.4, min=0.01, max=1.0, metavar="0..1", help="Share of the data sheet's FLOP/s reached."),
    tokens: str | None = typer.Option(None, metavar="N", help="Tokens of the run, e.g. 15T; default: the config's."),
    fit: bool = typer.Option(False, "--fit", help="Search layouts, batches and recomputation that fit --gpu."),
) -> None:
    """Parameters, FLOPs, memory and time of a run, by arithmetic on its config."""
    resolved = config_of(ctx, target)
    from titan_core.config.load import load
    from titan_core.estimation.devices import device, names
    from titan_core.jobs import estimate as job
    from titan_core.jobs import precheck

    number = None if tokens is None else _number(tokens)
    found = device(gpu) if gpu is not None else None
    if fit and found is None:
        raise UsageError("`--fit` needs to know what must fit", tip="--gpu " + ", ".join(names()))
    fits = job.fit(resolved, gpus, found) if fit and found is not None else []
    problems = precheck.run(resolved, gpus)
    if problems and not fits:
        raise ConfigError(problems)
    if problems:  # the config's own layout does not suit so many ranks: what fits best stands for it
        resolved = load(target, [*flags_of(ctx), *((key, str(value)) for key, value in fits[0].settings.items())])
    estimate = dataclasses.replace(job.run(resolved, gpus, found, mfu, number), fits=fits)
    output_of(ctx).result(_text(estimate), **dataclasses.asdict(estimate))


def _number(text: str) -> int:
    """Read a number of tokens: 300000, 1.5B, 15T."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbt]?)", text.strip().lower().replace("_", ""))
    number = round(float(match.group(1)) * _UNITS[match.group(2)]) if match else 0
    if number < 1:
        raise UsageError(f"`--tokens` cannot be `{text}`", tip="a number of tokens, e.g. 300M, 1.5B or 15T")
    return number


def _text(e: Estimate) -> str:
    embedding = f" · {_short(e.parameters.embedding)} embedding" if e.parameters.embedding else ""
    rows = [
        ("model", e.model),
        ("params", f"{_short(e.parameters.total)} · {_short(e.parameters.active)} in a token's matmuls{embedding}"),
        ("flops", f"{e.flops:.4g} a token: products {e.flops - e.attention:.4g}, full attention {e.attention:.4g}"),
        ("", f"{e.flops_causal:.4g} with the keys that a token of {e.tokens_per_sample:,} sees"),
        ("run", f"{_short(e.tokens)} tokens = {e.flops * e.tokens:.3g} FLOP, {e.tokens_per_step:,} tokens a step"),
    ]
    if e.device is not None and e.tokens_per_second is not None and e.seconds is not None and e.mfu is not None:
        speed = f"{_short(e.tokens_per_second)} tokens/s, {_duration(e.seconds)}"
        rows.append(
            ("time", f"{e.ranks} x {e.device.name} at {e.mfu:.0%} of {e.device.peak / 1e12:.4g} TFLOP/s: {speed}")
        )
    if e.modelled is not None:
        rows.append(("step", _step(e.modelled, e.ranks)))
    rows.append(("memory", f"{_memory(e.memory, e.device)} a rank; {_ranks(e.ranks)}: {e.layout}"))
    rows.append(("", " · ".join(f"{name} {size / _GIB:.2f}" for name, size in e.memory.parts().items() if size)))
    lines = [f"{topic:<10}{text}" for topic, text in rows]
    return "\n".join([*lines, *(_fits(e.fits, e) if e.fits else [])])


def _step(fit: Fit, ranks: int) -> str:
    from titan_core.estimation.step_time import WHILE_COMPUTING

    lost = f"; lost to {lost}" if (lost := _lost(fit)) else ""
    seconds, each = f"{fit.time.total:.3g} s", f"{fit.tokens_per_second / ranks:,.0f} tokens/s a rank"
    return f"modelled: {seconds}, {each}, mfu {fit.mfu:.0%}, if computing reaches {WHILE_COMPUTING:.0%}{lost}"


def _lost(fit: Fit) -> str:
    """Say which shares of a step are not spent computing."""
    share = {axis.replace("_", " "): seconds / fit.time.total for axis, seconds in fit.time.exchanges.items()}
    share["waiting"] = fit.time.waiting / fit.time.total
    return ", ".join(f"{name} {part:.0%}" for name, part in share.items() if part >= 0.005)


def _fits(fits: list[Fit], e: Estimate) -> list[str]:
    from titan_core.estimation.devices import USABLE
    from titan_core.estimation.step_time import WHILE_COMPUTING

    assert e.device is not None
    wide = max(len(fit.layout) for fit in fits)
    room, reached = f"{USABLE:.0%} of the memory", f"{WHILE_COMPUTING:.0%} of the data sheet"
    lines = [
        "",
        f"fits {room}, by estimated speed, where computing reaches {reached}; mfu counts full attention",
        f"{'layout':<{wide}}{'rows':>6}  {'recompute':<10}{'GiB':>6}{'tokens/step':>13}{'tok/s/gpu':>11}{'mfu':>6}"
        "  lost to",
    ]
    for fit in fits:
        lines.append(
            f"{fit.layout:<{wide}}{fit.local_batch_size:>6}  {fit.recompute:<10}"
            f"{(fit.memory.total - fit.memory.host) / _GIB:>6.1f}{fit.tokens_per_step:>13,}"
            f"{fit.tokens_per_second / e.ranks:>11,.0f}{fit.mfu:>6.0%}  {_lost(fit)}".rstrip()
        )
    flags = " ".join(f"--{key} {value}" for key, value in fits[0].settings.items())
    return [*lines, "", f"the first: {flags}" if flags else "the first is what the config asks for"]


def _memory(memory: Memory, device: Device | None) -> str:
    own = (memory.total - memory.host) / _GIB
    host = f" and {memory.host / _GIB:.1f} of the host" if memory.host else ""
    return f"{own:.1f}{f' of {device.memory // _GIB}' if device else ''} GiB{host}"


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number > 1)}"


def _short(number: float) -> str:
    """Show a number of parameters or tokens with four digits."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"
