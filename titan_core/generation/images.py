"""Images from a trained flow model: encoded texts in, pixels out.

Shape letters: B batch, S text rows, X numbers of a text row, V numbers of a pooled text, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from titan_core.nn import flow
from titan_core.nn.latents import coordinates, unpack
from titan_core.nn.random import normal_rows
from titan_core.tasks.encoders import Autoencoder, Place
from titan_core.tasks.flow_matching import FlowBatch
from titan_core.tasks.flow_sampling import Conditions, as_bytes, sample


@dataclass(frozen=True)
class Recipe:
    """How images are drawn. `guidance` is told to a model with distilled guidance, `real_guidance` is done with two
    evaluations a step; `shift` moves times towards noise by the number of image rows."""

    width: int
    height: int
    steps: int
    guidance: float | None
    real_guidance: float | None
    shift: bool


class Drawer:
    """A model with what turns its latents into pixels."""

    def __init__(self, model: nn.Module, sizes: Any, autoencoder: Autoencoder, place: Place) -> None:
        self.model, self.sizes, self.autoencoder, self.place = model, sizes, autoencoder, place

    def draw(
        self,
        texts: tuple[Tensor, Tensor],
        without: tuple[Tensor, Tensor] | None,
        seeds: Sequence[int],
        recipe: Recipe,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Tensor:
        """Return images (B, H, W, 3) uint8 on the CPU for texts (B, S, X) and (B, V); an image depends on its own text
        and seed only. `without` are the encodings of no text, (1, S, X) and (1, V), for real guidance."""
        return self.decode(self.latents(texts, without, self.noise(seeds, recipe), recipe, on_step), recipe)

    def noise(self, seeds: Sequence[int], recipe: Recipe) -> Tensor:
        """Return the noise that images begin with, as image rows."""
        rows, columns = self._grid(recipe)
        shape = rows * columns, self.sizes.in_channels
        return torch.cat(
            [
                normal_rows(seed, "image", torch.zeros(1, dtype=torch.int64, device=self.place.device), shape)
                for seed in seeds
            ]
        )

    def latents(
        self,
        texts: tuple[Tensor, Tensor],
        without: tuple[Tensor, Tensor] | None,
        noise: Tensor,
        recipe: Recipe,
        on_step: Callable[[int], None] = lambda step: None,
    ) -> Tensor:
        """Return image rows drawn from noise."""
        dtype, device = self.place.dtype, self.place.device
        text, pooled = (x.to(device, dtype) for x in texts)
        empty = None if without is None else (without[0].to(device, dtype), without[1].to(device, dtype))
        rows, columns = self._grid(recipe)
        conditions = Conditions(
            text,
            pooled,
            coordinates(rows, columns, text.shape[1], device),
            recipe.guidance,
            recipe.real_guidance,
            empty,
        )
        times = flow.schedule(recipe.steps, flow.shift_of(rows * columns) if recipe.shift else None)
        return sample(self._velocity, noise, conditions, times, on_step)

    @torch.no_grad()
    def decode(self, rows_BIL: Tensor, recipe: Recipe) -> Tensor:
        """Return the pixels of image rows."""
        rows, columns = self._grid(recipe)
        return as_bytes(self.autoencoder.decode(unpack(rows_BIL, 2 * rows, 2 * columns).to(self.place.dtype)))

    def _velocity(self, batch: FlowBatch) -> Tensor:
        dtype = self.place.dtype
        return self.model(
            batch.noisy_BIL.to(dtype), batch.text_BSX, batch.pooled_BV, batch.t_B, batch.ids, batch.guidance_B
        )

    def _grid(self, recipe: Recipe) -> tuple[int, int]:
        side = 2 * self.autoencoder.factor
        return recipe.height // side, recipe.width // side
