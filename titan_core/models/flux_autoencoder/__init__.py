"""Flux's autoencoder."""

from titan_core.declare.family import Family, lazily
from titan_core.declare.sharding import Sharding
from titan_core.models.flux_autoencoder.flavors import FLAVORS
from titan_core.models.flux_autoencoder.parameters import attentions, parameters
from titan_core.models.flux_autoencoder.weights import WEIGHTS

FAMILY = Family(
    name="flux_autoencoder",
    flavors=FLAVORS,
    parameters=parameters,
    attentions=attentions,
    build=lazily("titan_core.models.flux_autoencoder.model", "Autoencoder"),
    blocks=(),
    sharding=Sharding(),
    weights=WEIGHTS,
    task=None,
)
