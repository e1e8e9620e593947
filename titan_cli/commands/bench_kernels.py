"""`titan bench moe-gemm` and the like: kernels beside their peers, right first, then timed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from titan_cli.context import no_flags, output_of, words_of
from titan_cli.output import Output
from titan_core.jobs.bench.request import DTYPES, PASSES, PRESETS, Request, read_list, read_shapes
from titan_core.runtime.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from titan_core.jobs.bench.case import Row
    from titan_core.jobs.bench.collectives import CollectiveReport
    from titan_core.jobs.bench.run import Report

_BACKEND = typer.Option("all", metavar="NAMES", help="all, or names with commas between them, e.g. titan,loop.")
_PLOT = typer.Option(None, metavar="FILE", help="Draw the result into a .png, .svg or .pdf.")
_SAVE = typer.Option(None, metavar="FILE", help="Append each result as a line of JSON, as soon as it is known.")
_COMPARE = typer.Option(None, metavar="FILE", help="Set the times beside those that --save wrote on this device.")
_FAIL_OVER = typer.Option(
    None, "--fail-over", min=0.0, metavar="PERCENT", help="End with 1 if titan is so much slower than in --compare."
)
_SEED = typer.Option(None, min=0, help="Draws the inputs; a new one each time if not given.")
_SHAPES = typer.Option(
    ["deepseek-v3"], metavar="SHAPES", help=f"{', '.join(PRESETS)}, or rows,out,in,groups. Repeatable."
)
_DTYPE = typer.Option("bf16", metavar="|".join(DTYPES), help="bf16, or fp8 with scales of blocks.")
_SKEW = typer.Option(0.0, min=0.0, max=1.0, metavar="0..1", help="0: experts share the rows; 1: one has all.")


def moe_gemm(
    ctx: typer.Context,
    shapes: list[str] = _SHAPES,
    dtype: str = _DTYPE,
    backend: str = _BACKEND,
    passes: str = typer.Option("fwd,dx,dw", "--pass", metavar="PASSES", help="Some of fwd, dx, dw."),
    imbalance: float = _SKEW,
    seed: int | None = _SEED,
    save: str | None = _SAVE,
    compare: str | None = _COMPARE,
    fail_over: float | None = _FAIL_OVER,
    plot: str | None = _PLOT,
) -> None:
    """Grouped matmuls of experts.

    Beside them torch's grouped_mm, one matmul an expert, and DeepGEMM where it is installed.
    """
    request = Request(
        shapes=read_shapes(shapes),
        dtype=_dtype(dtype),
        passes=read_list("--pass", passes, PASSES),
        imbalance=imbalance,
    )
    _run(ctx, ["moe-gemm"], request, _Ways(backend, seed, save, compare, fail_over, plot))


def _of(name: str, doc: str) -> Callable[..., None]:
    """Return the command of an operation that takes what all of them take."""

    def command(
        ctx: typer.Context,
        backend: str = _BACKEND,
        seed: int | None = _SEED,
        save: str | None = _SAVE,
        compare: str | None = _COMPARE,
        fail_over: float | None = _FAIL_OVER,
        plot: str | None = _PLOT,
    ) -> None:
        _run(ctx, [name], Request(), _Ways(backend, seed, save, compare, fail_over, plot))

    command.__doc__ = doc
    return command


moe_layer = _of(
    "moe-layer",
    """Whole layers of experts.

    Placement, gather, gate, products and weighted sum, beside the same from torch's grouped_mm. Without the router.
    """,
)
permute = _of(
    "permute",
    """Rows to their experts and back.

    Placement, permute and unpermute with its gradient, beside a sort, gathers and sums by torch, plain and compiled.
    """,
)
quant = _of("quant", "Cast to float8 with scales of blocks.")
fused_ce = _of(
    "fused-ce",
    """Output head and cross-entropy in one.

    Loss and gradients, beside what training uses, torch eager and compiled, and Liger where it is installed.
    """,
)
pointwise = _of(
    "pointwise",
    """RMSNorm, rotary embedding.

    Forward and backward, beside torch eager and compiled.
    """,
)
attention = _of(
    "attention",
    """Causal attention.

    What titan picks, beside flash, cuDNN, memory-efficient and flex attention.
    """,
)


def everything(
    ctx: typer.Context,
    shapes: list[str] = _SHAPES,
    imbalance: float = _SKEW,
    seed: int | None = _SEED,
    save: str | None = _SAVE,
    compare: str | None = _COMPARE,
    fail_over: float | None = _FAIL_OVER,
    plot: str | None = _PLOT,
) -> None:
    """All of the kernels above."""
    names = ["moe-gemm", "moe-layer", "permute", "quant", "fused-ce", "pointwise", "attention"]
    _run(
        ctx,
        names,
        Request(shapes=read_shapes(shapes), imbalance=imbalance),
        _Ways("all", seed, save, compare, fail_over, plot),
    )


def collectives(
    ctx: typer.Context,
    nproc: str | None = typer.Option(None, metavar="N", help="Ranks on this host; default: one a GPU, else 2."),
    nnodes: int = typer.Option(1, min=1, metavar="N", help="Hosts of the job."),
    node_rank: int = typer.Option(0, min=0, metavar="N", help="Number of this host."),
    rdzv: str | None = typer.Option(None, metavar="HOST:PORT", help="Address of host 0, for several hosts."),
    largest: int = typer.Option(64, min=1, max=16384, metavar="MIB", help="Size to end at, in MiB."),
    device: str | None = typer.Option(None, help="cpu or cuda."),
) -> None:
    """Bandwidth between ranks, by size.

    all_gather, reduce_scatter, all_to_all, all_reduce, and rows to experts, over NCCL on GPUs and gloo on CPUs.
    """
    no_flags(ctx)
    from titan_cli import launch, worker

    output = output_of(ctx)
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"`--device` cannot be `{device}`", tip="cpu or cuda")
    gpus = launch.count_gpus()
    ranks = launch.Ranks.of(nproc or ("2" if gpus == 0 or device == "cpu" else str(gpus)), nnodes, node_rank, rdzv)
    if ranks.world_size < 2:
        raise UsageError("one rank has nobody to exchange with", tip="--nproc 2, or `--nproc 2 --device cpu`")
    if ranks.must_spawn:
        raise typer.Exit(launch.spawn(ranks, 10.0, output, words_of(ctx)))
    from titan_cli.display import Display
    from titan_core.jobs.bench import collectives as job
    from titan_core.runtime import distributed

    with Display(output) as display, worker.worker_listener(display) as listener:
        world = distributed.start(device=device)
        try:
            report = job.run(world, largest=largest << 20, listener=listener)
        finally:
            distributed.stop()
    if worker.is_main_rank():
        output.result(_collectives_table(report), **dataclasses.asdict(report))


COMMANDS = {
    "moe-gemm": (moe_gemm, "titan bench moe-gemm --shapes qwen3-30b --imbalance 0.5\n  titan bench moe-gemm --shapes "
                 "8192,4096,7168,8 --pass fwd,dw --json"),
    "moe-layer": (moe_layer, "titan bench moe-layer"),
    "permute": (permute, "titan bench permute"),
    "quant": (quant, "titan bench quant"),
    "fused-ce": (fused_ce, "titan bench fused-ce --backend titan,compile"),
    "pointwise": (pointwise, "titan bench pointwise --plot pointwise.png"),
    "attention": (attention, "titan bench attention"),
    "collectives": (collectives, "titan bench collectives --nproc 8 --largest 1024"),
    "all": (everything, "titan bench all --json > bench.json"),
}  # fmt: skip


def _dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise UsageError(f"`--dtype` cannot be `{dtype}`", tip="one of " + ", ".join(DTYPES))
    return dtype


@dataclasses.dataclass(frozen=True)
class _Ways:
    """What every one of these commands takes."""

    backend: str
    seed: int | None
    save: str | None
    compare: str | None
    fail_over: float | None
    plot: str | None


def _run(ctx: typer.Context, names: list[str], request: Request, ways: _Ways) -> None:
    no_flags(ctx)
    output = output_of(ctx)
    backends = () if ways.backend == "all" else tuple(word.strip() for word in ways.backend.split(",") if word.strip())
    seed = random.SystemRandom().randrange(1 << 32) if ways.seed is None else ways.seed
    request = dataclasses.replace(request, backends=backends, seed=seed)
    if ways.fail_over is not None and ways.compare is None:
        raise UsageError("`--fail-over` needs something to be slower than", tip="--compare FILE")
    if ways.plot is not None:
        from titan_core.jobs.bench.plot import check

        check(ways.plot)
    from titan_cli.display import Display
    from titan_core.jobs.bench import run as job

    with Display(output) as display:
        report = job.run(names, request, save=ways.save, compare=ways.compare, listener=display)
    if ways.plot is not None and report.rows:
        from titan_core.jobs.bench.plot import draw

        draw(report, ways.plot)
    slower = report.slower(ways.fail_over) if ways.fail_over is not None else []
    data = {**dataclasses.asdict(report), "slower": [dataclasses.asdict(row) for row in slower]}
    text = "\n\n".join([_table(report, output), *([_slower(slower, ways.fail_over)] if slower else [])])
    if not report.failures and not report.interrupted and not slower:
        output.result(text, **data)
        return
    output.failed_checks(text, **data)
    raise typer.Exit(Interrupted.exit_code if report.interrupted else 1)


# ------------------------------------------------------------------------------------------------ tables


def _table(report: Report, output: Output) -> str:
    blocks = [_heading(report)]
    for operation in dict.fromkeys(row.operation for row in report.rows):
        blocks.append(_operation([row for row in report.rows if row.operation == operation]))
    return "\n\n".join(blocks)


def _slower(rows: list[Row], percent: float | None) -> str:
    lines = [f"more than {percent:g} % slower than before:"]
    lines += [f"  {row.operation} {row.shape} {row.part} {_shown(row.against_saved, 1, '.2f', 'x')}" for row in rows]
    return "\n".join(lines)


def _heading(report: Report) -> str:
    roofline = report.roofline
    rates = [f"{name} matmul {rate / 1e12:.4g} TFLOP/s" for name, rate in roofline.matmul.items() if rate]
    rates.append(f"copy {roofline.copy / 1e9:.4g} GB/s")
    lines = [
        f"{report.device} · torch {report.torch} · triton {report.triton or 'none'} · seed {report.seed}",
        f"measured now: {', '.join(rates)}",
    ]
    if roofline.peak:
        lines[1] += f" (data sheet: {roofline.peak / 1e12:.4g} bf16)"
    if report.reduced:
        lines.append(
            "no GPU: shapes are reduced, titan's kernels run as their plain references, GPU-only peers are absent"
        )
    if report.interrupted:
        lines.append("interrupted: the cases below were measured, the others were not")
    return "\n".join(lines)


# heading -> a row's number; a column that no row has is left out
_COLUMNS: dict[str, Callable[[Row], str]] = {
    "ms": lambda row: _shown(row.seconds, 1e3, "10.4g"),
    "±": lambda row: _shown(row.spread, 1e3, "8.2g"),
    "host ms": lambda row: _shown(row.host_seconds, 1e3, "9.3g"),
    "TFLOP/s": lambda row: _shown(row.tflops, 1, "9.3g"),
    "GB/s": lambda row: _shown(row.gigabytes_per_second, 1, "8.3g"),
    "roofline": lambda row: _shown(row.roofline, 1, "10.0%"),
    "vs titan": lambda row: _shown(row.against_titan, 1, "9.2f", "x"),
    "vs saved": lambda row: _shown(row.against_saved, 1, "9.2f", "x"),
    "error": lambda row: _shown(row.error, 1, "10.1e"),
    "MB": lambda row: _shown(row.peak_bytes, 1e-6, "8.0f"),
}


def _shown(value: float | None, factor: float, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value * factor:>{form}}{unit}"


def _operation(rows: list[Row]) -> str:
    shapes = max(len("shape"), *(len(row.shape) for row in rows))
    names = max(len("backend"), *(len(row.backend) for row in rows))
    parts = max(len("pass"), *(len(row.part) for row in rows))
    timed = [row for row in rows if row.seconds is not None]
    columns = {name: max(len(show(row)) for row in timed) for name, show in _COLUMNS.items() if any(map(show, timed))}
    headings = "".join(f"{name:>{width}}" for name, width in columns.items())
    lines = [
        f"{rows[0].operation} ({rows[0].dtype})",
        f"{'shape':<{shapes}}  {'pass':<{parts}}  {'backend':<{names}}{headings}",
    ]
    before = ("", "")
    for row in rows:
        if row.verdict == "absent":
            continue
        case = (row.shape, row.part)
        shown = ("", "") if case == before else case
        numbers = "".join(f"{_COLUMNS[name](row):>{width}}" for name, width in columns.items())
        said = numbers.rstrip() if row.seconds is not None else _not_timed(row)
        lines.append(f"{shown[0]:<{shapes}}  {shown[1]:<{parts}}  {row.backend:<{names}}{said}")
        before = case
    absent = {row.backend: row.note for row in rows if row.verdict == "absent"}
    lines += [f"absent: {name} ({note})" for name, note in absent.items()]
    return "\n".join(lines)


def _not_timed(row: Row) -> str:
    error = "" if row.error is None or row.limit is None else f", error {row.error:.1e} above {row.limit:.1e}"
    return f"  {row.verdict}: {row.note}{error}"


def _collectives_table(report: CollectiveReport) -> str:
    lines = [
        f"{report.ranks} ranks · {report.backend} · {report.device}",
        f"{'':<20}{'KiB':>10}{'ms':>10}{'bus GB/s':>10}",
    ]
    for row in sorted(report.rows, key=lambda row: row.name):
        lines.append(
            f"{row.name:<20}{row.size / 1024:>10.0f}{row.seconds * 1e3:>10.4g}{row.bus_gigabytes_per_second:>10.3g}"
        )
    lines += [f"absent: {name} ({reason})" for name, reason in report.absent.items()]
    return "\n".join(lines)
