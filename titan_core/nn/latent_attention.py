"""Multi-head latent attention: keys and values are made of one narrow latent vector a token (DeepSeek-V2, section 2.1).

Shape letters: B batch, T tokens, S cached and new tokens, D model width, H heads, N width of a head's queries and keys
that does not rotate, R width that rotates, C = N + R, V width of a head's values, L latent width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from titan_core.nn import ops
from titan_core.nn.attention import Attention
from titan_core.nn.decoder import Place
from titan_core.nn.layers import Linear, RMSNorm

if TYPE_CHECKING:
    from titan_core.nn.kv_cache import LayerCache

_LATENT_EPS = 1e-6  # of the norms on latents: the published models have it whatever their other norms have


class LatentAttention(nn.Module):
    """Each head's keys and values come from a latent of `kv_lora_rank`; one rotating key is shared by all heads.

    With `q_lora_rank`, queries come from a latent too. A cache keeps the latent and the rotated key of a token.
    """

    def __init__(self, sizes: Any) -> None:
        super().__init__()
        self.widths = sizes.qk_nope_dim, sizes.qk_rope_dim
        self.v_dim, self.kv_rank = sizes.v_dim, sizes.kv_lora_rank
        self.wq = self.wq_a = self.q_norm = self.wq_b = None
        if sizes.q_lora_rank:
            self.wq_a = Linear(sizes.dim, sizes.q_lora_rank)
            self.q_norm = RMSNorm(sizes.q_lora_rank, _LATENT_EPS)
            self.wq_b = Linear(sizes.q_lora_rank, sizes.n_heads * sizes.qk_dim)
        else:
            self.wq = Linear(sizes.dim, sizes.n_heads * sizes.qk_dim)
        self.wkv_a = Linear(sizes.dim, sizes.kv_lora_rank + sizes.qk_rope_dim)
        self.kv_norm = RMSNorm(sizes.kv_lora_rank, _LATENT_EPS)
        self.wkv_b = Linear(sizes.kv_lora_rank, sizes.n_heads * (sizes.qk_nope_dim + sizes.v_dim))
        self.wo = Linear(sizes.n_heads * sizes.v_dim, sizes.dim)
        self.attend = Attention(sizes.softmax_scale)

    def forward(self, x_BTD: Tensor, place: Place, cache: LayerCache | None) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        q_BTHN, q_BTHR = self._queries(x_BTD).unflatten(-1, (-1, sum(self.widths))).split(self.widths, -1)
        latent_BTL, k_BTR = self.wkv_a(x_BTD).split((self.kv_rank, self.widths[1]), -1)
        latent_BTL = self.kv_norm(latent_BTL)
        q_BTHR = ops.rotate_pairs(q_BTHR, *place.rotation)
        k_BT1R = ops.rotate_pairs(k_BTR.unsqueeze(-2), *place.rotation)
        if cache is not None:
            latent_BS1L, k_BS1R = cache.append(latent_BTL.unsqueeze(-2), k_BT1R)
            if k_BS1R.shape[1] > k_BT1R.shape[1]:
                return self.wo(self._to_latents(q_BTHN, q_BTHR, latent_BS1L, k_BS1R, place).flatten(-2))
        kv_BTHX = self.wkv_b(latent_BTL).unflatten(-1, (-1, self.widths[0] + self.v_dim))
        k_BTHN, v_BTHV = kv_BTHX.split((self.widths[0], self.v_dim), -1)
        q_BTHC = torch.cat((q_BTHN, q_BTHR), -1)
        k_BTHC = torch.cat((k_BTHN, k_BT1R.expand(-1, -1, k_BTHN.shape[2], -1)), -1)
        return self.wo(self.attend(q_BTHC, k_BTHC, v_BTHV, place.mask).flatten(-2))

    def _queries(self, x_BTD: Tensor) -> Tensor:
        if self.wq is not None:
            return self.wq(x_BTD)
        assert self.wq_a is not None
        assert self.q_norm is not None
        assert self.wq_b is not None
        return self.wq_b(self.q_norm(self.wq_a(x_BTD)))

    def _to_latents(self, q_BTHN: Tensor, q_BTHR: Tensor, latent_BS1L: Tensor, k_BS1R: Tensor, place: Place) -> Tensor:
        """Return what heads give, (B, T, H, V), without making keys and values: a head's scores are q (W latent) =
        (q W) latent, so all heads meet the latents as one shared key, and then the latents as one shared value."""
        weight = self.wkv_b.weight.to(q_BTHN.dtype).unflatten(0, (-1, self.widths[0] + self.v_dim))
        k_HNL, v_HVL = weight.split((self.widths[0], self.v_dim), 1)
        q_BTHL = torch.einsum("bthn,hnl->bthl", q_BTHN, k_HNL)
        q, k = torch.cat((q_BTHL, q_BTHR), -1), torch.cat((latent_BS1L, k_BS1R), -1)
        out_BTHL = self.attend(q, k, latent_BS1L, place.mask)
        return torch.einsum("bthl,hvl->bthv", out_BTHL, v_HVL)
