"""Context parallelism: each rank holds some tokens of every sequence, and attention brings their keys together.

A causal sequence is cut into 2 n chunks for n ranks; rank r holds chunks r and 2n - 1 - r, so that all ranks have equal
work. Where every token sees every other, rank r holds the r-th of n pieces. Three ways to attend, the same code on
every device:

- `allgather`: every rank gathers all keys and values; each chunk of queries then meets the keys up to its own end.
- `alltoall`: keys and values travel round the ring of ranks (Liu et al. 2023), and nobody ever holds them all.
- `heads`: an exchange gives every rank whole sequences of a part of the heads (Jacobs et al. 2023), and another gives
  them back.

Shape letters: B batch, T tokens of this rank, S tokens of all ranks, H heads, C head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from titan_core.config.layout import Layout
from titan_core.declare.sharding import Sharding, matches
from titan_core.nn.attention import Mask
from titan_core.parallel.exchange import AllToAll, Gather
from titan_core.parallel.mesh import Mesh
from titan_core.parallel.ring import ring_attention
from titan_core.parallel.views import wrap_forward

_TOKENS = 1  # of (B, T, H, C)


def chunks(rank: int, size: int) -> tuple[int, int]:
    """Return which two chunks of a sequence cut into 2 n a rank of n holds."""
    return rank, 2 * size - 1 - rank


def positions(seq_len: int, rank: int, size: int) -> Tensor:
    """Return which tokens of a sequence a rank holds, (T)."""
    every = torch.arange(seq_len).chunk(2 * size)
    return torch.cat([every[number] for number in chunks(rank, size)])


class Cutter:
    """Cuts batches to the tokens that this rank holds; without context parallelism it leaves them whole."""

    def __init__(self, layout: Layout, rank: int, method: str) -> None:
        self.size, self.rank, self.method = layout.cp, rank, method

    def __call__(self, batch: Any) -> Any:
        """Return this rank's tokens and labels of a batch; document numbers stay whole, as keys are. A batch that has
        rows of other kinds cuts itself."""
        if self.size == 1:
            return batch
        if hasattr(batch, "piece"):
            return batch.piece(self.rank, self.size)
        seq_len = batch.tokens.shape[1]
        mine = positions(seq_len, self.rank, self.size).to(batch.tokens.device)
        queries = torch.arange(seq_len, device=mine.device) if self.method == "heads" else mine
        rows = ("tokens", "labels", "tokens_ahead", "labels_ahead")
        cut = {name: x[:, mine] for name in rows if (x := getattr(batch, name)) is not None}
        return dataclasses.replace(batch, **cut, positions=mine, queries=queries)


def apply(model: nn.Module, sharding: Sharding, mesh: Mesh, method: str) -> None:
    """Let the attention modules of a model meet the keys of all ranks."""
    group, rank, size = mesh.cp_group, mesh.at["cp"], mesh.layout.cp
    for name, module in model.named_modules():
        if matches(name, sharding.attentions):
            if method == "alltoall":
                scale: Any = module.scale  # the ring attends by itself
                wrap_forward(module, _ring(group, rank, size, scale))
            else:
                wrap_forward(module, (_gathered if method == "allgather" else _by_heads)(group, rank, size))


def _order(seq_len: int, size: int, device: torch.device) -> Tensor:
    """Return the positions of gathered tokens, rank by rank."""
    return torch.cat([positions(seq_len, rank, size) for rank in range(size)]).to(device)


def _gathered(group: ProcessGroup, rank: int, size: int) -> Callable[..., Tensor]:
    def around(attend: Callable[..., Tensor], q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, mask: Mask) -> Tensor:
        k, v = (Gather.apply(x, _TOKENS, group) for x in (k_BTKC, v_BTKC))
        if not mask.causal:  # the order of keys that all are seen does not matter
            return attend(q_BTHC, k, v, mask)
        back = _order(k.shape[1], size, k.device).argsort()
        k, v = k[:, back], v[:, back]
        if mask.blocks is not None:
            return attend(q_BTHC, k, v, mask)
        half = q_BTHC.shape[1] // 2
        out = []
        for number, rows in zip(chunks(rank, size), (slice(0, half), slice(half, None)), strict=True):
            end = (number + 1) * half
            seen = mask if mask.dense is None else Mask(dense=mask.dense[:, :, rows, :end])
            out.append(attend(q_BTHC[:, rows], k[:, :end], v[:, :end], seen))
        return torch.cat(out, _TOKENS)

    return around


def _ring(group: ProcessGroup, rank: int, size: int, scale: float | None) -> Callable[..., Tensor]:
    def around(attend: Callable[..., Tensor], q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, mask: Mask) -> Tensor:
        held = [chunks(r, size) for r in range(size)] if mask.causal else None
        return ring_attention(q_BTHC, k_BTKC, v_BTKC, held, mask.documents, rank, group, scale)

    return around


def _by_heads(group: ProcessGroup, rank: int, size: int) -> Callable[..., Tensor]:
    def around(attend: Callable[..., Tensor], q_BTHC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, mask: Mask) -> Tensor:
        q, k, v = (_heads_to_tokens(x, group, size) for x in (q_BTHC, k_BTKC, v_BTKC))
        if not mask.causal:
            return _tokens_to_heads(attend(q, k, v, mask), group, size)
        order = _order(k.shape[1], size, k.device)
        back = order.argsort()
        q, k, v = q[:, back], k[:, back], v[:, back]
        return _tokens_to_heads(attend(q, k, v, mask)[:, order], group, size)

    return around


def _heads_to_tokens(x_BTHC: Tensor, group: ProcessGroup, size: int) -> Tensor:
    """Exchange (B, T, H, C) for (B, S, H / n, C): all tokens, rank by rank, of a part of the heads."""
    batch, _, heads, width = x_BTHC.shape
    parts = x_BTHC.unflatten(2, (size, heads // size)).permute(2, 0, 1, 3, 4)
    swapped = AllToAll.apply(parts, group)
    return swapped.permute(1, 0, 2, 3, 4).reshape(batch, -1, heads // size, width)


def _tokens_to_heads(x_BSHC: Tensor, group: ProcessGroup, size: int) -> Tensor:
    """Undo `_heads_to_tokens`."""
    batch, tokens, heads, width = x_BSHC.shape
    parts = x_BSHC.view(batch, size, tokens // size, heads, width).permute(1, 0, 2, 3, 4)
    swapped = AllToAll.apply(parts, group)
    return swapped.permute(1, 2, 0, 3, 4).reshape(batch, tokens // size, heads * size, width)
