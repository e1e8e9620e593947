"""The frozen models that a text-to-image model is served by: two text encoders, and an autoencoder of images.

Texts are T5's states, row by row, and CLIP's one vector (both of transformers, extra `flux`). `embedded` ones need no
weights: a word is a fixed random vector, and an image the numbers of its blocks of pixels.

Shape letters: B batch, S text rows, X numbers of a text row, V numbers of a pooled text, R image channels, H and W
height and width, Z latent channels, h and w those of the latents.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_core.config import schema
from titan_core.interop.loading import fill
from titan_core.interop.mapping import work_out
from titan_core.interop.safetensors import SafetensorsSource
from titan_core.interop.views import OurView
from titan_core.models import family
from titan_core.nn.random import normal_rows
from titan_core.runtime.errors import CheckpointError, DataError, missing_extra

EMBEDDED = "embedded"
Shard = Callable[[nn.Module], None]
_CLIP_LENGTH = 77
_WORD = re.compile(r"[a-z0-9]+")


class TextEncoder(Protocol):
    """Texts to numbers, in two steps, of which only the second needs the device."""

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Return ids (B, S), int64; what is too long is cut."""
        ...

    def encode(self, ids_BS: Tensor) -> Tensor:
        """Return states (B, S, X), or pooled vectors (B, V)."""
        ...

    def release(self) -> None:
        """Free the weights; texts cannot be encoded any more."""
        ...


class Autoencoder(Protocol):
    """Pixels in [-1, 1] to latents of about unit deviation, and back."""

    @property
    def factor(self) -> int:
        """How many pixels a side of a latent covers."""
        ...

    def moments(self, pixels_BRHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of the latents, (B, Z, h, w) each, before they are scaled."""
        ...

    def scaled(self, latents_BZhw: Tensor) -> Tensor:
        """Return latents of about unit deviation."""
        ...

    def decode(self, latents_BZhw: Tensor) -> Tensor:
        """Return the pixels of scaled latents, (B, R, H, W)."""
        ...


@dataclass(frozen=True)
class Widths:
    """What a model wants of its encoders: numbers of a text row, of a pooled text, and of an image row."""

    text: int
    pooled: int
    image: int

    @staticmethod
    def of(sizes: Any) -> Widths:
        """Read them off a model's sizes."""
        return Widths(sizes.context_dim, sizes.vector_dim, sizes.in_channels)


# ---------------------------------------------------------------------------------------------- texts


class Words:
    """A word is a random vector that depends on its letters only; a text is its words in order, or their sum."""

    def __init__(self, width: int, length: int, device: torch.device, *, pooled: bool) -> None:
        self.width, self.length, self.device, self.pooled = width, length, device, pooled

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Return a hash of each word, 0 where there is none."""
        ids = np.zeros((len(texts), self.length), dtype=np.int64)
        for row, text in enumerate(texts):
            for place, word in enumerate(_WORD.findall(text.lower())[: self.length]):
                ids[row, place] = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "little") + 1
        return ids

    def encode(self, ids_BS: Tensor) -> Tensor:
        """Return words with a trace of their place (B, S, X), or their sum over the root of their number (B, V)."""
        ids_BS = ids_BS.to(self.device)
        words_BSX = normal_rows(0, "word", ids_BS.flatten(), (self.width,)).view(*ids_BS.shape, self.width)
        there_BS1 = (ids_BS != 0).unsqueeze(-1)
        if self.pooled:
            return (words_BSX * there_BS1).sum(1) / there_BS1.sum(1).clamp(min=1).sqrt()
        places_S = torch.arange(self.length, device=self.device)
        return (words_BSX + 0.5 * normal_rows(0, "place", places_S, (self.width,))) * there_BS1

    def release(self) -> None:
        """There are no weights."""


class Pretrained:
    """T5's encoder or CLIP's text encoder, of transformers. Padding is attended to, as Flux was trained.

    `shard`, if there is one, lays the model out over ranks, which then must encode equally often.
    """

    def __init__(
        self, kind: Literal["t5", "clip"], source: str, length: int, place: Place, *, random: bool, shard: Shard | None
    ) -> None:
        self.kind, self.length, self.device = kind, length, place.device
        weights, tokenizer = _text_folders(source, kind)
        transformers = _transformers()
        cls = transformers.T5EncoderModel if kind == "t5" else transformers.CLIPTextModel
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
            if random:
                model = cls(transformers.AutoConfig.from_pretrained(weights))
            else:
                model = cls.from_pretrained(weights, dtype=place.dtype)
        except (OSError, ValueError) as error:
            key = "encoder.t5_encoder" if kind == "t5" else "encoder.clip_encoder"
            reason = str(error).strip().split("\n")[0]
            tip = f"`titan download {source} --to DIR` and `--{key} DIR`, or `--{key} {EMBEDDED}` for the debug model"
            raise DataError(f"no {kind.upper()} text encoder `{source}`: {reason}", where=key, tip=tip) from error
        self.model: Any = model.to(place.dtype).eval().requires_grad_(False)
        if shard is None:
            self.model.to(place.device)
        else:
            shard(self.model)

    @property
    def width(self) -> int:
        """Numbers of a row, or of a pooled text."""
        config = self.model.config
        return config.d_model if self.kind == "t5" else config.hidden_size

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Return ids, padded to the full length."""
        found = self.tokenizer(
            list(texts), max_length=self.length, padding="max_length", truncation=True, return_tensors="np"
        )
        return found["input_ids"].astype(np.int64)

    @torch.no_grad()
    def encode(self, ids_BS: Tensor) -> Tensor:
        """Return the last states of T5, or CLIP's pooled text."""
        out = self.model(ids_BS.to(self.device))
        return out.last_hidden_state if self.kind == "t5" else out.pooler_output

    def release(self) -> None:
        """Free the weights."""
        self.model = None


def _text_folders(source: str, kind: str) -> tuple[str, str]:
    """Return where weights and tokenizer are: one folder or repository, or two folders of a diffusers pipeline."""
    folder = Path(source)
    if (folder / "model_index.json").exists():
        number = "_2" if kind == "t5" else ""
        return str(folder / f"text_encoder{number}"), str(folder / f"tokenizer{number}")
    return source, source


def _transformers() -> Any:
    try:
        import transformers  # 4 s
    except ImportError:
        raise missing_extra("transformers", "flux") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


# ---------------------------------------------------------------------------------------------- images


class Blocks:
    """Latents are the pixels of a block, scaled: exact both ways, but as many numbers as the image has."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def moments(self, pixels_BRHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the blocks, without spread."""
        mean = F.pixel_unshuffle(pixels_BRHW, self.factor)
        return mean, torch.zeros_like(mean)

    def scaled(self, latents_BZhw: Tensor) -> Tensor:
        """Return the blocks as they are."""
        return latents_BZhw

    def decode(self, latents_BZhw: Tensor) -> Tensor:
        """Put the blocks side by side."""
        return F.pixel_shuffle(latents_BZhw, self.factor)


def load_autoencoder(source: str, factor: int, place: Place, *, random: bool = False) -> Any:
    """Load the autoencoder of a file like `ae.safetensors`, a folder of diffusers, or a whole pipeline of diffusers."""
    key = "encoder.autoencoder_path"
    if source == EMBEDDED:
        return Blocks(factor)
    known = family("flux_autoencoder")
    assert known.weights is not None
    assert known.weights.single is not None
    if random and not Path(source).exists():
        sizes, view = known.flavors["flux"], None
    else:
        path = Path(source)
        path = path / "vae" if (path / "model_index.json").exists() else path
        if not path.exists():
            tip = f"`titan download black-forest-labs/FLUX.1-schnell`, or `--{key} {EMBEDDED}` for the debug model"
            raise CheckpointError(f"no autoencoder at `{source}`", where=key, tip=tip)
        raw = SafetensorsSource(path)
        if path.is_file():
            sizes = known.weights.single.read_shapes({name: shape for name, (shape, _) in raw.index.items()})
            if sizes is None:
                raise CheckpointError("the file holds no autoencoder of Flux", where=str(path))
            rules = known.weights.single.rules(sizes)
        else:
            sizes = known.weights.read_config(json.loads((path / "config.json").read_text()))
            rules = known.weights.rules(sizes)
        mapping = work_out(rules, known.parameters(sizes))
        mapping.check_theirs(raw.index, str(path))
        view = OurView(raw, mapping)
    with torch.device("meta"):
        model = known.build(sizes).to(place.dtype)
    model.to_empty(device=place.device)
    if view is not None and not random:
        fill(view, dict(model.named_parameters()))
    else:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    if sizes.factor != factor:
        message = f"a side of the autoencoder's latents covers {sizes.factor} pixels, not {factor}"
        raise DataError(message, where="encoder.autoencoder_factor", tip=f"set it to {sizes.factor}")
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------- all three


@dataclass(frozen=True)
class Place:
    """Where and in which dtype encoders compute."""

    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def of(config: schema.Encoder, device: torch.device) -> Place:
        """Resolve `auto`."""
        if config.dtype == "auto":
            return Place(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        return Place(device, torch.bfloat16 if config.dtype == "bfloat16" else torch.float32)


@dataclass(frozen=True)
class Tokenizers:
    """The part of the text encoders that data workers do."""

    t5: TextEncoder
    clip: TextEncoder

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids for both."""
        return self.t5.tokenize(texts), self.clip.tokenize(texts)


@dataclass(frozen=True)
class Encoders:
    """Both text encoders and the autoencoder."""

    t5: TextEncoder
    clip: TextEncoder
    autoencoder: Autoencoder
    place: Place

    def texts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return text rows (B, S, X) and pooled texts (B, V)."""
        return tuple(encoder.encode(torch.from_numpy(encoder.tokenize(captions))) for encoder in (self.t5, self.clip))  # pyright: ignore[reportReturnType]

    def pixels(self, pixels_BRHW: Tensor) -> Tensor:
        """Return bytes (uint8) as what the autoencoder takes."""
        return pixels_BRHW.to(self.place.dtype) / 127.5 - 1


def load_text_encoders(
    config: schema.Encoder, widths: Widths, place: Place, *, random: bool = False, shard: Shard | None = None
) -> tuple[TextEncoder, TextEncoder]:
    """Load what the config names; raises `DataError` if it is not there, or does not fit the model."""
    found: list[TextEncoder] = []
    wanted: tuple[tuple[Literal["t5", "clip"], str, int], ...]
    wanted = ("t5", config.t5_encoder, widths.text), ("clip", config.clip_encoder, widths.pooled)
    for kind, source, width in wanted:
        length = config.max_t5_encoding_len
        if source == EMBEDDED:
            found.append(Words(width, length, place.device, pooled=kind == "clip"))
            continue
        length = length if kind == "t5" else _CLIP_LENGTH
        encoder = Pretrained(kind, source, length, place, random=random, shard=shard)
        if encoder.width != width:
            message = f"`{source}` gives {encoder.width} numbers, the model takes {width}"
            raise DataError(message, where=f"encoder.{kind}_encoder", tip="is it the encoder that Flux was made for?")
        found.append(encoder)
    return found[0], found[1]


def load_encoders(config: schema.Encoder, widths: Widths, device: torch.device, *, random: bool = False) -> Encoders:
    """Load all three."""
    place = Place.of(config, device)
    t5, clip = load_text_encoders(config, widths, place, random=random)
    autoencoder = load_autoencoder(config.autoencoder_path, config.autoencoder_factor, place, random=random)
    return Encoders(t5, clip, autoencoder, place)
