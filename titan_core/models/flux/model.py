"""Flux (Black Forest Labs 2024): a transformer that predicts the velocity of a rectified flow from images to noise.

Text and image rows are two streams. Double blocks have weights for each and attend jointly; single blocks treat both
alike, with attention and MLP in parallel. What a block does is modulated by a vector of the sample: time, pooled text,
and in a distilled model the guidance. Rows are rotated by three coordinates: (0, row, column) in an image, 0 in a text.

Shape letters: B batch, I image rows, S text rows, T rows of a stream or of both, D model width, F MLP width, H heads,
C head width, L numbers of an image row, X numbers of a text row, V numbers of a pooled text.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_core.models.flux.flavors import FluxSizes
from titan_core.models.flux.parameters import TIME_DIM
from titan_core.nn import ops, rope
from titan_core.nn.attention import FULL, Attention
from titan_core.nn.layers import Linear, RMSNorm

Rotation = tuple[Tensor, Tensor]  # cosines and sines, (T, C / 2), fp32; text rows first
Streams = tuple[Tensor, Tensor]  # text and image, (B, S, D) and (B, I, D)


class Flux(nn.Module):
    """Noisy image rows, text and time in, velocities out."""

    def __init__(self, sizes: FluxSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.img_in = Linear(sizes.in_channels, sizes.dim, bias=True)
        self.txt_in = Linear(sizes.context_dim, sizes.dim, bias=True)
        self.time_in = Embedder(TIME_DIM, sizes.dim)
        self.vector_in = Embedder(sizes.vector_dim, sizes.dim)
        self.guidance_in = Embedder(TIME_DIM, sizes.dim) if sizes.guidance else None
        self.double_blocks = nn.ModuleList(DoubleBlock(sizes) for _ in range(sizes.n_double))
        self.single_blocks = nn.ModuleList(SingleBlock(sizes) for _ in range(sizes.n_single))
        self.final_layer = FinalLayer(sizes)

    def forward(
        self,
        img_BIL: Tensor,
        txt_BSX: Tensor,
        pooled_BV: Tensor,
        t_B: Tensor,
        ids: tuple[Tensor, Tensor],
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        """Return velocities (B, I, L). `t_B` is in [0, 1], 0 an image and 1 noise; `ids` are the coordinates of text
        and image rows, (S, 3) and (I, 3). Times, guidance and angles are computed in fp32 whatever the weights are."""
        vec_BD = self.time_in(wave_embedding(t_B)) + self.vector_in(pooled_BV)
        if self.guidance_in is not None:
            assert guidance_B is not None, "a model with distilled guidance is told how strong it is"
            vec_BD = vec_BD + self.guidance_in(wave_embedding(guidance_B))
        vec_BD = F.silu(vec_BD)  # all that it is used for begins with this
        streams = self.txt_in(txt_BSX), self.img_in(img_BIL)
        rotation = self.rotation(torch.cat(ids))
        for block in (*self.double_blocks, *self.single_blocks):
            streams = block(streams, vec_BD, rotation)
        return self.final_layer(streams[1], vec_BD)

    def rotation(self, ids_T3: Tensor) -> Rotation:
        """Return the rotation of rows by their coordinates."""
        sizes = self.sizes
        tables = [
            rope.table(ids_T3[:, axis], rope.frequencies(width, sizes.rope_theta, None, ids_T3.device))
            for axis, width in enumerate(sizes.axes_dim)
        ]
        cos, sin = (torch.cat(parts, -1) for parts in zip(*tables, strict=True))
        return cos, sin


def wave_embedding(t_B: Tensor) -> Tensor:
    """Return cosines and sines of 1000 t at 128 frequencies from 1 to 1 / 10000, (B, 256) fp32."""
    half = TIME_DIM // 2
    frequencies = torch.exp(torch.arange(half, device=t_B.device, dtype=torch.float32) * (-math.log(10000) / half))
    angles = 1000 * t_B.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), -1)


class Embedder(nn.Module):
    """A vector of a sample to the model's width."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.in_layer = Linear(in_dim, dim, bias=True)
        self.out_layer = Linear(dim, dim, bias=True)

    def forward(self, x_BV: Tensor) -> Tensor:
        """Map (B, V) to (B, D), in the dtype that the layers compute in."""
        dtype = self.in_layer.compute_dtype or self.in_layer.weight.dtype
        return self.out_layer(F.silu(self.in_layer(x_BV.to(dtype))))


class DoubleBlock(nn.Module):
    """Joint attention, then an MLP for each stream."""

    def __init__(self, sizes: FluxSizes) -> None:
        super().__init__()
        self.eps = sizes.norm_eps
        self.img_mod = Linear(sizes.dim, 6 * sizes.dim, bias=True)
        self.txt_mod = Linear(sizes.dim, 6 * sizes.dim, bias=True)
        self.attention = JointAttention(sizes)
        self.img_mlp = MLP(sizes)
        self.txt_mlp = MLP(sizes)

    def forward(self, streams: Streams, vec_BD: Tensor, rotation: Rotation) -> Streams:
        """Map both streams to both streams."""
        txt, img = streams
        t = self.txt_mod(vec_BD).unsqueeze(1).chunk(6, -1)  # shift, scale, gate of attention, then of the MLP
        i = self.img_mod(vec_BD).unsqueeze(1).chunk(6, -1)
        normed = ops.modulated_norm(txt, t[0], t[1], self.eps), ops.modulated_norm(img, i[0], i[1], self.eps)
        more_txt, more_img = self.attention(normed, rotation)
        txt, img = ops.gated_add(txt, t[2], more_txt), ops.gated_add(img, i[2], more_img)
        txt = ops.gated_add(txt, t[5], self.txt_mlp(ops.modulated_norm(txt, t[3], t[4], self.eps)))
        img = ops.gated_add(img, i[5], self.img_mlp(ops.modulated_norm(img, i[3], i[4], self.eps)))
        return txt, img


class SingleBlock(nn.Module):
    """Attention and MLP in parallel, over both streams alike."""

    def __init__(self, sizes: FluxSizes) -> None:
        super().__init__()
        self.eps = sizes.norm_eps
        self.mod = Linear(sizes.dim, 3 * sizes.dim, bias=True)
        self.mix = Mix(sizes)

    def forward(self, streams: Streams, vec_BD: Tensor, rotation: Rotation) -> Streams:
        """Map both streams to both streams."""
        shift, scale, gate = self.mod(vec_BD).unsqueeze(1).chunk(3, -1)
        txt, img = streams
        more_txt, more_img = self.mix(
            (ops.modulated_norm(txt, shift, scale, self.eps), ops.modulated_norm(img, shift, scale, self.eps)), rotation
        )
        return ops.gated_add(txt, gate, more_txt), ops.gated_add(img, gate, more_img)


class JointAttention(nn.Module):
    """Each stream has its own projections; every row attends to all rows of both."""

    def __init__(self, sizes: FluxSizes) -> None:
        super().__init__()
        self.img = Projections(sizes, out_bias=True)
        self.txt = Projections(sizes, out_bias=True)
        self.attend = Attention()

    def forward(self, streams: Streams, rotation: Rotation) -> Streams:
        """Map both streams to both streams."""
        txt, img = streams
        parts = zip(self.txt.heads(txt), self.img.heads(img), strict=True)
        q_BTHC, k_BTHC, v_BTHC = (torch.cat(pair, 1) for pair in parts)
        q_BTHC, k_BTHC = ops.rotate_pairs(q_BTHC, *rotation), ops.rotate_pairs(k_BTHC, *rotation)
        x_BTD = self.attend(q_BTHC, k_BTHC, v_BTHC, FULL).flatten(-2)
        x_txt, x_img = x_BTD.split((txt.shape[1], img.shape[1]), 1)
        return self.txt.wo(x_txt), self.img.wo(x_img)


class Projections(nn.Module):
    """What rows become in attention, and what attention becomes in their stream."""

    def __init__(self, sizes: FluxSizes, *, out_bias: bool) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.wq = Linear(sizes.dim, sizes.dim, bias=True)
        self.wk = Linear(sizes.dim, sizes.dim, bias=True)
        self.wv = Linear(sizes.dim, sizes.dim, bias=True)
        self.wo = Linear(sizes.dim, sizes.dim, bias=out_bias)
        self.q_norm = RMSNorm(sizes.head_dim, sizes.norm_eps)
        self.k_norm = RMSNorm(sizes.head_dim, sizes.norm_eps)

    def heads(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised queries and keys, and values, (B, T, H, C)."""
        q, k, v = (w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        return self.q_norm(q), self.k_norm(k), v


class Mix(Projections):
    """Attention and MLP of all rows, added up; the MLP's last bias serves both."""

    def __init__(self, sizes: FluxSizes) -> None:
        super().__init__(sizes, out_bias=False)
        self.w1 = Linear(sizes.dim, sizes.mlp_dim, bias=True)
        self.w2 = Linear(sizes.mlp_dim, sizes.dim, bias=True)
        self.attend = Attention()

    def forward(self, streams: Streams, rotation: Rotation) -> Streams:
        """Map both streams to both streams."""
        x_BTD = torch.cat(streams, 1)
        q_BTHC, k_BTHC, v_BTHC = self.heads(x_BTD)
        q_BTHC, k_BTHC = ops.rotate_pairs(q_BTHC, *rotation), ops.rotate_pairs(k_BTHC, *rotation)
        attended = self.wo(self.attend(q_BTHC, k_BTHC, v_BTHC, FULL).flatten(-2))
        x_BTD = attended + self.w2(F.gelu(self.w1(x_BTD), approximate="tanh"))
        txt, img = x_BTD.split((streams[0].shape[1], streams[1].shape[1]), 1)
        return txt, img


class MLP(nn.Module):
    """`w2(gelu(w1 x))`, with the tanh form of GELU."""

    def __init__(self, sizes: FluxSizes) -> None:
        super().__init__()
        self.w1 = Linear(sizes.dim, sizes.mlp_dim, bias=True)
        self.w2 = Linear(sizes.mlp_dim, sizes.dim, bias=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.w2(F.gelu(self.w1(x_BTD), approximate="tanh"))


class FinalLayer(nn.Module):
    """The image stream to velocities."""

    def __init__(self, sizes: FluxSizes) -> None:
        super().__init__()
        self.eps = sizes.norm_eps
        self.mod = Linear(sizes.dim, 2 * sizes.dim, bias=True)
        self.linear = Linear(sizes.dim, sizes.in_channels, bias=True)

    def forward(self, img_BID: Tensor, vec_BD: Tensor) -> Tensor:
        """Map (B, I, D) to (B, I, L)."""
        shift, scale = self.mod(vec_BD).unsqueeze(1).chunk(2, -1)
        return self.linear(ops.modulated_norm(img_BID, shift, scale, self.eps))
