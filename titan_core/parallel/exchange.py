"""Differentiable exchanges between the ranks of a group: what one gathers, its backward scatters, and so on.

Collectives are torch's functional ones, which the compiler can trace and overlap.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.14 renamed them; the old names go when 2.13 is no longer supported
_NEW_NAMES = hasattr(funcol, "all_gather_single")
_all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_reduce_scatter = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


def arrived(x: Tensor) -> Tensor:
    """Wait for the result of a collective; what the compiler traces waits by itself, where its patterns expect it."""
    return x.wait() if isinstance(x, funcol.AsyncCollectiveTensor) else x


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Concatenate the ranks' parts along a dimension."""
    if dim and not _NEW_NAMES and torch.compiler.is_compiling():
        # torch 2.11 keeps its compiler out of the function with which it moves what was gathered to another dimension
        return torch.cat(arrived(_all_gather(x.contiguous(), 0, group)).chunk(group.size()), dim)
    return arrived(_all_gather(x.contiguous(), dim, group))


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup, op: str = "sum") -> Tensor:
    """Add (or "avg") the ranks' tensors and keep this rank's part along a dimension."""
    return arrived(_reduce_scatter(x.contiguous(), op, dim, group))


def all_reduce(x: Tensor, group: ProcessGroup, op: str = "sum") -> Tensor:
    """Add (or "avg", "max") the ranks' tensors."""
    return arrived(funcol.all_reduce(x.contiguous(), op, group))


class Gather(torch.autograd.Function):
    """Parts to the whole; the gradients of the whole, each rank's a partial sum, back to parts."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return reduce_scatter(grad, ctx.dim, ctx.group), None, None


class Whole(torch.autograd.Function):
    """Parts to the whole; its gradient is the same on every rank, and each keeps that of its own part."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.tensor_split(ctx.group.size(), ctx.dim)[ctx.group.rank()], None, None


class Wire(Protocol):
    """A narrow form in which a tensor travels, made with the largest magnitude of all ranks' parts."""

    def pack(self, x: Tensor, largest: Tensor) -> Tensor:
        """Return the narrow form, one byte a number."""
        ...

    def unpack(self, packed: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the numbers that a packed tensor stands for."""
        ...


class NarrowGather(torch.autograd.Function):
    """`Gather` of what is left of the parts in a narrow form; gradients travel as they are."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup, wire: Wire) -> Tensor:
        ctx.dim, ctx.group = dim, group
        largest = all_reduce(x.abs().amax().float(), group, "max")
        packed = wire.pack(x, largest)
        whole = all_gather(packed.view(torch.uint8), dim, group).view(packed.dtype)  # gloo knows no float8
        return wire.unpack(whole, largest, x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return reduce_scatter(grad, ctx.dim, ctx.group), None, None, None


class Scatter(torch.autograd.Function):
    """Partial sums of the whole to parts of the sum; their gradients back to the whole."""

    @staticmethod
    def forward(ctx, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_gather(grad, ctx.dim, ctx.group), None, None


class Enter(torch.autograd.Function):
    """The same tensor on every rank; its gradients, each rank's a partial sum, are added."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce(grad, ctx.group), None


class Leave(torch.autograd.Function):
    """Partial sums to the sum on every rank; the gradient is the same everywhere."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class Scaled(torch.autograd.Function):
    """The same tensor; its gradient is scaled."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * ctx.scale, None


class AllToAll(torch.autograd.Function):
    """Rank r's i-th part along dim 0 goes to rank i; the gradients go back."""

    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_to_all(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_to_all(grad, ctx.group), None


class AllToAllUneven(torch.autograd.Function):
    """`sent[i]` rows go to rank i, `received[i]` come from it; the gradients go back."""

    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return all_to_all(x, group, sent, received)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_to_all(grad, ctx.group, ctx.received, ctx.sent), None, None, None


def all_to_all(
    x: Tensor, group: ProcessGroup, sent: list[int] | None = None, received: list[int] | None = None
) -> Tensor:
    """Exchange parts along dim 0, equal ones unless their sizes are given."""
    return arrived(funcol.all_to_all_single(x.contiguous(), received, sent, group))
