"""Flux."""

from collections.abc import Mapping

from titan_core.config.schema import Config
from titan_core.declare.family import Family, lazily
from titan_core.models.flux.flavors import FLAVORS
from titan_core.models.flux.parameters import attentions, parameters
from titan_core.models.flux.sharding import BLOCKS, SHARDING
from titan_core.models.flux.weights import WEIGHTS


def lengths(config: Config) -> Mapping[str, int]:
    """Return the rows of an image and of a text; a sample is one row of its own to what conditions it."""
    side = config.training.img_size // (2 * config.encoder.autoencoder_factor)
    return {"image": side * side, "text": config.encoder.max_t5_encoding_len, "sample": 1}


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
)
