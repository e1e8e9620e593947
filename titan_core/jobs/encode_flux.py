"""`titan data encode-flux`: run the frozen encoders over a data set once, so that training need not load them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titan_core.checkpoint.agreement import Ranks
from titan_core.config.load import Resolved
from titan_core.config.schema import Config
from titan_core.data.encoded import EncodedSamples, Plan, write_empty, write_plan, write_samples
from titan_core.data.open_pictures import open_pictures
from titan_core.data.pictures import Picture, Problem, prepare
from titan_core.data.samples import crop_place
from titan_core.models import resolve
from titan_core.runtime import distributed
from titan_core.runtime.distributed import World
from titan_core.runtime.errors import ConfigError, UsageError
from titan_core.runtime.errors import Problem as ConfigProblem
from titan_core.runtime.events import Listener, Note, Progress, Warned, silent
from titan_core.tasks.encoders import Encoders, Widths, load_encoders

_ENCODERS = ("t5_encoder", "clip_encoder", "autoencoder_path", "max_t5_encoding_len", "autoencoder_factor")


@dataclass(frozen=True)
class EncodeResult:
    """What is in the folder now. `left_out` are pictures that could not be used, `kept` files that were there."""

    path: str
    samples: int
    files: int
    kept: int
    left_out: int
    bytes: int
    seconds: float


def run(
    resolved: Resolved,
    out: str,
    *,
    samples: int | None = None,
    per_file: int = 1024,
    validation: bool = False,
    listener: Listener = silent,
) -> EncodeResult:
    """Encode the training data of a config (or its validation data) into `out`, every rank some of the files.

    Files that are there are kept: a call that was killed goes on. `samples` is how many to take of a data set without
    an end, or fewer than there are.
    """
    began, config = time.perf_counter(), resolved.config
    family, sizes = resolve(config.model)
    if family.task != "flow_matching":
        message = f"`{family.name}` has no encoders"
        raise ConfigError([ConfigProblem("model.name", message, "model.name", tip="e.g. the recipe flux_dev")])
    world = distributed.start(7 * 86400)
    try:
        source = _source(config, validation, listener)
        if isinstance(source, EncodedSamples):
            raise UsageError("these samples are encoded already", where=str(source.folder))
        total = len(source) if hasattr(source, "__len__") else None
        count = min(x for x in (samples, total) if x is not None) if samples or total else None
        if count is None:
            raise UsageError("this data set says no length", tip="--samples N takes its first N")
        plan = Plan(
            source.fingerprint, config.training.img_size,
            {key: getattr(config.encoder, key) for key in _ENCODERS}, count, per_file,
        )  # fmt: skip
        folder, ranks = Path(out), Ranks.present()
        ranks.agree(lambda: write_plan(folder, plan) if world.is_main else None, out)
        encode = _Encode(config, sizes, plan, folder, world, listener)
        left_out, kept = encode.files(source)
        totals = ranks.gather((left_out, kept), out)
        stored = EncodedSamples(folder)
        return EncodeResult(
            out, len(stored), plan.files, sum(k for _, k in totals), sum(n for n, _ in totals),
            sum(file.stat().st_size for file in folder.iterdir()), time.perf_counter() - began,
        )  # fmt: skip
    finally:
        distributed.stop()


def _source(config: Config, validation: bool, listener: Listener) -> Any:
    section = config.validation if validation else config.training
    return open_pictures(
        section.dataset, section.dataset_path, config.data,
        size=config.training.img_size, validation=validation, listener=listener,
    )  # fmt: skip


@dataclass
class _Encode:
    """One rank's work."""

    config: Config
    sizes: Any
    plan: Plan
    folder: Path
    world: World
    listener: Listener
    left_out: int = 0
    _encoders: Encoders | None = None

    def encoders(self) -> Encoders:
        """Return the encoders, loaded when there is something to encode."""
        if self._encoders is None:
            random = self.config.training.test_mode
            widths = Widths.of(self.sizes)
            self._encoders = load_encoders(self.config.encoder, widths, self.world.device, random=random)
        return self._encoders

    def files(self, source: Any) -> tuple[int, int]:
        """Write the files of this rank that are not there; returns pictures left out, and files that were there."""
        mine = range(self.world.rank, self.plan.files, self.world.size)
        todo = [number for number in mine if not (self.folder / self.plan.name(number)).exists()]
        if self.world.is_main and not (self.folder / "empty.safetensors").exists():
            text, pooled = self.encoders().texts([""])
            write_empty(self.folder, _stored(text[0]), _stored(pooled[0]))
        if len(todo) < len(mine) and self.world.is_main:
            self.listener(Note(f"going on: {len(mine) - len(todo)} of {len(mine)} files are there"))
        for done, (number, pictures) in enumerate(self._pictures(source, set(todo))):
            self._file(number, pictures)
            if self.world.is_main:
                self.listener(Progress("encode", done + 1, len(todo), "files"))
        return self.left_out, len(mine) - len(todo)

    def _pictures(self, source: Any, wanted: set[int]) -> Iterator[tuple[int, Iterator[tuple[int, Any]]]]:
        """Yield the numbers of files with (number, picture) of each; of a stream others are read over."""
        size, last = self.plan.per_file, self.plan.samples
        if hasattr(source, "__len__"):
            for number in sorted(wanted):
                some = range(number * size, min((number + 1) * size, last))
                yield number, ((n, source.item(n)) for n in some)
            return
        waiting: list[tuple[int, Any]] = []
        for n, picture in zip(range(last), source.read(None), strict=False):
            number = n // size
            if number in wanted:
                waiting.append((n, picture))
            if waiting and (n + 1 == last or (n + 1) % size == 0):
                yield number, iter(waiting)
                waiting = []

    def _file(self, number: int, pictures: Iterator[tuple[int, Any]]) -> None:
        """Encode and write one file."""
        parts: list[dict[str, Tensor]] = []
        captions: list[str] = []
        batch: list[tuple[np.ndarray, str]] = []
        for n, picture in pictures:
            ready = self._prepared(n, picture)
            if ready is not None:
                batch.append(ready)
            if len(batch) == self.config.training.local_batch_size:
                parts.append(self._encoded(batch))
                captions += [caption for _, caption in batch]
                batch = []
        if batch:
            parts.append(self._encoded(batch))
            captions += [caption for _, caption in batch]
        if not parts:
            raise UsageError(f"none of the pictures of {self.plan.name(number)} can be used", where=str(self.folder))
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        write_samples(self.folder, self.plan.name(number), joined, captions)

    def _prepared(self, number: int, picture: Any) -> tuple[np.ndarray, str] | None:
        found = picture
        if isinstance(picture, Picture):
            found = prepare(picture, self.plan.img_size, crop_place(number))
        if isinstance(found, Problem):
            self.left_out += 1
            if self.left_out in (1, 10, 100, 1000, 10_000):
                self.listener(Warned(f"{self.left_out} pictures are left out by now: {found.reason} ({found.where})"))
            return None
        return found, picture.caption

    @torch.no_grad()
    def _encoded(self, batch: list[tuple[np.ndarray, str]]) -> dict[str, Tensor]:
        """Return moments of scaled latents and both encodings."""
        encoders = self.encoders()
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in batch])).to(self.world.device)
        mean, deviation = encoders.autoencoder.moments(encoders.pixels(pixels))
        text, pooled = encoders.texts([caption for _, caption in batch])
        scaled = encoders.autoencoder.scaled(mean.float())
        factor = encoders.autoencoder.scaled(torch.ones(1)) - encoders.autoencoder.scaled(torch.zeros(1))
        spread = deviation.float() * factor.to(deviation.device)
        found = {"mean": scaled, "deviation": spread, "text": text, "pooled": pooled}
        return {name: _stored(x) for name, x in found.items()}


def _stored(x: Tensor) -> Tensor:
    return x.to("cpu", torch.bfloat16)
