"""The passes of an operation that autograd knows, as calls to time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titan_core.jobs.bench.case import Absent, Call


@dataclass(frozen=True)
class Operands:
    """What a differentiable operation takes: tensors that have gradients, then what has none; and a gradient of it."""

    tensors: Sequence[Tensor]
    fixed: Sequence[Any]
    grad: Tensor


def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """Return the function as torch compiles it for one shape; on a GPU only, as on a CPU that takes far too long.

    What was compiled before is forgotten: a backward that was compiled where the graph was used once overwrites what
    the graph holds, and torch refuses to run it on a graph that is kept.
    """
    if backend == "inductor" and not torch.cuda.is_available():
        raise Absent("compiled peers are tried on a GPU only")
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, backend=backend)


def forward(function: Callable[..., Tensor], operands: Operands) -> Call:
    """Return the call of the forward, without a graph."""

    def call() -> Tensor:
        with torch.no_grad():
            return function(*operands.tensors, *operands.fixed)

    return call


def backward(function: Callable[..., Tensor], operands: Operands, wanted: Sequence[int] | None = None) -> Call:
    """Return the call of the backward to the wanted tensors, all where none are named; the forward is done now."""
    wanted = range(len(operands.tensors)) if wanted is None else wanted
    leaves = [x.detach().requires_grad_(number in wanted) for number, x in enumerate(operands.tensors)]
    out = function(*leaves, *operands.fixed)
    targets = [leaves[number] for number in wanted]
    return lambda: torch.autograd.grad(out, targets, operands.grad, retain_graph=True)


def both(function: Callable[..., Tensor], operands: Operands) -> Call:
    """Return the call of forward and backward: the value, then all gradients."""
    leaves = [x.detach().requires_grad_() for x in operands.tensors]

    def call() -> list[Tensor]:
        out = function(*leaves, *operands.fixed)
        return [out.detach(), *torch.autograd.grad(out, leaves, operands.grad)]

    return call


def of(part: str, function: Callable[..., Tensor]) -> Callable[[Operands], Call]:
    """Return how a backend prepares the pass: fwd, bwd, or fwd+bwd."""
    prepare = {"fwd": forward, "bwd": backward, "fwd+bwd": both}[part]
    return lambda operands: prepare(function, operands)


def truth(part: str, reference: Callable[..., Tensor]) -> Callable[[Operands], Sequence[Tensor]]:
    """Return how the truth of the pass is computed: by autograd through a reference in fp64."""

    def compute(operands: Operands) -> Sequence[Tensor]:
        wide = Operands(
            [x.double() for x in operands.tensors], [_wide(x) for x in operands.fixed], _wide(operands.grad)
        )
        found = of(part, reference)(wide)()
        return [found] if isinstance(found, Tensor) else found

    return compute


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
