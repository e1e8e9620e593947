"""`titan download`: files of a Hugging Face repository."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import typer

from titan_cli.context import no_flags, output_of
from titan_cli.output import Output
from titan_core.runtime.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from titan_core.jobs.download import Asset, Downloaded

app = typer.Typer(rich_markup_mode=None, add_completion=False)
EPILOG = (
    "\b\nExamples:\n  titan download meta-llama/Llama-3.1-8B --to weights/llama3_8b\n"
    "  titan download Qwen/Qwen3-8B --assets tokenizer,config\n"
    "  titan download Qwen/Qwen3-8B --dry-run\n  titan download flux-autoencoder\n\n"
    "Every file is checked against the repository's hash. What is whole is not fetched again. HF_ENDPOINT names a\n"
    "mirror, HF_TOKEN or `hf auth login` says who you are."
)


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def download(
    ctx: typer.Context,
    repo: str = typer.Argument(..., metavar="REPO", help="OWNER/NAME, or flux-autoencoder, flux-encoders."),
    assets: str = typer.Option(
        "tokenizer,config,index,weights", metavar="LIST", help="What to fetch of these; `all` is every file."
    ),
    include: list[str] = typer.Option([], metavar="GLOB", help="Fetch these files instead."),
    exclude: list[str] = typer.Option([], metavar="GLOB", help="Leave these files out."),
    revision: str | None = typer.Option(None, help="Branch, tag or commit."),
    to: str | None = typer.Option(None, "--to", metavar="DIR", help="Folder; default: the repository's short name."),
    cache: bool = typer.Option(False, "--cache", help="Fetch into the Hugging Face cache."),
    workers: int = typer.Option(4, min=1, max=64, help="Files that are fetched side by side."),
    dry_run: bool = typer.Option(False, "--dry-run", help="List the files with their sizes and stop."),
) -> None:
    """Download weights, config and tokenizer of a Hugging Face repository."""
    no_flags(ctx)
    output = output_of(ctx)
    if to is not None and cache:
        raise UsageError("`--to` and `--cache` are two places", tip="give one of them")
    from titan_cli.display import Display
    from titan_core.jobs import download as job

    try:
        with Display(output) as display:
            done = job.run(
                repo,
                assets=_assets(assets),
                include=include,
                exclude=exclude,
                revision=revision,
                folder=to,
                cache=cache,
                workers=workers,
                dry_run=dry_run,
                listener=display,
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command goes on from here") from None
    output.result(_text(done), **dataclasses.asdict(done))
    _next(output, done.folder, cache or dry_run)


def _assets(text: str) -> list[Asset]:
    from titan_core.jobs.download import PATTERNS

    chosen = [part.strip() for part in text.split(",") if part.strip()]
    odd = [part for part in chosen if part not in PATTERNS]
    if odd or not chosen:
        raise UsageError(f"`--assets` cannot be `{', '.join(odd) or text}`", tip="of " + ", ".join(PATTERNS))
    return chosen  # pyright: ignore[reportReturnType]


def _text(done: Downloaded) -> str:
    if not done.dry_run:
        again = f", {done.retries} retries" if done.retries else ""
        return f"{done.folder}: {len(done.files)} files, {done.bytes / 1e9:.2f} GB fetched{again}"
    width = max(len(file["name"]) for file in done.files)
    lines = [
        f"{file['name']:<{width}}  {(file['size'] or 0) / 1e6:>12,.1f} MB" + ("  is there" if file["there"] else "")
        for file in done.files
    ]
    return "\n".join([*lines, f"{len(done.files)} files, {done.total_bytes / 1e9:.2f} GB"])


def _next(output: Output, folder: str, quiet: bool) -> None:
    if not quiet:
        output.say(f"{'next':<10}titan convert hf-to-dcp {folder} {folder}-dcp")
