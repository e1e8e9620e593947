"""Qwen3 (Qwen team 2025): a pre-norm decoder with grouped-query attention, norms on queries and keys, SwiGLU.

Shape letters: B batch, T tokens, S cached and new tokens, D model width, H query heads, K key/value heads,
C head width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from titan_core.models.qwen3.flavors import QwenSizes
from titan_core.nn import ops, rope
from titan_core.nn.attention import CAUSAL, Attention, Mask
from titan_core.nn.layers import Embedding, Linear, RMSNorm, SwiGLU

if TYPE_CHECKING:
    from titan_core.nn.kv_cache import KVCache, LayerCache

Rotation = tuple[Tensor, Tensor]


class Qwen3(nn.Module):
    """Tokens in, logits out. A tied model has no `output`: its head is the embedding's weight."""

    def __init__(self, sizes: QwenSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.tok_embeddings = Embedding(sizes.vocab_size, sizes.dim)
        self.layers = nn.ModuleDict({str(i): Block(sizes) for i in range(sizes.n_layers)})
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
        freqs = rope.frequencies(self.sizes.head_dim, self.sizes.rope_theta, None, positions_T.device)
        rotation = rope.table(positions_T, freqs)
        x_BTD = self.tok_embeddings(tokens_BT)
        for name, layer in self.layers.items():
            x_BTD = layer(x_BTD, rotation, mask, None if cache is None else cache.layer(int(name)))
        return self.norm(x_BTD)

    @property
    def head_weight(self) -> Tensor:
        """The head's weight (V, D)."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, sizes: QwenSizes) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.attention = NormedAttention(sizes)
        self.ffn_norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.feed_forward = SwiGLU(sizes.dim, sizes.ffn_dim)

    def forward(self, x_BTD: Tensor, rotation: Rotation, mask: Mask, cache: LayerCache | None) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, mask, cache)
        return x_BTD + self.feed_forward(self.ffn_norm(x_BTD))


class NormedAttention(nn.Module):
    """H query heads share K key/value heads; each head of queries and keys is normalised before the rotation."""

    def __init__(self, sizes: QwenSizes) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.wq = Linear(sizes.dim, sizes.n_heads * sizes.head_dim)
        self.wk = Linear(sizes.dim, sizes.n_kv_heads * sizes.head_dim)
        self.wv = Linear(sizes.dim, sizes.n_kv_heads * sizes.head_dim)
        self.wo = Linear(sizes.n_heads * sizes.head_dim, sizes.dim)
        self.q_norm = RMSNorm(sizes.head_dim, sizes.norm_eps)
        self.k_norm = RMSNorm(sizes.head_dim, sizes.norm_eps)
        self.attend = Attention()

    def forward(self, x_BTD: Tensor, rotation: Rotation, mask: Mask, cache: LayerCache | None) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        q_BTHC = self.q_norm(self.wq(x_BTD).unflatten(-1, (-1, self.head_dim)))
        k_BTKC = self.k_norm(self.wk(x_BTD).unflatten(-1, (-1, self.head_dim)))
        v_BTKC = self.wv(x_BTD).unflatten(-1, (-1, self.head_dim))
        q_BTHC = ops.rotate_pairs(q_BTHC, *rotation)
        k_BTKC = ops.rotate_pairs(k_BTKC, *rotation)
        if cache is not None:
            k_BTKC, v_BTKC = cache.append(k_BTKC, v_BTKC)
        return self.wo(self.attend(q_BTHC, k_BTKC, v_BTKC, mask).flatten(-2))
