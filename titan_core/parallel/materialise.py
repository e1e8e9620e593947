"""From meta tensors to initial weights, shard by shard."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_core.declare.parameters import Constant, Parameter
from titan_core.nn.random import fill_normal


@torch.no_grad()
def materialise(
    model: nn.Module,
    declared: Sequence[Parameter],
    seed: int,
    device: torch.device,
    buffers_on: torch.device | None = None,
) -> None:
    """Allocate a meta model on `device` and draw its weights: a pure function of seed and name, whatever the layout.

    Buffers, which nobody gathers, are where the computation is: `buffers_on`, if weights wait elsewhere.
    """
    model.to_empty(device=device)
    if buffers_on is not None:
        _move_buffers(model, buffers_on)
    table = {parameter.name: parameter for parameter in declared}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name not in table:  # a buffer that is not stored: what is counted anew
            tensor.zero_()
            continue
        parameter = table[name]
        local, offset = _shard_of(tensor)
        if local.numel() == 0:
            continue
        if isinstance(parameter.init, Constant):
            local.fill_(parameter.init.value)
            continue
        fill_normal(
            local,
            seed=seed,
            name=name,
            full_shape=parameter.shape,
            offset=offset,
            std=parameter.init.std,
            cut=parameter.init.cut,
        )


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device)


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to what a model has learnt.

    Not by `state_dict`, at which FSDP frees the parameters that a validation has left gathered: whoever holds those
    would hold freed memory.
    """
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def count(tensors: Sequence[Tensor]) -> int:
    """Return the number of elements that this rank holds."""
    return sum(math.prod(_shard_of(tensor)[0].shape) for tensor in tensors)


def _shard_of(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return this rank's block of a tensor and where the block begins in the full tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return numbers_of(tensor.to_local()), tuple(offset)


def numbers_of(local: Tensor) -> Tensor:
    """Return the plain tensor with a shard's numbers: a weight that is gathered in float8 is a subclass around it."""
    return getattr(local, "_tensor", local)
