"""What `titan generate flux` draws with: a folder of diffusers, a single file, or a run of titan, and its encoders."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from titan_core.config import schema
from titan_core.config.load import from_dict
from titan_core.interop.loading import fill
from titan_core.jobs import foreign
from titan_core.jobs.foreign import Opened
from titan_core.nn.layers import set_parameter_dtype
from titan_core.parallel.parallelize import find
from titan_core.quantization import stored
from titan_core.runtime.errors import CheckpointError, UsageError
from titan_core.tasks.encoders import Place

_MISSING = schema.Encoder(t5_encoder="", clip_encoder="", autoencoder_path="")


@dataclass(frozen=True)
class FluxSource:
    """Opened weights, where the encoders are, and how such a model is sampled where nobody says else.

    `few_steps` says that the model is distilled to few steps, evenly spaced; `config` is that of the run, if titan
    trained it.
    """

    opened: Opened
    encoder: schema.Encoder
    few_steps: bool
    config: schema.Config | None = None

    @property
    def sizes(self) -> Any:
        """The model's sizes."""
        return self.opened.sizes

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has."""
        return sum(p.numel for p in self.opened.known_family().parameters(self.sizes))

    def model(self, place: Place, *, compiled: bool, float8: bool = False) -> nn.Module:
        """Load the model, to be called without gradients; layers that are to be float8 one by one, so that the device
        never holds them all in another dtype."""
        family = self.opened.known_family()
        with torch.device("meta"):
            model = family.build(self.sizes)
            set_parameter_dtype(model, place.dtype)
        for name, layer in stored.layers(model, family, self.sizes).items() if float8 else ():
            layer.to_empty(device=place.device)
            fill(self.opened.ours, {f"{name}.{key}": value for key, value in layer.named_parameters()})
            model.set_submodule(name, stored.StoredFloat8(layer))
        for module in model.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device=place.device, recurse=False)
        fill(self.opened.ours, dict(model.named_parameters()))
        if compiled:
            for block in find(model, family.blocks):
                block.forward = torch.compile(block.forward, fullgraph=True)
        return model.eval().requires_grad_(False)


def open_flux(path: str, changes: dict[str, str]) -> FluxSource:
    """Open weights of Flux; `changes` are encoders that somebody named. Raises `UsageError` where one is missing."""
    place = Path(path)
    if (place / "model_index.json").exists():
        source = _pipeline(place)
    else:
        opened = foreign.open_weights(path)
        source = _run(opened) if opened.format == "dcp" else _alone(opened, place)
    if source.opened.known_family().name != "flux":
        message = f"`{path}` is a checkpoint of {source.opened.known_family().name}, not of Flux"
        raise UsageError(message, where="--checkpoint")
    source = replace(source, encoder=replace(source.encoder, **changes))
    options = {"t5_encoder": "--t5", "clip_encoder": "--clip", "autoencoder_path": "--autoencoder"}
    missing = [option for key, option in options.items() if not getattr(source.encoder, key)]
    if missing:
        message = f"`{path}` holds the transformer alone; nothing says where its encoders are ({', '.join(missing)})"
        tip = "--encoders DIR, a folder like that of black-forest-labs/FLUX.1-schnell (`titan download`)"
        raise UsageError(message, tip=tip)
    return source


def _pipeline(place: Path) -> FluxSource:
    """Open a folder of diffusers: transformer, encoders and the scheduler's settings."""
    opened = foreign.open_weights(str(place / "transformer"))
    name, length = str(place), 512 if opened.sizes.guidance else 256
    encoder = schema.Encoder(name, name, name, max_t5_encoding_len=length)
    try:
        scheduler = json.loads((place / "scheduler/scheduler_config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the scheduler's settings: {error}", where=str(place)) from error
    return FluxSource(opened, _with_factor(encoder, place / "vae"), not scheduler.get("use_dynamic_shifting", False))


def _with_factor(encoder: schema.Encoder, autoencoder: Path) -> schema.Encoder:
    """Read off an autoencoder's config how many pixels a side of its latents covers."""
    try:
        levels = len(json.loads((autoencoder / "config.json").read_text())["block_out_channels"])
    except (OSError, ValueError, KeyError, TypeError):
        return encoder  # what is wrong with it is said when it is loaded
    return replace(encoder, autoencoder_factor=2 ** (levels - 1))


def _run(opened: Opened) -> FluxSource:
    """Take the encoders of the run that wrote a checkpoint; weights that were converted have none."""
    assert opened.shared is not None
    if "origin" in opened.shared:
        return _alone(opened, None)
    config = from_dict(opened.shared["config"], where=opened.path)
    return FluxSource(opened, config.encoder, few_steps=False, config=config)


def _alone(opened: Opened, place: Path | None) -> FluxSource:
    """Take a transformer without anything else; an `ae.safetensors` beside it is its autoencoder."""
    guided = bool(getattr(opened.sizes, "guidance", False))
    beside = None if place is None else place.parent / "ae.safetensors"
    encoder = replace(_MISSING, max_t5_encoding_len=512 if guided else 256)
    if beside is not None and beside.exists():
        encoder = replace(encoder, autoencoder_path=str(beside))
    return FluxSource(opened, encoder, few_steps=not guided)
