"""A model family as one frozen value, and the table of families.

Adding a model is adding a folder to `titan_core/models` and a line to `FAMILIES`; no engine knows its name. A `Family`
holds data and functions that import torch only when a module is built, so that counting, checking and planning run
without torch.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from titan_core.config.schema import Config
from titan_core.declare.parameters import Attention, Parameter
from titan_core.declare.sharding import Sharding
from titan_core.declare.weights import Weights
from titan_core.runtime.errors import Problem

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Family:
    """All that titan knows of a model family.

    `flavors` maps a name to a frozen dataclass of sizes, which has at least `vocab_size` and `max_seq_len`.
    `parameters(sizes)` lists every parameter, `attentions(sizes)` every attention layer, in forward order.
    `build(sizes)` makes the module on the current default device, with uninitialised weights. `blocks` are globs of
    the modules that are checkpointed, compiled and sharded as units; `sharding` says where all can be split, `weights`
    how they lie in foreign checkpoints.

    `task` is what the model is trained for, None if it only serves others. `lengths(config)` says how many rows of each
    kind one sample has in a run; the first kind are the tokens that the run counts.
    `problems(config, sizes)` is what only the family knows to be wrong with a run. `in_use(sizes)` are the sizes of the
    model without what only its training needs.
    """

    name: str
    flavors: Mapping[str, Any]
    parameters: Callable[[Any], Sequence[Parameter]]
    attentions: Callable[[Any], Sequence[Attention]]
    build: Callable[[Any], nn.Module]
    blocks: tuple[str, ...]
    sharding: Sharding
    weights: Weights | None = None
    task: Literal["causal_lm", "flow_matching"] | None = "causal_lm"
    lengths: Callable[[Config], Mapping[str, int]] = lambda config: {"token": config.training.seq_len}
    problems: Callable[[Config, Any], Sequence[Problem]] = lambda config, sizes: ()
    in_use: Callable[[Any], Any] = lambda sizes: sizes

    def sizes(self, flavor: str, **changes: Any) -> Any:
        """Return the sizes of a flavor with some of them replaced."""
        return dataclasses.replace(self.flavors[flavor], **changes)


def lazily(module: str, name: str) -> Callable[[Any], nn.Module]:
    """Return what builds `module.name(sizes)` and imports it, and torch with it, only then."""

    def build(sizes: Any) -> nn.Module:
        return getattr(importlib.import_module(module), name)(sizes)

    return build
