"""Rectified-flow matching (Lipman et al. 2023, Liu et al. 2023): predict the velocity from an image to noise.

What is random in a sample (noise, time, which texts are left out) is a function of the seed and of the sample's number
in the run, so it is the same on every layout, and never the same for two samples.

Shape letters: B batch, I image rows, L numbers of an image row, S text rows, X numbers of a text row, V numbers of a
pooled text, K times that are told apart.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titan_core.config import schema
from titan_core.nn import flow
from titan_core.nn.random import normal_rows, uniform_rows

BUCKETS = 8  # times at which validation measures: the middles of eighths (Esser et al. 2024)


@dataclass(frozen=True)
class FlowBatch:
    """Noisy images with all that the model is told of them; without a target, a question for the velocity.

    `ids` are the coordinates of text and image rows. A sample that is not `counted` is padding. In validation
    `buckets_B` says which of the K times each sample is at.
    """

    noisy_BIL: Tensor
    t_B: Tensor
    text_BSX: Tensor
    pooled_BV: Tensor
    ids: tuple[Tensor, Tensor]
    guidance_B: Tensor | None = None
    target_BIL: Tensor | None = None
    counted_B: Tensor | None = None
    buckets_B: Tensor | None = None

    def piece(self, rank: int, size: int) -> FlowBatch:
        """Return the rank-th of so many equal pieces of the rows."""

        def cut(x: Tensor, dim: int) -> Tensor:
            return x.tensor_split(size, dim)[rank]

        return dataclasses.replace(
            self,
            noisy_BIL=cut(self.noisy_BIL, 1),
            text_BSX=cut(self.text_BSX, 1),
            ids=(cut(self.ids[0], 0), cut(self.ids[1], 0)),
            target_BIL=None if self.target_BIL is None else cut(self.target_BIL, 1),
        )


class FlowMatching(nn.Module):
    """A flow model together with its loss, the squared error of the velocity: a sum over image rows, and how many."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.factors = {"loss": 1.0}

    def forward(self, batch: FlowBatch) -> Tensor:
        """Return the sum over image rows of the mean squared error of a row, fp32: a scalar, or (K) by time where the
        batch tells times apart; for a batch without a target the velocity (B, I, L)."""
        velocity_BIL = self.model(
            batch.noisy_BIL, batch.text_BSX, batch.pooled_BV, batch.t_B, batch.ids, batch.guidance_B
        )
        if batch.target_BIL is None:
            return velocity_BIL
        errors_B = (velocity_BIL.float() - batch.target_BIL).square().mean(-1).sum(-1)
        if batch.counted_B is not None:
            errors_B = errors_B * batch.counted_B
        return errors_B.sum() if batch.buckets_B is None else _by_bucket(errors_B, batch.buckets_B)

    @staticmethod
    def weight(batch: FlowBatch) -> Tensor:
        """Return how many image rows count, fp32, in the shape of the loss."""
        rows = batch.noisy_BIL.shape[1]
        counted_B = batch.t_B.new_ones(batch.t_B.shape) if batch.counted_B is None else batch.counted_B.float()
        return rows * (counted_B.sum() if batch.buckets_B is None else _by_bucket(counted_B, batch.buckets_B))


def _by_bucket(values_B: Tensor, buckets_B: Tensor) -> Tensor:
    return values_B.new_zeros(BUCKETS).index_add(0, buckets_B, values_B)


# ---------------------------------------------------------------------------------------------- what is random


@dataclass(frozen=True)
class Draws:
    """What is drawn for samples by their numbers."""

    seed: int
    config: schema.FlowMatching
    dropout: float

    def noise(self, rows_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the noise at the other end of the flow, (B, *shape) fp32."""
        return normal_rows(self.seed, "noise", rows_B, shape)

    def latent_noise(self, rows_B: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return what picks latents from the distribution that the autoencoder gives, (B, *shape) fp32."""
        return normal_rows(self.seed, "latents", rows_B, shape)

    def times(self, rows_B: Tensor, image_rows: int) -> Tensor:
        """Return times in (0, 1), (B) fp32."""
        config = self.config
        if config.timesteps == "uniform":
            t_B = uniform_rows(self.seed, "time", rows_B)
        else:
            number_B = normal_rows(self.seed, "time", rows_B, ())
            t_B = torch.sigmoid(config.logit_mean + config.logit_std * number_B)
        return flow.shifted(t_B, flow.shift_of(image_rows)) if config.resolution_shift else t_B

    def left_out(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return for which samples T5's and CLIP's text is left out, booleans (B)."""
        first = uniform_rows(self.seed, "text", rows_B) < self.dropout
        if self.config.dropout == "joint":
            return first, first
        return first, uniform_rows(self.seed, "pooled text", rows_B) < self.dropout


def mix(latents_BIL: Tensor, noise_BIL: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the point at time t on the line from an image to noise, and the velocity along it."""
    t_B11 = t_B[:, None, None]
    return torch.lerp(latents_BIL, noise_BIL, t_B11), noise_BIL - latents_BIL


def bucket_times(buckets_B: Tensor) -> Tensor:
    """Return the times of buckets: (k + 1/2) / K, fp32."""
    return (buckets_B.float() + 0.5) / BUCKETS
