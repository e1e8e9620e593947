"""A decoder: embedding, blocks of attention and MLP on a residual stream, norm, head. Families fill in the attention.

Shape letters: B batch, T tokens, S cached and new tokens, D model width, H query heads, K key/value heads,
C head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from titan_core.declare.rope import Yarn
from titan_core.nn import ops, rope
from titan_core.nn.attention import CAUSAL, Attention, Mask
from titan_core.nn.layers import Embedding, Linear, RMSNorm, SwiGLU
from titan_core.nn.moe import MoE

if TYPE_CHECKING:
    from titan_core.nn.kv_cache import KVCache, LayerCache


@dataclass(frozen=True)
class Place:
    """Where tokens stand: positions (T), the rotation by them (cosines and sines, (T, C / 2)), and what they see."""

    positions_T: Tensor
    rotation: tuple[Tensor, Tensor]
    mask: Mask


class Decoder(nn.Module):
    """Tokens in, logits out. A tied model has no `output`: its head is the embedding's weight.

    `sizes` has the fields of `DecoderSizes`; `attention(layer)` makes the attention of a layer.
    """

    def __init__(self, sizes: Any, attention: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.sizes = sizes
        self.tok_embeddings = Embedding(sizes.vocab_size, sizes.dim)
        self.layers = nn.ModuleDict({str(i): Block(sizes, attention(i), i) for i in range(sizes.n_layers)})
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
        rotation = self.rotation(positions_T)
        seen = self.masks(mask, positions_T, 0 if cache is None else cache.length)
        x_BTD = self.tok_embeddings(tokens_BT)
        for name, layer in self.layers.items():
            place = Place(positions_T, rotation, seen(int(name)))
            x_BTD = layer(x_BTD, place, None if cache is None else cache.layer(int(name)))
        return self.norm(x_BTD)

    @property
    def head_weight(self) -> Tensor:
        """The head's weight (V, D)."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    def rotation(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (T, C / 2), fp32. Not a buffer: nothing may cast or forget it."""
        sizes = self.sizes
        scaling = getattr(sizes, "rope_scaling", None)
        freqs_C = rope.frequencies(sizes.head_dim, sizes.rope_theta, scaling, positions_T.device)
        return rope.table(positions_T, freqs_C, scaling.amplitude if isinstance(scaling, Yarn) else 1.0)

    def masks(self, mask: Mask, positions_T: Tensor, cached: int) -> Callable[[int], Mask]:
        """Return the mask of each layer, by its number; all are the same here."""
        return lambda layer: mask


class Block(nn.Module):
    """Attention, and an MLP or a mixture of experts, each behind a norm and added to the residual stream."""

    def __init__(self, sizes: Any, attention: nn.Module, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(sizes.dim, sizes.norm_eps)
        mixed = sizes.is_mixture(layer)
        self.feed_forward = None if mixed else SwiGLU(sizes.dim, sizes.ffn_dim)
        self.moe = MoE(sizes) if mixed else None

    def forward(self, x_BTD: Tensor, place: Place, cache: LayerCache | None) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), place, cache)
        mlp = self.moe if self.feed_forward is None else self.feed_forward
        assert mlp is not None
        return x_BTD + mlp(self.ffn_norm(x_BTD))


class GroupedQueryAttention(nn.Module):
    """H query heads share K key/value heads (Ainslie et al. 2023); `prepare` is what is done before they meet."""

    def __init__(self, sizes: Any) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.wq = Linear(sizes.dim, sizes.n_heads * sizes.head_dim)
        self.wk = Linear(sizes.dim, sizes.n_kv_heads * sizes.head_dim)
        self.wv = Linear(sizes.dim, sizes.n_kv_heads * sizes.head_dim)
        self.wo = Linear(sizes.n_heads * sizes.head_dim, sizes.dim)
        self.attend = Attention()

    def forward(self, x_BTD: Tensor, place: Place, cache: LayerCache | None) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        q_BTHC, k_BTKC, v_BTKC = (w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q_BTHC, k_BTKC = self.prepare(q_BTHC, k_BTKC, place)
        if cache is not None:
            k_BTKC, v_BTKC = cache.append(k_BTKC, v_BTKC)
        return self.wo(self.attend(q_BTHC, k_BTKC, v_BTKC, place.mask).flatten(-2))

    def prepare(self, q_BTHC: Tensor, k_BTKC: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        """Return queries and keys, rotated by their positions."""
        return ops.rotate_pairs(q_BTHC, *place.rotation), ops.rotate_pairs(k_BTKC, *place.rotation)
