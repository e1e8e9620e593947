"""Times of rectified flows (Liu et al. 2023; Esser et al. 2024): 0 is an image, 1 is noise.

The more rows an image has, the more of its content is still seen at a given time: times are shifted towards noise, by
an amount that grows in a line from 256 rows (256 px in Flux) to 4,096 (1,024 px).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LINE = ((256, 0.5), (4096, 1.15))  # image rows, mu


def shift_of(rows: int) -> float:
    """Return mu for an image of so many rows, as the transformer counts them (2 x 2 latents)."""
    (x1, y1), (x2, y2) = _LINE
    return y1 + (rows - x1) * (y2 - y1) / (x2 - x1)


def shifted(t: Tensor, mu: float) -> Tensor:
    """Return e^mu / (e^mu + 1 / t - 1), which is 0 at 0 and 1 at 1."""
    factor = math.exp(mu)
    return factor * t / (1 + (factor - 1) * t)


def schedule(steps: int, mu: float | None) -> Tensor:
    """Return the times between the steps of a sampler, from 1 to 0, (steps + 1) fp32; `mu` None leaves them evenly
    spaced, as a model distilled to few steps wants them."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (times if mu is None else shifted(times, mu)).float()
