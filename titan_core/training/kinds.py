"""What differs between runs of different tasks: data, what is made of it before the model, the loss, what is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from titan_core.config.schema import Config
from titan_core.data.loader import BatchLoader
from titan_core.declare.family import Family
from titan_core.parallel.mesh import Mesh
from titan_core.runtime.errors import ConfigError, Problem
from titan_core.runtime.events import Listener
from titan_core.training.images import Images
from titan_core.training.language import Language

if TYPE_CHECKING:
    from titan_core.training.build import Parts


class Kind(Protocol):
    """One kind of run. It is made of a config alone; `open` then loads what the data needs."""

    def tasks(self, mesh: Mesh) -> tuple[Callable[[nn.Module, bool], nn.Module], list[str]]:
        """Return what makes a task of a model (and of whether it is a stage of a pipeline), and words about it."""
        ...

    def blank(self, rows: int) -> Any:
        """Return a batch of zeros on the CPU, as the task gets it."""
        ...

    def open(self, mesh: Mesh, device: torch.device, seed: int, listener: Listener) -> None:
        """Load tokenizers and encoders."""
        ...

    def files(self) -> Mapping[str, bytes]:
        """Return what a checkpoint keeps beside the weights."""
        ...

    def loader(self, mesh: Mesh, rows: int, listener: Listener) -> BatchLoader:
        """Return the training loader of this rank, `rows` being the samples of a step."""
        ...

    def prepare(self, batch: Any) -> Any:
        """Make what the task gets of what the loader gave, on the device."""
        ...

    def validation(self, mesh: Mesh, listener: Listener) -> Iterable[Any]:
        """Return the validation batches, as the loader would give them."""
        ...

    def for_validation(self, batch: Any) -> Iterable[Any]:
        """Make what the task gets of one of them."""
        ...

    def mean_loss(self, sums: list[float], weights: list[float]) -> tuple[float, float, Mapping[str, float]]:
        """Return the mean loss of validation, how many targets it is of, and the means of the parts that it tells
        apart, by name."""
        ...

    def show(self, parts: Parts, step: int, listener: Listener) -> None:
        """Show what the model can do by now; every rank calls it."""
        ...


def kind_of(config: Config, family: Family, sizes: Any) -> Kind:
    """Return the kind of run that a family's task makes. Raises `ConfigError` for a family that has none."""
    if family.task == "flow_matching":
        return Images(config, family, sizes)
    if family.task == "causal_lm":
        return Language(config, sizes)
    message = f"`{family.name}` is not trained by itself"
    raise ConfigError([Problem("model.name", message, "model.name", "it serves other models")])
