"""Sharded data parallelism by views alone: no hooks, no streams, so that a whole model can be one compiled graph.

Every parameter is stored as a shard (or, with replicas only, whole), and its module sees it through a view that casts
and gathers it, and whose backward reduces the gradient (SimpleFSDP, Zhang et al. 2024). What a forward of a unit has
gathered once, it uses again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from titan_core.parallel.exchange import all_gather, all_reduce, reduce_scatter
from titan_core.parallel.mesh import Mesh
from titan_core.parallel.views import add_view, wrap_forward


@dataclass(eq=False)
class Shared:
    """One parameter: how it is gathered and reduced, and what of it is at hand in the present forward or step.

    `held` is the sum of whole gradients of microbatches that were not reduced yet.
    """

    rows: int
    shards: ProcessGroup
    replicas: ProcessGroup | None
    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    sync: bool = True
    whole: Tensor | None = None
    held: Tensor | None = None

    def view(self, parameter: Tensor) -> Tensor:
        """Return the whole parameter in the dtype of the arithmetic."""
        whole = self.whole
        if whole is None:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            whole = self.whole = _Whole.apply(local, self)
        return whole

    def gather(self, shard: Tensor) -> Tensor:
        """Concatenate the shards; all but the last ones have equal numbers of rows."""
        size = self.shards.size()
        if size == 1:
            return shard.to(self.param_dtype, copy=True)
        return all_gather(_padded(shard.to(self.param_dtype), -(-self.rows // size)), 0, self.shards)[: self.rows]

    def reduce(self, grad: Tensor, like: Tensor) -> Tensor:
        """Return this rank's part of the mean over all ranks of a whole gradient."""
        size = self.shards.size()
        if size > 1:
            padded = _padded(grad, -(-self.rows // size) * size)
            grad = reduce_scatter(padded, 0, self.shards, "avg")[: like.shape[0]]
        if self.replicas is not None:
            grad = all_reduce(grad, self.replicas, "avg")
        return grad.to(like.dtype)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard: Tensor, shared: Shared) -> Tensor:
        ctx.shared = shared
        ctx.save_for_backward(shard)
        return shared.gather(shard)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        shared: Shared = ctx.shared
        (shard,) = ctx.saved_tensors
        grad = grad.to(shared.reduce_dtype)
        if shared.held is not None:
            grad = shared.held + grad
            shared.held = None
        if not shared.sync:
            shared.held = grad
            return None, None
        return shared.reduce(grad, shard), None


def apply(
    module: nn.Module,
    units: Sequence[nn.Module],
    mesh: Mesh,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
) -> None:
    """Shard a module on the meta device over the data axes of a mesh.

    A unit forgets what it has gathered when its forward ends.
    """
    fsdp = mesh.fsdp
    placements: list[Placement] = [*(Replicate() for _ in range(fsdp.ndim - 1)), Shard(0)]
    shards = mesh.parameters["fsdp"].get_group()
    replicas = mesh.replicate.get_group() if mesh.layout.dp_replicate > 1 else None
    known: dict[Tensor, tuple[nn.Parameter, Shared]] = {}
    in_unit: dict[Shared, nn.Module] = {}
    owners = {inner: unit for unit in units for inner in unit.modules()}
    for inner in module.modules():
        for name, parameter in list(inner._parameters.items()):
            if parameter is None:
                continue
            if parameter not in known:  # a tied parameter stays one
                split = nn.Parameter(distribute_tensor(parameter.data, fsdp, placements, src_data_rank=None))
                shared = Shared(parameter.shape[0], shards, replicas, param_dtype, reduce_dtype)
                known[parameter] = split, shared
            inner._parameters[name], shared = known[parameter]
            add_view(inner, name, shared.view)
            in_unit[shared] = owners.get(inner, module)
    for unit in (*units, module):
        wrap_forward(unit, _forgetting([shared for shared, its in in_unit.items() if its is unit]))
    module.__dict__["_titan_shared"] = list(in_unit)


def set_requires_gradient_sync(module: nn.Module, sync: bool) -> None:
    """Reduce gradients in the next backward, or only add them up."""
    for shared in module.__dict__["_titan_shared"]:
        shared.sync = sync


def _forgetting(gathered: list[Shared]) -> Callable[..., Any]:
    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        finally:  # recomputation leaves a forward as soon as it has what it wants
            for shared in gathered:
                shared.whole = None

    return around


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if x.shape[0] == rows else torch.cat((x, x.new_zeros(rows - x.shape[0], *x.shape[1:])))
