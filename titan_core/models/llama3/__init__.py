"""Llama 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from titan_core.declare.family import Family
from titan_core.models.llama3.flavors import FLAVORS, LlamaSizes
from titan_core.models.llama3.parameters import attentions, parameters
from titan_core.models.llama3.sharding import SHARDING
from titan_core.models.llama3.weights import WEIGHTS

if TYPE_CHECKING:
    from titan_core.models.llama3.model import Llama3


def _build(sizes: LlamaSizes) -> Llama3:
    from titan_core.models.llama3.model import Llama3  # torch: only when a module is built

    return Llama3(sizes)


FAMILY = Family(
    name="llama3",
    flavors=FLAVORS,
    parameters=parameters,
    attentions=attentions,
    build=_build,
    blocks=("layers.*",),
    sharding=SHARDING,
    weights=WEIGHTS,
)
