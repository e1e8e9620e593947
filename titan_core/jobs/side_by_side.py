"""Titan's model beside another library's: the same weights, in one process, by turns.

What counts is the CPU time, which other load on a machine hardly changes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from titan_core.declare.family import Family
from titan_core.interop.boxes import Index, read_whole
from titan_core.interop.mapping import work_out
from titan_core.interop.views import TheirView
from titan_core.nn.layers import set_parameter_dtype
from titan_core.parallel.materialise import materialise
from titan_core.runtime.errors import RunFailed
from titan_core.runtime.events import Listener, Note

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Row:
    """CPU seconds of one kind of work, over all rounds but the first."""

    work: str
    name: str
    cpu_seconds: float
    cpu_seconds_min: float
    cpu_seconds_max: float


def pair(
    family: Family, sizes: Any, load: Callable[[dict[str, Any], dict[str, Tensor]], Any], dtype: torch.dtype
) -> tuple[nn.Module, Any]:
    """Return titan's model with random weights, and what `load` makes of them and its config in the peer's format."""
    assert family.weights is not None
    with torch.device("meta"):
        ours = family.build(sizes)
    materialise(ours, family.parameters(sizes), 0, torch.device("cpu"))
    config = {key: value for key, value in family.weights.write_config(sizes).items() if not key.startswith("_")}
    view = TheirView(_Stored(ours), work_out(family.weights.rules(sizes), family.parameters(sizes)))
    theirs = load(config, {name: read_whole(view, name) for name in view.index})
    for model in (ours, theirs):
        set_parameter_dtype(model, dtype)
    return ours, theirs


class _Stored:
    """The weights of a model as a source of tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.index: Index = {name: (tuple(x.shape), x.dtype) for name, x in self.tensors.items()}

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """Return a region."""
        x = self.tensors[name]
        for dim, (first, length) in enumerate(zip(start, size, strict=True)):
            x = x.narrow(dim, first, length)
        return x

    def locate(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> None:
        """Return None: no file holds them."""


def agree(what: str, found: Mapping[str, Tensor], listener: Listener) -> None:
    """Raise `RunFailed` unless all of these tensors are the first one, to what their dtype can tell apart."""
    (first, ours), *others = found.items()
    largest = ours.float().abs().max()
    for name, theirs in others:
        gap = float((ours.float() - theirs.float()).abs().max() / largest)
        if gap > _TOLERANCE[ours.dtype]:
            raise RunFailed(f"the {what} of {name} differ from {first}'s by {gap:.1e} of the largest")
        listener(Note(f"the {what} of {name} equal {first}'s to {gap:.1e} of the largest"))


def take_turns(calls: Mapping[tuple[str, str], Callable[[], object]], rounds: int) -> list[Row]:
    """Measure calls, keyed by what is done and who does it, `rounds` times in changing order, after a round apart."""
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    turns = list(calls.items())
    for number in range(rounds + 1):
        for key, call in turns if number % 2 else turns[::-1]:
            began = time.process_time()
            call()
            if number:
                seconds[key].append(time.process_time() - began)
    return [Row(*key, statistics.median(found), min(found), max(found)) for key, found in seconds.items()]
