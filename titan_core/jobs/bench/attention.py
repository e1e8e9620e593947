"""Causal attention, forward and backward, by everything that torch has for it.

Shape letters: B batch, T tokens, H query heads, K key/value heads, C head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from titan_core.jobs.bench import passes
from titan_core.jobs.bench.case import OWN, Absent, Call, Case
from titan_core.jobs.bench.inputs import Draw
from titan_core.jobs.bench.passes import Operands
from titan_core.jobs.bench.request import Request
from titan_core.nn.attention import CAUSAL, attention

# (B, T, H, K, C): Llama 3 8B at two lengths, heads of 64
SHAPES = ((4, 2048, 32, 8, 128), (1, 8192, 32, 8, 128), (1, 16384, 32, 32, 64))
REDUCED = ((2, 190, 4, 2, 32),)
# Gradients are differences of probabilities rounded to bf16: of twelve draws on a CPU, torch's flash attention was off
# by 6.7e-2 in its worst row, titan's by 3.0e-2. A wrong mask or scale gives ten times that.
LIMITS = {"fwd": 1.5e-2, "bwd": 1.5e-1}

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(request: Request, draw: Draw) -> Iterator[Case]:
    """Give forward and backward at every shape."""
    for shape in REDUCED if request.reduced else SHAPES:
        for part in ("fwd", "bwd"):
            yield _case(shape, part, draw)


def _case(shape: tuple[int, ...], part: str, draw: Draw) -> Case:
    batch, tokens, heads, kv_heads, width = shape
    pairs = tokens * (tokens + 1) / 2  # of a query and a key that it sees
    products = 2 if part == "fwd" else 5  # the backward computes the scores again: q k^T, and four gradients
    numbers = batch * tokens * width * (heads + kv_heads)
    return Case(
        operation="attention",
        shape=f"{batch}x{tokens} heads={heads}/{kv_heads}x{width}",
        part=part,
        dtype="bf16",
        flops=2.0 * products * batch * heads * width * pairs,
        moved=2.0 * 2 * numbers * (1 if part == "fwd" else 2),
        inputs=lambda: _operands(shape, draw),
        reference=lambda operands: _truth(operands, part),
        backends={name: _prepare(find, part) for name, find in _BACKENDS.items()},
        limit=LIMITS[part],
    )


def _operands(shape: tuple[int, ...], draw: Draw) -> Operands:
    batch, tokens, heads, kv_heads, width = shape
    q, grad = (draw.normal(batch, tokens, heads, width) for _ in range(2))
    k, v = (draw.normal(batch, tokens, kv_heads, width) for _ in range(2))
    return Operands([q, k, v], [], grad)


def _truth(operands: Operands, part: str) -> Sequence[Tensor]:
    """Compute in fp64, one key/value head of one row of the batch at a time: all scores at once would not fit."""
    q, k, v = (x.double() for x in operands.tensors)
    group = q.shape[2] // k.shape[2]
    found = [torch.empty_like(x) for x in ((q,) if part == "fwd" else (q, k, v))]
    for b in range(q.shape[0]):
        for head in range(q.shape[2]):
            _one_head(found, (q, k, v), operands.grad, b, head, group)
    return found


def _one_head(
    found: list[Tensor], qkv: tuple[Tensor, Tensor, Tensor], grad: Tensor, b: int, head: int, group: int
) -> None:
    q, k, v = (x[b, :, number] for x, number in zip(qkv, (head, head // group, head // group), strict=True))
    scores = (q @ k.T / math.sqrt(q.shape[1])).masked_fill_(_future(q.shape[0], q.device), -math.inf)
    probs = scores.softmax(-1)
    if len(found) == 1:
        found[0][b, :, head] = probs @ v
        return
    slope = grad[b, :, head].double()
    into_probs = slope @ v.T
    into_scores = probs * (into_probs - (into_probs * probs).sum(-1, keepdim=True)) / math.sqrt(q.shape[1])
    gradients = (into_scores @ k, into_scores.T @ q, probs.T @ slope)
    for number, (x, gradient) in enumerate(zip(found, gradients, strict=True)):
        at = head if number == 0 else head // group
        x[b, :, at] = gradient if number == 0 or head % group == 0 else x[b, :, at] + gradient


def _future(tokens: int, device: torch.device) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)


def _prepare(find: Callable[[], Function], part: str) -> Callable[[Operands], Call]:
    return lambda operands: passes.of(part, find())(operands)


def _titan(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor) -> Tensor:
    return attention(q_BTHC, k_BTKC, v_BTKC, CAUSAL)


def _sdpa(backend: SDPBackend) -> Callable[[], Function]:
    def find() -> Function:
        def function(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BTKC, v_BTKC))
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            return out.transpose(1, 2)

        return function

    def on_gpu() -> Function:
        if not torch.cuda.is_available():
            raise Absent("needs a GPU")
        return find()

    return find if backend is SDPBackend.FLASH_ATTENTION else on_gpu


def _flex() -> Function:
    if not torch.cuda.is_available():
        raise Absent("flex attention has no backward without a GPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def causal(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    masks = {}

    def function(q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BTKC, v_BTKC))
        tokens = q.shape[2]
        if tokens not in masks:
            masks[tokens] = create_block_mask(causal, None, None, tokens, tokens, device=q.device)
        out = compiled(q, k, v, block_mask=masks[tokens], enable_gqa=q.shape[1] != k.shape[1])
        assert isinstance(out, Tensor)  # not asked for the log-sum-exp beside it
        return out.transpose(1, 2)

    return function


_BACKENDS: dict[str, Callable[[], Function]] = {
    OWN: lambda: _titan,
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "flex": _flex,
}
