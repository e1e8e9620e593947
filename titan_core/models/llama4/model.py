"""Llama 4's text model (Meta 2025): most layers rotate and see one chunk, every fourth sees all without rotation.

Shape letters: B batch, T tokens, S cached and new tokens, D model width, H query heads, K key/value heads,
C head width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_core.models.llama4.flavors import Llama4Sizes
from titan_core.nn import ops, rope
from titan_core.nn.attention import CAUSAL, Attention, Mask, chunk_mask
from titan_core.nn.layers import Embedding, Linear, RMSNorm, SwiGLU

if TYPE_CHECKING:
    from titan_core.nn.kv_cache import KVCache, LayerCache

Rotation = tuple[Tensor, Tensor]


class Llama4(nn.Module):
    """Tokens in, logits out. A tied model has no `output`: its head is the embedding's weight."""

    def __init__(self, sizes: Llama4Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.tok_embeddings = Embedding(sizes.vocab_size, sizes.dim)
        self.layers = nn.ModuleDict({str(i): Block(sizes, i) for i in range(sizes.n_layers)})
        self.norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.output = None if sizes.tied else Linear(sizes.dim, sizes.vocab_size)

    def forward(self, tokens_BT: Tensor, mask: Mask = CAUSAL) -> Tensor:
        """Return logits (B, T, V) of the next token at every position."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.hidden(tokens_BT, positions_T, mask)
        return ops.linear(x_BTD, self.head_weight, x_BTD.dtype)

    def hidden(
        self, tokens_BT: Tensor, positions_T: Tensor, mask: Mask = CAUSAL, cache: KVCache | None = None
    ) -> Tensor:
        """Return what the head is applied to (B, T, D): a loss can then work on it piece by piece."""
        sizes = self.sizes
        freqs = rope.frequencies(sizes.head_dim, sizes.rope_theta, sizes.rope_scaling, positions_T.device)
        rotation = rope.table(positions_T, freqs)
        local = mask
        if sizes.chunk is not None:
            keys = positions_T.shape[0] + (0 if cache is None else cache.length)
            local = chunk_mask(mask, sizes.chunk, positions_T, keys)
        x_BTD = self.tok_embeddings(tokens_BT)
        for name, layer in self.layers.items():
            seen = mask if layer.is_global else local
            x_BTD = layer(x_BTD, rotation, positions_T, seen, None if cache is None else cache.layer(int(name)))
        return self.norm(x_BTD)

    @property
    def head_weight(self) -> Tensor:
        """The head's weight (V, D)."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, sizes: Llama4Sizes, layer: int) -> None:
        super().__init__()
        self.is_global = sizes.is_global(layer)
        self.attention_norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.attention = GlobalAttention(sizes) if self.is_global else LocalAttention(sizes)
        self.ffn_norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.feed_forward = SwiGLU(sizes.dim, sizes.ffn_dim)

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, positions_T: Tensor, mask: Mask, cache: LayerCache | None
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, positions_T, mask, cache)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))


class GroupedQueryAttention(nn.Module):
    """H query heads share K key/value heads; what is done to queries and keys before they meet differs by layer."""

    def __init__(self, sizes: Llama4Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.wq = Linear(sizes.dim, sizes.n_heads * sizes.head_dim)
        self.wk = Linear(sizes.dim, sizes.n_kv_heads * sizes.head_dim)
        self.wv = Linear(sizes.dim, sizes.n_kv_heads * sizes.head_dim)
        self.wo = Linear(sizes.n_heads * sizes.head_dim, sizes.dim)
        self.attend = Attention()

    def forward(
        self, x_BTD: Tensor, rotation: Rotation, positions_T: Tensor, mask: Mask, cache: LayerCache | None
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        q_BTHC, k_BTKC, v_BTKC = (
            w(x_BTD).unflatten(-1, (-1, self.sizes.head_dim)) for w in (self.wq, self.wk, self.wv)
        )
        q_BTHC, k_BTKC = self.prepare(q_BTHC, k_BTKC, rotation, positions_T)
        if cache is not None:
            k_BTKC, v_BTKC = cache.append(k_BTKC, v_BTKC)
        return self.wo(self.attend(q_BTHC, k_BTKC, v_BTKC, mask).flatten(-2))

    def prepare(self, q_BTHC: Tensor, k_BTKC: Tensor, rotation: Rotation, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys as they meet."""
        return q_BTHC, k_BTKC


class LocalAttention(GroupedQueryAttention):
    """Rotates, then normalises each head of queries and keys, without a scale."""

    def prepare(self, q_BTHC: Tensor, k_BTKC: Tensor, rotation: Rotation, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated, normalised queries and keys."""
        q_BTHC, k_BTKC = (ops.rotate_pairs(x, *rotation) for x in (q_BTHC, k_BTKC))
        if not self.sizes.qk_norm:
            return q_BTHC, k_BTKC
        return self._normalise(q_BTHC), self._normalise(k_BTKC)

    def _normalise(self, x_BTHC: Tensor) -> Tensor:
        return F.rms_norm(x_BTHC.float(), (x_BTHC.shape[-1],), eps=self.sizes.norm_eps).to(x_BTHC.dtype)


class GlobalAttention(GroupedQueryAttention):
    """Has no positions but the mask's, and sharpens with the context's length."""

    def prepare(self, q_BTHC: Tensor, k_BTKC: Tensor, rotation: Rotation, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries scaled by their position, and keys as they are."""
        temperature = self.sizes.temperature
        if temperature is None:
            return q_BTHC, k_BTKC
        stretch_T = torch.log1p(torch.floor((positions_T.float() + 1.0) / temperature.floor)) * temperature.scale + 1.0
        return (q_BTHC * stretch_T[:, None, None]).to(q_BTHC.dtype), k_BTKC
