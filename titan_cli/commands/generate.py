"""`titan generate`: text and images from a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal

import typer

from titan_cli.context import no_flags, output_of, words_of
from titan_core.runtime.errors import UsageError

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    help="Generate text or images with a trained model.",
    epilog='\b\nExamples:\n  titan generate llm --checkpoint outputs/llama3_debugmodel --prompt "def main():"\n'
    '  titan generate flux --checkpoint outputs/flux_debug --prompt "a large red circle in the center"',
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _group() -> None:
    """Generate with a trained model."""


@app.command(
    epilog="\b\nExamples:\n  titan generate llm --checkpoint outputs/llama3_debugmodel --prompt 'import os'\n"
    "  titan generate llm --checkpoint runs/a --prompt-ids 1,2,3 --greedy --json\n"
    "  cat question.txt | titan generate llm --checkpoint runs/a --prompt -"
)
def llm(
    ctx: typer.Context,
    checkpoint: str = typer.Option(..., help="Run folder, checkpoint folder or step folder."),
    prompt: str | None = typer.Option(None, help="Text to continue; `-` reads stdin."),
    prompts: Path | None = typer.Option(None, help="File of prompts: one a line, or JSON lines with `prompt`."),
    prompt_ids: str | None = typer.Option(None, help="Token ids to continue, e.g. 1,2,3."),
    max_new_tokens: int = typer.Option(128, min=1, help="Most tokens to add."),
    temperature: float = typer.Option(0.8, help="0 is greedy."),
    top_k: int = typer.Option(0, help="Draw from the k likeliest tokens; 0: from all."),
    top_p: float = typer.Option(1.0, help="Draw from the likeliest tokens that hold this share."),
    greedy: bool = typer.Option(False, "--greedy", help="Always take the likeliest token."),
    seed: int = typer.Option(0, help="Seed of the draw."),
    device: str | None = typer.Option(None, help="cpu or cuda; default: a GPU where there is one."),
) -> None:
    """Continue prompts. With `--json` every token comes with its log-probability."""
    no_flags(ctx)
    output = output_of(ctx)
    texts = read_prompts(prompt, prompts)
    ids = [_ids(prompt_ids)] if prompt_ids else []
    if bool(texts) == bool(ids):
        raise UsageError("give a prompt", tip="one of --prompt, --prompts and --prompt-ids")
    from titan_cli.display import Display
    from titan_core.generation.sampler import Sampling
    from titan_core.jobs import generate as job
    from titan_core.runtime.events import silent

    sampling = Sampling(0.0 if greedy else temperature, top_k, top_p, seed)
    with Display(output) as display:
        result = job.run(
            checkpoint,
            texts,
            prompt_ids=ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            log_probs=output.mode == "json",
            device=device,
            listener=silent if output.mode == "json" else display,
        )
    many = len(result.outputs) > 1
    shown = "\n".join(f"--- {o.prompt}\n{o.text}" for o in result.outputs) if many else ""
    output.result(shown, **dataclasses.asdict(result))
    output.say(
        f"step {result.step}, {result.tokens} tokens, {result.tokens_per_second:.0f} tok/s, "
        f"first after {result.seconds_to_first_token:.2f} s"
    )


@app.command(
    epilog="\b\nExamples:\n"
    "  titan generate flux --checkpoint FLUX.1-dev --prompt 'a cat' --size 1024x768 --num-images 4\n"
    "  titan generate flux --checkpoint outputs/flux_debug --prompts prompts.txt --out drawn --nproc 2\n"
    "  titan generate flux --checkpoint flux1-schnell.safetensors --encoders FLUX.1-schnell --prompt 'a cat'"
)
def flux(
    ctx: typer.Context,
    checkpoint: str = typer.Option(..., help="Folder of diffusers, single file, or run, checkpoint or step folder."),
    prompt: str | None = typer.Option(None, help="What to draw; `-` reads stdin."),
    prompts: Path | None = typer.Option(None, help="File of prompts: one a line, or JSON lines with `prompt`."),
    size: str | None = typer.Option(None, metavar="WxH", help="Pixels, e.g. 1024x768; default: as trained."),
    steps: int | None = typer.Option(
        None, min=1, help="Steps; default: 4 for schnell, 28 for dev, as a run validates."
    ),
    guidance: float | None = typer.Option(
        None, min=0, help="Strength of the guidance, distilled if the model has that."
    ),
    real_guidance: float | None = typer.Option(None, min=0, help="Classifier-free guidance, twice the work a step."),
    shift: bool | None = typer.Option(
        None, "--shift/--no-shift", help="Shift times by the size; default: as made for."
    ),
    seed: int = typer.Option(0, min=0, help="Seed of the first image of each prompt."),
    num_images: int = typer.Option(1, min=1, help="Images of each prompt, with seeds that follow each other."),
    batch_size: int | None = typer.Option(None, min=1, help="Images that a rank draws at once."),
    out: str | None = typer.Option(None, metavar="DIR", help="Folder of the images."),
    encoders: str | None = typer.Option(None, metavar="DIR", help="Folder of diffusers with all encoders."),
    t5: str | None = typer.Option(None, metavar="DIR", help="T5's encoder."),
    clip: str | None = typer.Option(None, metavar="DIR", help="CLIP's text encoder."),
    autoencoder: str | None = typer.Option(None, metavar="PATH", help="Autoencoder: a file or folder."),
    compiled: bool | None = typer.Option(None, "--compile/--no-compile", help="Compile blocks; default: on a GPU."),
    quantize: Literal["float8"] | None = typer.Option(
        None, help="Store the transformer's layers in float8 and multiply in it: less memory, faster on sm_89 or later."
    ),
    sheet: bool = typer.Option(True, "--sheet/--no-sheet", help="Write all images on one page too."),
    device: str | None = typer.Option(None, help="cpu or cuda; default: a GPU where there is one."),
    nproc: str = typer.Option("1", metavar="N", help="Ranks to start, or `auto`: one a GPU."),
) -> None:
    """Draw images. Each has its whole recipe in its metadata, and depends on its prompt and seed only."""
    no_flags(ctx)
    output = output_of(ctx)
    texts = read_prompts(prompt, prompts)
    pixels = None if size is None else _size(size)
    from titan_cli import launch, worker

    ranks = launch.Ranks.of(nproc)
    if ranks.must_spawn:
        raise typer.Exit(launch.spawn(ranks, 30, output, words_of(ctx)))
    from titan_cli.display import Display
    from titan_core.jobs import generate_flux as job

    options = job.Options(
        pixels, steps, guidance, real_guidance, shift, seed, num_images, batch_size, out,
        _encoders(encoders, t5, clip, autoencoder), compiled, sheet, quantize,
    )  # fmt: skip
    with Display(output) as display, worker.worker_listener(display) as listener:
        result = job.run(checkpoint, texts, options, device=device, listener=listener)
    if not worker.is_main_rank():
        return
    paths = [image.path for image in result.images] + ([result.sheet] if result.sheet else [])
    output.result("\n".join(paths), **dataclasses.asdict(result))
    steady = "" if result.images_per_second is None else f", then {result.images_per_second:.2f} images/s"
    output.say(f"{len(result.images)} images, the first after {result.seconds_to_first_image:.1f} s{steady}")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UsageError(f"`--size` cannot be `{text}`", tip="WIDTHxHEIGHT in pixels, e.g. 1024x768")
    return int(width), int(height)


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """Return the prompts of `--prompt` (or stdin) and of a file."""
    found = []
    if prompt == "-":
        found.append(sys.stdin.read())
    elif prompt is not None:
        found.append(prompt)
    if file is None:
        return found
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the prompts: {error}", where=str(file)) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if file.suffix == ".jsonl":
            try:
                found.append(str(json.loads(line)["prompt"]))
            except (ValueError, KeyError, TypeError):
                where = f"{file}:{number}"
                raise UsageError('not a JSON object with "prompt"', where=where) from None
        else:
            found.append(line)
    if not found:
        raise UsageError("the file has no prompts", where=str(file))
    return found


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(" ", "").split(",")]
    except ValueError:
        raise UsageError(f"`--prompt-ids` cannot be `{text}`", tip="numbers with commas between, e.g. 1,2,3") from None


def _encoders(together: str | None, t5: str | None, clip: str | None, autoencoder: str | None) -> dict[str, str]:
    """Return where encoders are to be found instead of where the checkpoint says."""
    named = {"t5_encoder": t5, "clip_encoder": clip, "autoencoder_path": autoencoder}
    return {key: place for key, own in named.items() if (place := own or together) is not None}
