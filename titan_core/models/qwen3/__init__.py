"""Qwen3, dense."""

from __future__ import annotations

from typing import TYPE_CHECKING

from titan_core.declare.family import Family
from titan_core.models.qwen3.flavors import FLAVORS, QwenSizes
from titan_core.models.qwen3.parameters import attentions, parameters
from titan_core.models.qwen3.sharding import SHARDING
from titan_core.models.qwen3.weights import WEIGHTS

if TYPE_CHECKING:
    from titan_core.models.qwen3.model import Qwen3


def _build(sizes: QwenSizes) -> Qwen3:
    from titan_core.models.qwen3.model import Qwen3  # torch: only when a module is built

    return Qwen3(sizes)


FAMILY = Family(
    name="qwen3",
    flavors=FLAVORS,
    parameters=parameters,
    attentions=attentions,
    build=_build,
    blocks=("layers.*",),
    sharding=SHARDING,
    weights=WEIGHTS,
)
