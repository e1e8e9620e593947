"""Llama 4: the text model without mixtures of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from titan_core.declare.family import Family
from titan_core.models.llama4.flavors import FLAVORS, Llama4Sizes
from titan_core.models.llama4.parameters import attentions, parameters
from titan_core.models.llama4.sharding import SHARDING
from titan_core.models.llama4.weights import WEIGHTS

if TYPE_CHECKING:
    from titan_core.models.llama4.model import Llama4


def _build(sizes: Llama4Sizes) -> Llama4:
    from titan_core.models.llama4.model import Llama4  # torch: only when a module is built

    return Llama4(sizes)


FAMILY = Family(
    name="llama4",
    flavors=FLAVORS,
    parameters=parameters,
    attentions=attentions,
    build=_build,
    blocks=("layers.*",),
    sharding=SHARDING,
    weights=WEIGHTS,
)
