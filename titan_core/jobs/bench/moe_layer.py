"""A whole feed-forward layer of experts: place, gather, gate and up, down, weighted sum. The router is not part of it.

Shape letters: T tokens, D model width, F hidden width, E experts, K experts chosen a token, R = T * K rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_core.jobs.bench import passes
from titan_core.jobs.bench.case import OWN, Call, Case
from titan_core.jobs.bench.inputs import Draw
from titan_core.jobs.bench.passes import Operands
from titan_core.jobs.bench.request import Request

# (T, D, F, E, K): the shapes of SonicMoE's figure 14 (arXiv 2512.14080), then Qwen3 30B
SHAPES = (
    (24576, 1536, 256, 128, 8),
    (24576, 1536, 1024, 32, 2),
    (32768, 4096, 256, 256, 16),
    (32768, 4096, 512, 128, 8),
    (32768, 4096, 1024, 64, 4),
    (32768, 4096, 2048, 64, 4),
    (32768, 2048, 768, 128, 8),
)
REDUCED = ((150, 96, 64, 8, 2),)
# Hidden rows and their gradients are rounded to bf16 on the way, and gradients of a token's weights are short rows: of
# twelve draws on a CPU the worst row was off by 3.9e-2, by torch's grouped_mm as by titan's parts.
LIMIT = 8e-2

Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class _Size:
    tokens: int
    width: int
    hidden: int
    experts: int
    choices: int


def cases(request: Request, draw: Draw) -> Iterator[Case]:
    """Give forward, and forward with backward, at every shape."""
    for numbers in REDUCED if request.reduced else SHAPES:
        for part in ("fwd", "fwd+bwd"):
            yield _case(_Size(*numbers), part, draw)


def _case(size: _Size, part: str, draw: Draw) -> Case:
    products, passed = (1, 1) if part == "fwd" else (3, 2)
    return Case(
        operation="moe-layer",
        shape=f"{size.tokens}x{size.width} F={size.hidden} E={size.experts} K={size.choices}",
        part=part,
        dtype="bf16",
        flops=2.0 * 3 * products * size.tokens * size.choices * size.width * size.hidden,
        moved=2.0 * passed * (2 * size.tokens * size.width + 3 * size.experts * size.width * size.hidden),
        inputs=lambda: _operands(size, draw),
        reference=lambda operands: _truth(operands, part),
        backends={name: _prepare(layer, part) for name, layer in _BACKENDS.items()},
        limit=LIMIT,
    )


def _operands(size: _Size, draw: Draw) -> Operands:
    up = (size.experts, size.hidden, size.width)
    scores = draw.normal(size.tokens, size.experts, dtype=torch.float32)
    weights, chosen = scores.topk(size.choices, -1)
    return Operands(
        [
            draw.normal(size.tokens, size.width),
            weights.softmax(-1),
            draw.normal(*up, scale=size.width**-0.5),
            draw.normal(*up, scale=size.width**-0.5),
            draw.normal(size.experts, size.width, size.hidden, scale=size.hidden**-0.5),
        ],
        [chosen],
        draw.normal(size.tokens, size.width),
    )


def _truth(operands: Operands, part: str) -> Sequence[Tensor]:
    """Compute in fp64, one expert at a time: value, and gradients of the tokens, their weights and the matrices."""
    x, weights, w1, w3, w2 = operands.tensors
    (chosen,) = operands.fixed
    total = torch.zeros_like(x, dtype=torch.float64)
    grads = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in operands.tensors]
    for expert in range(w1.shape[0]):
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        leaves = [x[token], weights[token, choice], w1[expert], w3[expert], w2[expert]]
        leaves = [leaf.double().requires_grad_() for leaf in leaves]
        rows, scale, one, three, two = leaves
        out = (F.silu(rows @ one.T) * (rows @ three.T)) @ two.T * scale[:, None]
        total.index_add_(0, token, out.detach())
        if part == "fwd":
            continue
        found = torch.autograd.grad(out, leaves, operands.grad[token].double())
        grads[0].index_add_(0, token, found[0])
        grads[1][token, choice] = found[1]
        for grad, piece in zip(grads[2:], found[2:], strict=True):
            grad[expert] = piece
    return [total] if part == "fwd" else [total, *grads]


def _prepare(layer: Layer, part: str) -> Callable[[Operands], Call]:
    return lambda operands: passes.of(part, layer)(operands)


# ------------------------------------------------------------------------------------------------ who computes it


def _titan(x_TD: Tensor, weights_TK: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, chosen_TK: Tensor) -> Tensor:
    from titan_kernels.expert_mlp import routed_mlp
    from titan_kernels.permutation import place

    return routed_mlp(x_TD, place(chosen_TK, w1.shape[0]), weights_TK, w1, w3, w2)


def _titan_in_parts(x_TD: Tensor, weights_TK: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, chosen_TK: Tensor) -> Tensor:
    """Gather and weighted sum as kernels of their own, as expert parallelism has them."""
    from titan_kernels.expert_mlp import expert_mlp
    from titan_kernels.permutation import permute, place, unpermute

    placement = place(chosen_TK, w1.shape[0])
    rows = expert_mlp(permute(x_TD, placement), w1, w3, w2, placement.ends_E)
    return unpermute(rows, placement, weights_TK)


def _grouped_mm(x_TD: Tensor, weights_TK: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, chosen_TK: Tensor) -> Tensor:
    """A sort, a gather, three products of torch's, and a sum."""
    flat = chosen_TK.flatten()
    order = flat.argsort(stable=True)
    token = order // chosen_TK.shape[1]
    ends = torch.bincount(flat, minlength=w1.shape[0]).cumsum(0, dtype=torch.int32)
    rows = x_TD.index_select(0, token)
    gate, up = (F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends) for weight in (w1, w3))
    out = F.grouped_mm(F.silu(gate) * up, w2.transpose(-2, -1), offs=ends)
    weighted = out * weights_TK.flatten()[order][:, None]
    return torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, token, weighted).to(x_TD.dtype)


_BACKENDS: Mapping[str, Layer] = {OWN: _titan, "titan-parts": _titan_in_parts, "grouped_mm": _grouped_mm}
