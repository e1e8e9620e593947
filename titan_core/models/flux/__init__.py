"""Flux."""

from collections.abc import Mapping

from titan_core.config.schema import Config
from titan_core.declare.family import Family, lazily
from titan_core.models.flux.flavors import FLAVORS, FluxSizes
from titan_core.models.flux.parameters import attentions, parameters
from titan_core.models.flux.sharding import BLOCKS, SHARDING
from titan_core.models.flux.weights import WEIGHTS
from titan_core.runtime.errors import Problem


def lengths(config: Config) -> Mapping[str, int]:
    """Return the rows of an image and of a text; a sample is one row of its own to what conditions it."""
    side = config.training.img_size // (2 * config.encoder.autoencoder_factor)
    return {"image": side * side, "text": config.encoder.max_t5_encoding_len, "sample": 1}


def problems(config: Config, sizes: FluxSizes) -> list[Problem]:
    """Return what is wrong with the sizes of images and of their latents."""
    found = []
    encoder, size = config.encoder, config.training.img_size
    unit = 2 * encoder.autoencoder_factor
    if size % unit:
        tip = f"{size // unit * unit or unit} or {-(-size // unit) * unit}"
        message = f"`training.img_size` {size} is not a multiple of {unit} pixels, the side of an image row"
        found.append(Problem("training.img_size", message, tip=tip))
    numbers = 4 * 3 * encoder.autoencoder_factor**2
    if encoder.autoencoder_path == "embedded" and numbers != sizes.in_channels:
        message = (
            f"an image row is {numbers} numbers of the embedded autoencoder, and the model takes {sizes.in_channels}"
        )
        tip = f"--model.args.in_channels {numbers}, or another encoder.autoencoder_factor"
        found.append(Problem("encoder.autoencoder_factor", message, tip=tip))
    return found


FAMILY = Family(
    name="flux",
    flavors=FLAVORS,
    parameters=parameters,
    attentions=attentions,
    build=lazily("titan_core.models.flux.model", "Flux"),
    blocks=BLOCKS,
    sharding=SHARDING,
    weights=WEIGHTS,
    task="flow_matching",
    lengths=lengths,
    problems=problems,
)
