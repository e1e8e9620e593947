"""Llama 4: the text models, Scout, Maverick, and dense ones."""

from titan_core.declare import decoder
from titan_core.declare.family import Family, lazily
from titan_core.models.llama4.flavors import FLAVORS, attentions
from titan_core.models.llama4.weights import WEIGHTS

FAMILY = Family(
    name="llama4",
    flavors=FLAVORS,
    parameters=decoder.parameters,
    attentions=attentions,
    build=lazily("titan_core.models.llama4.model", "Llama4"),
    blocks=decoder.BLOCKS,
    sharding=decoder.SHARDING,
    weights=WEIGHTS,
)
