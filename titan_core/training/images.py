"""Runs of text-to-image models: pictures and captions, encoded, become points on the way from image to noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_core.config.schema import Config
from titan_core.data.encoded import EncodedSamples, Plan
from titan_core.data.loader import BatchLoader
from titan_core.data.open_pictures import open_pictures
from titan_core.data.samples import SampleBatch, SampleSlice, build_sample_loader
from titan_core.declare.family import Family
from titan_core.nn import flow
from titan_core.nn.latents import coordinates, pack, unpack
from titan_core.nn.random import normal_rows
from titan_core.parallel.data_parallel import shard_frozen
from titan_core.parallel.exchange import all_gather
from titan_core.parallel.mesh import Mesh
from titan_core.runtime.errors import ConfigError, Problem
from titan_core.runtime.events import Listener, Sampled
from titan_core.runtime.png import png
from titan_core.tasks.encoders import Encoders, Place, Shard, Tokenizers, Widths, load_autoencoder, load_text_encoders
from titan_core.tasks.flow_matching import BUCKETS, Draws, FlowBatch, FlowMatching, bucket_times, mix
from titan_core.tasks.flow_sampling import Conditions, as_bytes, sample

if TYPE_CHECKING:
    from titan_core.training.build import Parts

_VALIDATION_SEED = 0  # the same noise at every validation of every run


class Images:
    """Encoders are loaded as far as they are needed: stored encodings need none, but to show images."""

    def __init__(self, config: Config, family: Family, sizes: Any) -> None:
        self.config, self.sizes = config, sizes
        self.lengths = family.lengths(config)
        self.side = config.training.img_size // (2 * config.encoder.autoencoder_factor)  # image rows a side
        self.device = torch.device("cpu")
        self.draws = Draws(0, config.flow_matching, config.training.classifier_free_guidance_prob)
        self.source: Any = None
        self._shard: Shard | None = None
        self._texts: Tokenizers | None = None
        self._autoencoder: Any = None
        self._empty: tuple[Tensor, Tensor] | None = None

    def tasks(self, mesh: Mesh) -> tuple[Callable[[nn.Module, bool], nn.Module], list[str]]:
        """Return what makes a task of a model."""
        return lambda model, staged: FlowMatching(model), []

    def blank(self, rows: int) -> FlowBatch:
        """Return a batch of zeros."""
        images = torch.zeros(rows, self.lengths["image"], self.sizes.in_channels)
        text = torch.zeros(rows, self.lengths["text"], self.sizes.context_dim)
        pooled = torch.zeros(rows, self.sizes.vector_dim)
        return self._batch(images, images.clone(), torch.zeros(rows), (text, pooled))

    def open(self, mesh: Mesh, device: torch.device, seed: int, listener: Listener) -> None:
        """Open the data, and load the encoders unless it is encoded; those of texts are sharded where the model is."""
        training = self.config.training
        self._shard = partial(shard_frozen, mesh=mesh) if mesh.layout.fsdp > 1 else None
        self.device, self.draws = device, replace(self.draws, seed=seed)
        self.source = open_pictures(
            training.dataset, training.dataset_path, self.config.data,
            size=training.img_size, validation=False, listener=listener,
        )  # fmt: skip
        if isinstance(self.source, EncodedSamples):
            self._check_plan(self.source.plan)
            self._empty = tuple(x.to(device) for x in self.source.empty())  # pyright: ignore[reportAttributeAccessIssue]
        else:
            self.encoders()

    def _check_plan(self, plan: Plan) -> None:
        """Look that stored samples have the sizes of this run."""
        encoder, stored = self.config.encoder, plan.encoders
        wanted = {
            "training.img_size": (self.config.training.img_size, plan.img_size),
            "encoder.max_t5_encoding_len": (encoder.max_t5_encoding_len, stored["max_t5_encoding_len"]),
            "encoder.autoencoder_factor": (encoder.autoencoder_factor, stored["autoencoder_factor"]),
        }
        wrong = [
            Problem(key, f"`{key}` is {mine}, and the samples are encoded with {theirs}", tip="or encode again")
            for key, (mine, theirs) in wanted.items()
            if mine != theirs
        ]
        if wrong:
            raise ConfigError(wrong)

    def encoders(self) -> Encoders:
        """Return the encoders, loaded when they are first asked for."""
        config, place = self.config, Place.of(self.config.encoder, self.device)
        random = config.training.test_mode
        if self._texts is None:
            t5, clip = load_text_encoders(
                config.encoder, Widths.of(self.sizes), place, random=random, shard=self._shard
            )
            self._texts = Tokenizers(t5, clip)
        return Encoders(self._texts.t5, self._texts.clip, self.autoencoder(), place)

    def autoencoder(self) -> Any:
        """Return the autoencoder, loaded when it is first asked for."""
        if self._autoencoder is None:
            encoder, place = self.config.encoder, Place.of(self.config.encoder, self.device)
            found = load_autoencoder(
                encoder.autoencoder_path, encoder.autoencoder_factor, place, random=self.config.training.test_mode
            )
            channels = 3 * found.factor**2 if not hasattr(found, "sizes") else found.sizes.latent_channels
            if 4 * channels != self.sizes.in_channels:
                message = f"an image row is {4 * channels} numbers of this autoencoder, and the model takes "
                message += str(self.sizes.in_channels)
                raise ConfigError([Problem("encoder.autoencoder_path", message, tip="is it the one for this flavor?")])
            self._autoencoder = found
        return self._autoencoder

    def files(self) -> Mapping[str, bytes]:
        """Encoders are named by the config, not stored with every step."""
        return {}

    def loader(self, mesh: Mesh, rows: int, listener: Listener) -> BatchLoader:
        """Return the training loader of this rank."""
        return build_sample_loader(
            self.config,
            self.source,
            self._texts,
            global_batch_size=rows,
            seed=self.draws.seed,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.layout.dp,
            listener=listener,
        )

    # ------------------------------------------------------------------------------------------ what the model gets

    @torch.no_grad()
    def prepare(self, batch: SampleBatch) -> FlowBatch:
        """Encode, draw noise and time, leave out some captions."""
        latents_BIL = self._latents(batch, self.draws)
        t_B = self.draws.times(batch.numbers, self.lengths["image"])
        texts = self._captions(batch, self.draws.left_out(batch.numbers))
        made = self._batch(latents_BIL, self.draws.noise(batch.numbers, tuple(latents_BIL.shape[1:])), t_B, texts)
        return replace(made, counted_B=batch.counted)

    def _latents(self, batch: SampleBatch, draws: Draws) -> Tensor:
        """Return image rows drawn from what the autoencoder makes of the pixels, (B, I, L) fp32."""
        if batch.moments is not None:  # which are those of scaled latents
            mean, deviation = (x.float() for x in batch.moments)
        else:
            assert batch.pixels is not None
            encoders = self.encoders()
            mean, deviation = (x.float() for x in encoders.autoencoder.moments(encoders.pixels(batch.pixels)))
        noise = draws.latent_noise(batch.numbers, tuple(mean.shape[1:]))
        latents = torch.addcmul(mean, deviation, noise)
        return pack(latents if batch.moments is not None else self.autoencoder().scaled(latents))

    def _captions(self, batch: SampleBatch, left_out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return text rows and pooled texts, empty where a caption is left out."""
        texts = batch.texts
        if texts is None:
            assert batch.ids is not None
            encoders = self.encoders()
            texts = encoders.t5.encode(batch.ids[0]), encoders.clip.encode(batch.ids[1])
        if left_out is None or self.draws.dropout == 0:
            return texts
        (no_text, no_pooled), (text_B, pooled_B) = self.empty(), left_out
        return (
            torch.where(text_B[:, None, None], no_text.to(texts[0].dtype), texts[0]),
            torch.where(pooled_B[:, None], no_pooled.to(texts[1].dtype), texts[1]),
        )

    def empty(self) -> tuple[Tensor, Tensor]:
        """Return the encodings of an empty caption, (S, X) and (V)."""
        if self._empty is None:
            text, pooled = self.encoders().texts([""])
            self._empty = text[0], pooled[0]
        return self._empty

    def _batch(self, latents: Tensor, noise: Tensor, t_B: Tensor, texts: tuple[Tensor, Tensor]) -> FlowBatch:
        noisy, target = mix(latents, noise, t_B)
        ids = coordinates(self.side, self.side, self.lengths["text"], latents.device)
        return FlowBatch(noisy, t_B, *texts, ids, self._guidance(t_B), target)

    def _guidance(self, like_B: Tensor) -> Tensor | None:
        return torch.full_like(like_B, self.config.flow_matching.guidance) if self.sizes.guidance else None

    # ------------------------------------------------------------------------------------------ validation

    def validation(self, mesh: Mesh, listener: Listener) -> Iterable[SampleBatch]:
        """Return the validation slice."""
        if self._texts is None and not self._encoded_validation():
            self.encoders()
        return SampleSlice(self.config, self._texts, dp_rank=mesh.dp_rank, dp_size=mesh.layout.dp, listener=listener)

    def _encoded_validation(self) -> bool:
        path = self.config.validation.dataset_path
        return path is not None and (Path(path) / "encoded.json").exists()

    @torch.no_grad()
    def for_validation(self, batch: SampleBatch) -> Iterator[FlowBatch]:
        """Encode; sample n is at the (n mod 8)-th of eight times, or at each in turn, with noise of its own."""
        draws = replace(self.draws, seed=_VALIDATION_SEED)
        latents, texts = self._latents(batch, draws), self._captions(batch, None)
        noise = draws.noise(batch.numbers, tuple(latents.shape[1:]))
        for turn in range(BUCKETS if self.config.validation.all_timesteps else 1):
            buckets = (batch.numbers + turn) % BUCKETS
            made = self._batch(latents, noise, bucket_times(buckets), texts)
            yield replace(made, counted_B=batch.counted, buckets_B=buckets)

    def mean_loss(self, sums: list[float], weights: list[float]) -> tuple[float, float, Mapping[str, float]]:
        """Return the mean over all times; the parts are the means at each of them."""
        times = bucket_times(torch.arange(BUCKETS)).tolist()
        parts = {f"t={t:.4f}": s / w for t, s, w in zip(times, sums, weights, strict=True) if w}
        return sum(sums) / max(sum(weights), 1.0), sum(weights), parts

    # ------------------------------------------------------------------------------------------ images

    def show(self, parts: Parts, step: int, listener: Listener) -> None:
        """Draw images for the first captions of the validation data, each with noise of its own, and log them."""
        validation = self.config.validation
        captions = self._first_captions(validation.save_img_count)
        layout, at = parts.mesh.layout, parts.mesh.at
        each = -(-len(captions) // layout.dp)  # all ranks of a sharded model take equally many steps
        numbers = [min(parts.mesh.dp_rank * each + n, len(captions) - 1) for n in range(each)]
        found: list[tuple[int, Any]] = []
        for start in range(0, each, validation.local_batch_size):
            some = numbers[start : start + validation.local_batch_size]
            pixels = self._draw(parts, some, [captions[n] for n in some])
            found += list(zip(some, pixels, strict=True))
        if at["tp"] or at["cp"]:
            found = []
        every = _gather(found, parts.world.size)
        if parts.world.is_main and every:
            folder = Path(self.config.job.dump_folder) / validation.save_img_folder
            listener(_save(folder, step, every, captions))

    def _first_captions(self, count: int) -> list[str]:
        rows = self.config.validation.steps * self.config.validation.local_batch_size
        limit = count if count >= 0 else max(rows, 0) or None
        if limit == 0:
            return []
        source = SampleSlice(self.config, self._texts, dp_rank=0, dp_size=1, listener=lambda event: None)
        found: list[str] = []
        for batch in source:
            found += [text for text, good in zip(batch.captions, batch.counted.tolist(), strict=True) if good]
            if limit is not None and len(found) >= limit:
                break
        return found[:limit]

    def _draw(self, parts: Parts, numbers: list[int], captions: list[str]) -> list[Tensor]:
        """Draw images, (H, W, 3) uint8 each."""
        validation, encoders = self.config.validation, self.encoders()
        text, pooled = encoders.texts(captions)
        no_text, no_pooled = self.empty()
        guided = validation.enable_classifier_free_guidance
        conditions = Conditions(
            text, pooled, coordinates(self.side, self.side, self.lengths["text"], text.device),
            guidance=self.config.flow_matching.guidance if self.sizes.guidance else None,
            scale=validation.classifier_free_guidance_scale if guided else None,
            without=(no_text[None], no_pooled[None]),
        )  # fmt: skip
        shape = self.lengths["image"], self.sizes.in_channels
        noise = normal_rows(_VALIDATION_SEED, "images", torch.tensor(numbers, device=text.device), shape)
        times = flow.schedule(validation.denoising_steps, flow.shift_of(self.lengths["image"]))

        def velocity(batch: FlowBatch) -> Tensor:
            v = parts.parallel.evaluate(parts.cutter(batch))
            return v if parts.mesh.layout.cp == 1 else all_gather(v, 1, parts.mesh.cp_group)

        rows = sample(velocity, noise, conditions, times)
        latents = unpack(rows, 2 * self.side, 2 * self.side).to(encoders.place.dtype)
        return list(as_bytes(encoders.autoencoder.decode(latents)))


def _gather(found: list[tuple[int, Any]], size: int) -> dict[int, Any]:
    """Return what all ranks drew, by number."""
    every: list[Any] = [found]
    if size > 1:
        every = [None] * size
        dist.all_gather_object(every, found)
    return dict(sorted((pair for one in every for pair in one), key=lambda pair: pair[0]))


def _save(folder: Path, step: int, images: Mapping[int, Tensor], captions: list[str]) -> Sampled:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, image in images.items():
        height, width, _ = image.shape
        path = folder / f"step-{step:07d}-{number:03d}.png"
        path.write_bytes(png(image.numpy().tobytes(), width, height, {"prompt": captions[number]}))
        paths.append(str(path))
    return Sampled(step, paths, [captions[n] for n in images], [image.numpy() for image in images.values()])
