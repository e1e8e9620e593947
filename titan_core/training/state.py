"""What a checkpoint holds of a run, and how it is put back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_core.checkpoint import Snapshot
from titan_core.config.load import to_dict
from titan_core.data.loader import merge_states
from titan_core.optim.build import state_tensors
from titan_core.parallel.materialise import numbers_of
from titan_core.runtime import determinism
from titan_core.training.build import Parts


@dataclasses.dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    skipped: int = 0


def tensors(parts: Parts, *, model_only: bool = False) -> dict[str, Any]:
    """Return the live tensors by their checkpoint names: loading into them is loading the run."""
    named: dict[str, Any] = {name: _plain(parameter) for name, parameter in parts.parameters.items()}
    named.update(parts.buffers)
    return named if model_only else {**named, **state_tensors(parts.optimizer)}


def _plain(parameter: Tensor) -> Tensor:
    """Return a parameter as checkpoints know it: the same numbers, without a subclass that serves the computation."""
    if not isinstance(parameter, DTensor):
        return parameter
    local = parameter.to_local()
    inner = numbers_of(local)
    if inner is local:
        return parameter
    return DTensor(inner, parameter._spec, requires_grad=False)  # pyright: ignore[reportCallIssue]


def snapshot(parts: Parts, progress: Progress, extra: dict[str, Any], *, model_only: bool = False) -> Snapshot:
    """Return all that a checkpoint stores; every rank calls it, as data positions are gathered."""
    shared = {
        "step": progress.step,
        "tokens": progress.tokens,
        "progress": dataclasses.asdict(progress),
        "seed": parts.seed,
        "global_batch": parts.global_batch,
        "model": {
            "family": parts.family.name,
            "flavor": parts.config.model.flavor,
            "sizes": dataclasses.asdict(parts.sizes),
        },
        "config": to_dict(parts.config),
        "data": _gather_data_position(parts),
        **extra,
    }
    own = {"rng": determinism.rng_state(parts.world.device)}
    return Snapshot(tensors(parts, model_only=model_only), shared, own, dict(parts.kind.files()))


def restore(parts: Parts, shared: dict[str, Any], own: dict[str, Any] | None, exclude: list[str]) -> Progress:
    """Put back everything but the tensors, which are loaded in place."""
    progress = Progress() if "train_state" in exclude else Progress(**shared["progress"])
    if "dataloader" not in exclude:
        parts.loader.load_state_dict(shared["data"])
    if own is not None and "train_state" not in exclude:
        determinism.restore_rng_state(own["rng"], parts.world.device)
    return progress


def _gather_data_position(parts: Parts) -> dict[str, Any]:
    """Merge the positions of all data ranks into one, in global terms."""
    mine = parts.loader.state_dict()
    if parts.world.size == 1:
        return merge_states([mine])
    states: list[Any] = [None] * parts.world.size
    dist.all_gather_object(states, mine)
    return merge_states(states)
