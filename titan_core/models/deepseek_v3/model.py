"""DeepSeek-V3 and V2 (DeepSeek 2024): a pre-norm decoder with latent attention; all but the first layers are mixtures
of experts. Further layers may learn to predict further tokens.

Shape letters: B batch, T tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_core.models.deepseek_v3.flavors import DeepSeekSizes
from titan_core.nn.attention import Mask
from titan_core.nn.decoder import Block, Decoder, Place
from titan_core.nn.latent_attention import LatentAttention
from titan_core.nn.layers import Linear, RMSNorm


class DeepSeekV3(Decoder):
    """Every layer attends alike. `forward` and `hidden` leave the layers of multi-token prediction out."""

    def __init__(self, sizes: DeepSeekSizes) -> None:
        super().__init__(sizes, lambda layer: LatentAttention(sizes))
        self.mtp = nn.ModuleDict({str(depth): MTPLayer(sizes, depth) for depth in range(sizes.num_mtp_layers)})

    def ahead(self, depth: int, hidden_BTD: Tensor, tokens_BT: Tensor, positions_T: Tensor, mask: Mask) -> Tensor:
        """Return what the head is applied to for the token depth + 2 places ahead, (B, T, D).

        `hidden_BTD` is what the head was applied to for the token before that one, which is `tokens_BT`.
        """
        place = Place(positions_T, self.rotation(positions_T), mask)
        return self.mtp[str(depth)](hidden_BTD, self.tok_embeddings(tokens_BT), place)


class MTPLayer(nn.Module):
    """Multi-token prediction (DeepSeek-V3, eq. 21 to 23): what was known, and the token that came, meet in a block."""

    def __init__(self, sizes: DeepSeekSizes, depth: int) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.hidden_norm = RMSNorm(sizes.dim, sizes.norm_eps)
        self.proj = Linear(2 * sizes.dim, sizes.dim)
        self.block = Block(sizes, LatentAttention(sizes), sizes.n_layers + depth)
        self.norm = RMSNorm(sizes.dim, sizes.norm_eps)

    def forward(self, hidden_BTD: Tensor, embedded_BTD: Tensor, place: Place) -> Tensor:
        """Map two streams (B, T, D) to one."""
        both = torch.cat((self.embedding_norm(embedded_BTD), self.hidden_norm(hidden_BTD)), -1)
        return self.norm(self.block(self.proj(both), place, None))
