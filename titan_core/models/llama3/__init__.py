"""Llama 3."""

from titan_core.declare import decoder
from titan_core.declare.family import Family, lazily
from titan_core.models.llama3.flavors import FLAVORS
from titan_core.models.llama3.weights import WEIGHTS

FAMILY = Family(
    name="llama3",
    flavors=FLAVORS,
    parameters=decoder.parameters,
    attentions=decoder.attentions,
    build=lazily("titan_core.models.llama3.model", "Llama3"),
    blocks=decoder.BLOCKS,
    sharding=decoder.SHARDING,
    weights=WEIGHTS,
)
