"""Ring attention: keys and values travel from rank to rank, and each rank meets one piece at a time.

In the backward they travel once more, together with their gradients, which are home after the last step. So a rank
stores its own queries, keys, values and output, whatever the number of ranks (Liu et al. 2023).

Shape letters: B batch, T tokens of this rank, H query heads, K key/value heads, C head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed import ProcessGroup

from titan_core.nn.attention import visible
from titan_core.nn.cpu_attention import heads_of, rows_of
from titan_core.nn.pieces import merge, piece_backward, piece_forward
from titan_core.parallel.exchange import arrived

_SCORES = 1 << 26  # scores that exist at once: 256 MiB in fp32


def ring_attention(
    q_BTHC: Tensor,
    k_BTKC: Tensor,
    v_BTKC: Tensor,
    chunks: list[tuple[int, int]] | None,
    documents: Tensor | None,
    rank: int,
    group: ProcessGroup,
    scale: float | None = None,
) -> Tensor:
    """Return causal attention over the tokens of all ranks, (B, T, H, C), within documents where they are given.

    `chunks` are the numbers, in their order in a sequence, of the two chunks of T / 2 tokens that every rank holds;
    None is not causal: all tokens see each other, whatever their order. `documents` (B, S) are those of all tokens.
    """
    tokens, groups = q_BTHC.shape[1], q_BTHC.shape[2] // k_BTKC.shape[2]
    half = tokens if chunks is None else tokens // 2
    place = _Place(chunks, documents, rank, group, k_BTKC.shape[2], groups, half)
    return _Ring.apply(q_BTHC, k_BTKC, v_BTKC, place, scale or 1 / math.sqrt(q_BTHC.shape[-1]))


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, place: _Place, scale: float) -> Tensor:
        ctx.ring, ctx.groups, ctx.scale = place, place.groups, scale
        q = rows_of(q_BTHC * ctx.scale, ctx.groups)
        k, v = rows_of(k_BTKC, 1), rows_of(v_BTKC, 1)
        out = q.new_zeros((*q.shape[:2], v.shape[-1]), dtype=torch.float32)
        lse = q.new_full((*q.shape[:2], 1), -math.inf, dtype=torch.float32)
        held = [k, v]
        for source in ctx.ring.sources:
            arriving = ctx.ring.send(held)
            for rows, keys, hidden in ctx.ring.pieces(source, q):
                more = piece_forward(q[:, rows], held[0][:, keys], held[1][:, keys], hidden)
                out[:, rows], lse[:, rows] = merge(out[:, rows], lse[:, rows], *more)
            held = [arrived(new).view_as(old) for new, old in zip(arriving, held, strict=True)]
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return heads_of(out, q_BTHC.shape[0], ctx.groups)

    @staticmethod
    def backward(ctx, grad_BTHC: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        batch, grad = grad_BTHC.shape[0], rows_of(grad_BTHC, ctx.groups)
        delta = (out.float() * grad.float()).sum(-1, keepdim=True)
        grad_q = q.new_zeros(q.shape, dtype=torch.float32)
        held = [k, v]
        sums = [x.new_zeros(x.shape, dtype=torch.float32) for x in held]  # travel with the keys that they belong to
        for source in ctx.ring.sources:
            arriving = ctx.ring.send(held)
            for rows, keys, hidden in ctx.ring.pieces(source, q):
                k_piece, v_piece = (x[:, keys] for x in held)
                more_q, more_k, more_v = piece_backward(
                    q[:, rows], k_piece, v_piece, grad[:, rows], lse[:, rows], delta[:, rows], hidden
                )
                grad_q[:, rows] += more_q
                sums[0][:, keys] += more_k
                sums[1][:, keys] += more_v
            arriving += ctx.ring.send(sums)
            *held, grad_k, grad_v = (arrived(new).view_as(old) for new, old in zip(arriving, held + sums, strict=True))
            sums = [grad_k, grad_v]
        grad_k, grad_v = (heads_of(x.to(k.dtype), batch, 1) for x in sums)
        grad_q = heads_of(grad_q.mul_(ctx.scale).to(q.dtype), batch, ctx.groups)
        return grad_q, grad_k, grad_v, None, None


@dataclass(frozen=True)
class _Place:
    """This rank's place in the ring, and which pieces of the keys its queries may meet."""

    chunks: list[tuple[int, int]] | None
    documents: Tensor | None
    rank: int
    group: ProcessGroup
    kv_heads: int
    groups: int
    half: int

    @property
    def sources(self) -> list[int]:
        """Whose keys are here, step by step: first one's own."""
        size = self.group.size()
        return [(self.rank - step) % size for step in range(size)]

    def send(self, tensors: list[Tensor]) -> list[Tensor]:
        """Start to pass tensors on to the next rank, and return what comes from the one before, to be waited for."""
        size = self.group.size()
        following = [(rank + 1) % size for rank in range(size)]
        return [funcol.permute_tensor(x.flatten(), following, self.group) for x in tensors]

    def pieces(self, source: int, like: Tensor) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """Yield (query rows, keys, what is hidden) that have anything to see; `like` are the queries' rows (N, R, C).

        A chunk's own keys come first, so that every row has seen something before the next piece is merged.
        """
        if self.chunks is None:
            yield from ((rows, cols, None) for rows, cols in self._blocks(0, 0, like))
            return
        for mine, queries in enumerate(self.chunks[self.rank]):
            for theirs in (1, 0) if mine else (0, 1):
                keys = self.chunks[source][theirs]
                if keys > queries:
                    continue
                key_positions = torch.arange(keys * self.half, (keys + 1) * self.half, device=like.device)
                every = torch.arange(queries * self.half, (queries + 1) * self.half, device=like.device)
                for rows, cols in self._blocks(mine, theirs, like):
                    first, last = (edge // self.groups - mine * self.half for edge in (rows.start, rows.stop))
                    yield rows, cols, self._hidden(every[first:last], key_positions, before=keys < queries)

    def _blocks(self, mine: int, theirs: int, like: Tensor) -> Iterator[tuple[slice, slice]]:
        """Cut a pair of chunks into blocks of queries, so that few scores exist at once: their rows, and the keys."""
        step = max(1, _SCORES // (like.shape[0] * self.groups * self.half))
        for start in range(0, self.half, step):
            stop = min(start + step, self.half)
            rows = slice((mine * self.half + start) * self.groups, (mine * self.half + stop) * self.groups)
            yield rows, slice(theirs * self.half, (theirs + 1) * self.half)

    def _hidden(self, queries: Tensor, keys: Tensor, *, before: bool) -> Tensor | None:
        if self.documents is not None:
            hidden = ~visible(self.documents, queries, keys)
            return hidden.repeat_interleave(self.groups, 1).repeat_interleave(self.kv_heads, 0)
        return None if before else (queries[:, None] < keys).repeat_interleave(self.groups, 0)[None]
