"""`titan generate flux`: prompts in, images out, each with its whole recipe in its metadata."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from titan_core.generation.images import Drawer, Recipe
from titan_core.jobs.contact_sheet import Sheet
from titan_core.jobs.flux_source import FluxSource, open_flux
from titan_core.quantization import stored
from titan_core.runtime import distributed
from titan_core.runtime.distributed import World
from titan_core.runtime.errors import RunFailed, UsageError
from titan_core.runtime.events import Listener, Note, Progress, silent
from titan_core.runtime.png import png
from titan_core.runtime.version import titan_version
from titan_core.tasks.encoders import Encoders, Place, Widths, load_autoencoder, load_text_encoders

_DEV_GUIDANCE, _REAL_GUIDANCE = 3.5, 3.0
_DEV_STEPS, _FEW_STEPS = 28, 4


@dataclass(frozen=True)
class Options:
    """What to draw; None is what suits the model. `size` is (width, height) in pixels. `quantize` stores the weights of
    the transformer's layers in float8 and multiplies in it."""

    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    real_guidance: float | None = None
    shift: bool | None = None
    seed: int = 0
    num_images: int = 1
    batch_size: int | None = None
    out: str | None = None
    encoders: dict[str, str] = field(default_factory=dict)
    compiled: bool | None = None
    sheet: bool = True
    quantize: Literal["float8"] | None = None


@dataclass(frozen=True)
class Image:
    """One image that was drawn."""

    path: str
    prompt: str
    seed: int
    number: int


@dataclass(frozen=True)
class FluxResult:
    """What was drawn, and how fast: seconds to the first batch of images, and images a second of all ranks after it."""

    checkpoint: str
    images: list[Image]
    sheet: str | None
    recipe: dict[str, Any]
    seconds: float
    seconds_to_first_image: float
    images_per_second: float | None


def run(
    checkpoint: str,
    prompts: Sequence[str],
    options: Options | None = None,
    *,
    device: str | None = None,
    listener: Listener = silent,
) -> FluxResult:
    """Draw `num_images` images of each prompt on all ranks of the job, which take turns and need not have equally many.

    Image n of a prompt has the seed `seed + n`, whatever is drawn beside it and wherever.
    """
    options, began = options or Options(), time.perf_counter()
    world = distributed.start(7 * 86400, device)  # ranks wait for each other at the end only, however long it takes
    try:
        source = open_flux(checkpoint, options.encoders)
        prompts = list(prompts) or _prompts_of(source)
        recipe = recipe_of(source, options)
        every = [(p, prompt, n) for p, prompt in enumerate(prompts) for n in range(options.num_images)]
        work = _Work(source, recipe, options, world, checkpoint, listener)
        mine, speed = work.draw(every[world.rank :: world.size], total=len(every))
        return _together(mine, speed, work, every, time.perf_counter() - began)
    finally:
        distributed.stop()


def recipe_of(source: FluxSource, options: Options) -> Recipe:
    """Fill in what nobody said: as the model was made for, or as the run that trained it validates."""
    config, guided = source.config, source.sizes.guidance
    side = 1024 if config is None else (config.inference.img_size or config.training.img_size)
    width, height = options.size or (side, side)
    unit = 2 * source.encoder.autoencoder_factor
    if width % unit or height % unit:
        near = f"{max(1, round(width / unit)) * unit}x{max(1, round(height / unit)) * unit}"
        raise UsageError(f"`--size {width}x{height}` is not made of multiples of {unit} pixels", tip=f"e.g. {near}")
    steps = _FEW_STEPS if source.few_steps else _DEV_STEPS
    real = options.real_guidance
    if config is not None:
        steps = config.validation.denoising_steps
    if not guided and options.guidance is not None:
        if real is not None:
            raise UsageError(
                "this model has no distilled guidance: `--guidance` and `--real-guidance` are the same to it"
            )
        real = options.guidance
    elif not guided and real is None and config is not None and config.training.classifier_free_guidance_prob > 0:
        validation = config.validation
        chosen = validation.classifier_free_guidance_scale if validation.enable_classifier_free_guidance else None
        real = _REAL_GUIDANCE if chosen is None else chosen
    told = None
    if guided:
        told = options.guidance if options.guidance is not None else _DEV_GUIDANCE
    shift = not source.few_steps if options.shift is None else options.shift
    return Recipe(width, height, options.steps or steps, told, None if real == 1 else real, shift)


def _prompts_of(source: FluxSource) -> list[str]:
    path = source.config.inference.prompts_path if source.config is not None else ""
    if not path:
        raise UsageError("there is no prompt", tip="give --prompt or --prompts")
    try:
        found = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UsageError(f"cannot read the prompts: {error}", where="inference.prompts_path") from None
    if not found:
        raise UsageError("the file has no prompts", where=path)
    return found


@dataclass
class _Work:
    """One rank's share."""

    source: FluxSource
    recipe: Recipe
    options: Options
    world: World
    checkpoint: str
    listener: Listener
    thumbs: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = Place.of(self.source.encoder, self.world.device)
        config = self.source.config
        default = 1 if config is None else config.inference.local_batch_size
        self.batch_size = self.options.batch_size or default
        folder = "flux_images"
        if config is not None:
            folder = os.path.join(config.job.dump_folder, config.inference.save_img_folder)
        self.folder = Path(self.options.out or folder)
        note = stored.check_device(self.world.device) if self.options.quantize else None
        if note and self.world.is_main:
            self.listener(Note(note))

    def told(self) -> dict[str, Any]:
        """Return how images are drawn, as it is told to people."""
        return {**dataclasses.asdict(self.recipe), "quantize": self.options.quantize}

    def draw(self, mine: list[tuple[int, str, int]], total: int) -> tuple[list[Image], tuple[float, int, float]]:
        """Draw this rank's images and write each as soon as it is there; returns them with (seconds to the first batch,
        images after it, seconds for these)."""
        if not mine:
            return [], (0.0, 0, 0.0)
        began = time.perf_counter()
        encoded = self._encoded(sorted({prompt for _, prompt, _ in mine}))
        compiled = self.place.device.type == "cuda" if self.options.compiled is None else self.options.compiled
        encoder = self.source.encoder
        autoencoder = load_autoencoder(encoder.autoencoder_path, encoder.autoencoder_factor, self.place)
        model = self.source.model(self.place, compiled=compiled, float8=self.options.quantize == "float8")
        drawer = Drawer(model, self.source.sizes, autoencoder, self.place)
        _make_folder(self.folder)
        images: list[Image] = []
        first = 0.0
        for batch in _batches(mine, self.batch_size):
            images += self._batch(drawer, encoded, batch, len(images), len(mine))
            first = first or time.perf_counter() - began
        return images, (first, len(images) - min(self.batch_size, len(mine)), time.perf_counter() - began - first)

    def _batch(
        self, drawer: Drawer, encoded: dict[str, tuple[Tensor, Tensor]], batch: list[Any], done: int, of: int
    ) -> list[Image]:
        text, pooled = (torch.stack([encoded[prompt][i] for _, prompt, _ in batch]) for i in range(2))
        without = None
        if self.recipe.real_guidance is not None:
            without = encoded[""][0][None], encoded[""][1][None]
        seeds, steps = [self.options.seed + n for _, _, n in batch], self.recipe.steps
        name = "draw" if self.world.size == 1 else f"draw 1/{self.world.size}"

        def on_step(step: int) -> None:
            self.listener(Progress(name, done * steps + step * len(batch), of * steps, "steps"))

        pixels = drawer.draw((text, pooled), without, seeds, self.recipe, on_step)
        return [
            self._save(image, number, prompt, n, seed)
            for image, (number, prompt, n), seed in zip(pixels.unbind(), batch, seeds, strict=True)
        ]

    def _save(self, pixels: Tensor, number: int, prompt: str, n: int, seed: int) -> Image:
        height, width, _ = pixels.shape
        path = self.folder / f"{number:04d}-{n:02d}.png"
        said = {"prompt": prompt, "seed": seed, "checkpoint": self.checkpoint, **self.told()}
        said |= {"model": self.source.opened.known_family().name, "titan": titan_version()}
        content = png(pixels.numpy().tobytes(), width, height, {"prompt": prompt, "titan": json.dumps(said)})
        try:
            path.write_bytes(content)
        except OSError as error:
            raise RunFailed(f"cannot write an image: {error.strerror}", where=str(path)) from error
        place = number * self.options.num_images + n
        if self.options.sheet:
            self.thumbs[place] = Sheet.thumb(pixels)
        return Image(str(path), prompt, seed, place)

    def _encoded(self, prompts: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
        """Encode each text once, before the transformer is loaded, and free the text encoders: never are both there."""
        texts = prompts if self.recipe.real_guidance is None else [*prompts, ""]
        t5, clip = load_text_encoders(self.source.encoder, Widths.of(self.source.sizes), self.place)
        encoders = Encoders(t5, clip, None, self.place)  # pyright: ignore[reportArgumentType]
        found = {}
        for number, text in enumerate(texts, 1):
            rows, pooled = encoders.texts([text])
            found[text] = rows[0].to("cpu", self.place.dtype), pooled[0].to("cpu", self.place.dtype)
            self.listener(Progress("encode", number, len(texts), "prompts"))
        t5.release()
        clip.release()
        if self.place.device.type == "cuda":
            torch.cuda.empty_cache()
        if any(hasattr(encoder, "model") for encoder in (t5, clip)) and self.world.is_main:
            self.listener(Note(f"{len(texts)} prompts are encoded; the text encoders are freed again"))
        return found


def _batches(mine: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(mine), size):
        yield mine[start : start + size]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFailed(
            f"cannot make the folder: {error.strerror}", where=str(folder), tip="choose another --out"
        ) from error


def _together(
    mine: list[Image], speed: tuple[float, int, float], work: _Work, every: list[Any], seconds: float
) -> FluxResult:
    """Gather what all ranks drew; the main rank makes the contact sheet."""
    found: list[Any] = [(mine, speed, work.thumbs)]
    if work.world.size > 1:
        found = [None] * work.world.size
        dist.all_gather_object(found, (mine, speed, work.thumbs))
    images = sorted((image for one, _, _ in found for image in one), key=lambda image: image.number)
    thumbs = {number: thumb for _, _, some in found for number, thumb in some.items()}
    sheet = None
    if work.world.is_main and work.options.sheet and len(thumbs) > 1:
        sheet = str(work.folder / "sheet.png")
        captions = [prompt for _, prompt, _ in every]
        note = Sheet([thumbs[n] for n in sorted(thumbs)], captions, work.options.num_images).write(Path(sheet))
        if note:
            work.listener(Note(note))
    later = [(count, took) for _, (_, count, took), _ in found if count > 0]
    rate = sum(count / took for count, took in later) if later else None
    first = max((one[0] for _, one, _ in found), default=0.0)
    return FluxResult(work.checkpoint, images, sheet, work.told(), seconds, first, rate)
