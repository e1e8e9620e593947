"""`titan generate`: text from a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import typer

from titan_cli.context import no_flags, output_of
from titan_core.runtime.errors import UsageError

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    help="Generate text with a trained model.",
    epilog='\b\nExample:\n  titan generate llm --checkpoint outputs/llama3_debugmodel --prompt "def main():"',
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
