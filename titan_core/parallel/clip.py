"""Gradient norm and clipping over parameters that may live on different meshes.

torch's `clip_grad_norm_` fails when plain tensors and DTensors, or DTensors of different meshes, mix. Here squares are
added up on each rank, and then over the ranks that hold other parts of the same parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    stages: ProcessGroup | None = None,
    counted_elsewhere: Collection[nn.Parameter] = (),
) -> Tensor:
    """Scale gradients to a total 2-norm of at most `max_norm` (0: only measure) and return the norm before, fp32.

    `stages` are the ranks that hold the other parameters of a pipelined model; `counted_elsewhere` those of this rank
    that one of these ranks holds too, and counts.

    A norm that is not finite leaves them as they are: scaled, every gradient would be NaN or zero, and nobody could
    see any more which parameter it came from.
    """
    counted: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
    grads: list[Tensor] = []
    elsewhere = {id(parameter) for parameter in counted_elsewhere}
    for parameter in parameters:
        if parameter.grad is not None:
            grads.append(_local(parameter.grad))
            if id(parameter) not in elsewhere:
                counted.setdefault(_other_parts(parameter.grad), []).append(grads[-1])
    none = torch.zeros((), device=grads[0].device if grads else None)
    total = sum((_squares(parts, groups) for groups, parts in counted.items()), none)
    if stages is not None:
        dist.all_reduce(total, group=stages)
    total = total.sqrt()
    if max_norm > 0 and grads:
        factor = torch.where(total.isfinite(), (max_norm / (total + 1e-6)).clamp(max=1.0), 1.0)
        torch._foreach_mul_(grads, factor.to(grads[0].device))
    return total


def _squares(grads: list[Tensor], groups: tuple[ProcessGroup, ...]) -> Tensor:
    """Return the sum of squares of gradients whose parts are spread over groups."""
    total = torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)).square().sum()
    for group in groups:
        dist.all_reduce(total, group=group)
    return total


def _other_parts(grad: Tensor) -> tuple[ProcessGroup, ...]:
    """Return the groups, one for each axis of its mesh, over which a gradient is split and not replicated."""
    if not isinstance(grad, DTensor):
        return ()
    mesh = grad.device_mesh
    split = [axis for axis, placement in enumerate(grad.placements) if not placement.is_replicate()]
    return tuple(mesh.get_group(axis) for axis in split if mesh.size(axis) > 1)


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad
