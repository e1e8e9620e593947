"""Gradient norm and clipping over parameters that may live on different meshes.

torch's `clip_grad_norm_` fails when plain tensors and DTensors, or DTensors of different meshes, mix. Norms are taken
per mesh and combined.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter], max_norm: float, stages: dist.ProcessGroup | None = None
) -> Tensor:
    """Scale gradients to a total 2-norm of at most `max_norm` (0: only measure) and return the norm before, fp32.

    `stages` are the ranks that hold the other parameters of a pipelined model.
    A norm that is not finite leaves them as they are: scaled, every gradient would be NaN or zero, and nobody could
    see any more which parameter it came from.
    """
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None:
            mesh = grad.device_mesh if isinstance(grad, DTensor) else None
            groups.setdefault(mesh, []).append(grad)
    norms = [_norm(grads) for grads in groups.values()] or [torch.zeros(())]
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if stages is not None:
        squares = total.square()
        dist.all_reduce(squares, group=stages)
        total = squares.sqrt()
    if max_norm > 0:
        for grads in groups.values():
            factor = torch.where(total.isfinite(), (max_norm / (total + 1e-6)).clamp(max=1.0), 1.0)
            locals_ = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
            torch._foreach_mul_(locals_, factor.to(locals_[0].device))
    return total


def _norm(grads: list[Tensor]) -> Tensor:
    total = nn.utils.get_total_norm(grads)
    return (total.full_tensor() if isinstance(total, DTensor) else total).float()
