"""`titan convert`: weights from one format to another."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import typer

from titan_cli.context import no_flags, output_of, words_of
from titan_core.runtime.errors import Interrupted

if TYPE_CHECKING:
    from titan_cli.output import Output
    from titan_core.jobs.convert import Converted, Options, Route

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    help="Convert weights between Hugging Face, Meta, Black Forest Labs, DCP and torch.",
    epilog="\b\nExamples:\n  titan convert hf-to-dcp Llama-3.1-8B weights/llama3_8b\n"
    "  titan convert dcp-to-hf outputs/llama3_8b exported --dtype bfloat16 --max-shard-size 5GB\n"
    "  titan convert meta-to-dcp Meta-Llama-3-70B weights/llama3_70b --nproc 8\n\n"
    "What is written can be given to `titan train --checkpoint.initial_load_path`, `titan generate llm --checkpoint`\n"
    "and `titan_core.load`. A call that was killed goes on when it is repeated.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_HELP = {
    "hf-to-dcp": "A Hugging Face folder into a titan checkpoint.",
    "dcp-to-hf": "A titan checkpoint into a Hugging Face folder: weights, config, tokenizer, model card.",
    "meta-to-dcp": "A folder of Meta's consolidated.NN.pth and params.json into a titan checkpoint.",
    "bfl-to-dcp": "A single safetensors file of Black Forest Labs into a titan checkpoint.",
    "dcp-to-bfl": "A titan checkpoint of Flux or its autoencoder into a single file such as flux1-dev.safetensors.",
    "dcp-to-torch": "A titan checkpoint into one torch.save file of its weights.",
    "hf-to-hf": "A Hugging Face folder into another: other shards, another dtype.",
}


@app.callback()
def _group() -> None:
    """Convert weights."""


Source = typer.Argument(..., metavar="SRC", help="Folder (or run, or step) to read.")
Target = typer.Argument(..., metavar="DST", help="What to write; must not be there yet.")
Dtype = typer.Option(None, help="Cast floating-point tensors; default: as stored. fp8-block: float8 with block scales.")
MaxShard = typer.Option("5GB", metavar="SIZE", help="Largest safetensors file.")
Memory = typer.Option("1GiB", metavar="SIZE", help="Budget for numbers in memory, beside the largest stored piece.")
Verify = typer.Option(True, "--verify/--no-verify", help="Read everything that was written again, from the disk.")
FamilyName = typer.Option(None, "--family", help="Model family, instead of what SRC says.")
Flavor = typer.Option(None, help="Named sizes of the family, instead of what SRC says.")
DryRun = typer.Option(False, "--dry-run", help="Check and plan from headers only, and stop.")
Nproc = typer.Option("1", metavar="N", help="Ranks to start; each reads and writes its share.")
_Dtype = Literal["float32", "bfloat16", "float16", "fp8-block"]


def _command(route: Route) -> Callable[..., None]:
    """Return the function of a command; all take the same options."""

    def command(
        ctx: typer.Context,
        source: str = Source,
        target: str = Target,
        dtype: _Dtype | None = Dtype,
        max_shard_size: str = MaxShard,
        memory: str = Memory,
        verify: bool = Verify,
        family: str | None = FamilyName,
        flavor: str | None = Flavor,
        nproc: str = Nproc,
        dry_run: bool = DryRun,
    ) -> None:
        from titan_core.interop.sizes import parse_size

        shard, budget = parse_size(max_shard_size, "--max-shard-size"), parse_size(memory, "--memory")
        _run(
            ctx,
            route,
            (source, target),
            nproc,
            dtype=dtype,
            max_shard=shard,
            memory=budget,
            verify=verify,
            family=family,
            flavor=flavor,
            dry_run=dry_run,
        )

    return command


for _route, _help in _HELP.items():
    app.command(name=_route, help=_help)(_command(_route))  # pyright: ignore[reportArgumentType]


@app.command(name="dcp-to-meta")
def dcp_to_meta(
    ctx: typer.Context,
    source: str = Source,
    target: str = Target,
    parts: int = typer.Option(1, min=1, max=99, help="Number of consolidated.NN.pth files."),
    fused_qkv: bool = typer.Option(False, "--fused-qkv", help="Write wq, wk and wv as one tensor."),
    dtype: Literal["float32", "bfloat16", "float16"] | None = typer.Option(None, help="Cast; default: as stored."),
    memory: str = Memory,
    verify: bool = Verify,
    nproc: str = Nproc,
) -> None:
    """A titan checkpoint into a folder of Meta's format."""
    from titan_core.interop.sizes import parse_size

    budget = parse_size(memory, "--memory")
    both = (source, target)
    _run(ctx, "dcp-to-meta", both, nproc, dtype=dtype, memory=budget, verify=verify, parts=parts, fused_qkv=fused_qkv)


def _run(ctx: typer.Context, route: Route, places: tuple[str, str], nproc: str, **options: object) -> None:
    """Start the ranks, or do the work of the rank that this process is."""
    no_flags(ctx)
    output = output_of(ctx)
    from titan_cli import launch, worker

    ranks = launch.Ranks.of(nproc)
    if ranks.must_spawn:
        raise typer.Exit(launch.spawn(ranks, 30, output, words_of(ctx)))
    from titan_core.jobs.convert import Options

    done = _convert_here(output, route, places, Options(**options))  # pyright: ignore[reportArgumentType]
    if worker.is_main_rank():
        output.result(_text(done), **dataclasses.asdict(done))


def _convert_here(output: Output, route: Route, places: tuple[str, str], options: Options) -> Converted:
    from titan_cli import worker
    from titan_cli.display import Display
    from titan_core.jobs import convert as job
    from titan_core.runtime import distributed

    try:
        distributed.start(device="cpu")
        with Display(output) as display, worker.worker_listener(display) as listener:
            return job.run(route, *places, options, listener=listener)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command goes on from here") from None
    finally:
        distributed.stop()


def _text(done: Converted) -> str:
    if done.dry_run:
        return f"{done.path}: {done.tensors} tensors, {done.bytes / 1e9:,.2f} GB, planned in {done.seconds:.1f} s"
    verified = ", verified" if done.verified else ""
    resumed = f", {done.resumed_bytes / 1e9:.2f} GB were there" if done.resumed_bytes else ""
    return (
        f"{done.path}: {done.tensors} tensors, {done.bytes / 1e9:.2f} GB in {done.seconds:.1f} s{verified}{resumed}, "
        f"peak memory {done.peak_rss / 1e9:.2f} GB"
    )
