"""Qwen3, dense and mixtures of experts."""

from functools import partial

from titan_core.declare import decoder
from titan_core.declare.family import Family, lazily
from titan_core.models.qwen3.flavors import FLAVORS, HEAD_NORMS
from titan_core.models.qwen3.weights import WEIGHTS

FAMILY = Family(
    name="qwen3",
    flavors=FLAVORS,
    parameters=lambda sizes: decoder.parameters(sizes, partial(decoder.grouped_query, head_norms=HEAD_NORMS)),
    attentions=decoder.attentions,
    build=lazily("titan_core.models.qwen3.model", "Qwen3"),
    blocks=decoder.BLOCKS,
    sharding=decoder.SHARDING,
    weights=WEIGHTS,
)
