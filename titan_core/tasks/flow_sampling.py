"""From noise to images along the flow that a model has learnt, by Euler's method.

Shape letters: B batch, I image rows, L numbers of an image row, S text rows, X numbers of a text row, V numbers of a
pooled text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_core.tasks.flow_matching import FlowBatch

Velocity = Callable[[FlowBatch], Tensor]


@dataclass(frozen=True)
class Conditions:
    """What images shall show, and by which side of it the model is pushed away.

    `guidance` is the input of a model with distilled guidance. `scale` and `without` make real guidance: the velocity
    is that without the text, plus `scale` times what the text changes; which costs two evaluations a step.
    """

    text_BSX: Tensor
    pooled_BV: Tensor
    ids: tuple[Tensor, Tensor]
    guidance: float | None = None
    scale: float | None = None
    without: tuple[Tensor, Tensor] | None = None


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise_BIL: Tensor,
    conditions: Conditions,
    times: Tensor,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Return image rows (B, I, L) fp32, from noise, through `times` from 1 to 0; positions are kept in fp32."""
    x_BIL, path = noise_BIL.float(), times.tolist()
    for step, (now, following) in enumerate(itertools.pairwise(path), 1):
        x_BIL = x_BIL + (following - now) * _velocity(velocity, x_BIL, now, conditions)
        on_step(step)
    return x_BIL


def _velocity(velocity: Velocity, x_BIL: Tensor, t: float, conditions: Conditions) -> Tensor:
    text, pooled, batch = conditions.text_BSX, conditions.pooled_BV, x_BIL.shape[0]
    if conditions.scale is not None:
        assert conditions.without is not None
        x_BIL = torch.cat((x_BIL, x_BIL))
        text = torch.cat((conditions.without[0].expand_as(text), text))
        pooled = torch.cat((conditions.without[1].expand_as(pooled), pooled))
    rows = x_BIL.shape[0]
    guidance = None if conditions.guidance is None else x_BIL.new_full((rows,), conditions.guidance)
    v = velocity(FlowBatch(x_BIL, x_BIL.new_full((rows,), t), text, pooled, conditions.ids, guidance)).float()
    if conditions.scale is None:
        return v
    without, with_text = v.split(batch)
    return torch.lerp(without, with_text, conditions.scale)


def as_bytes(pixels_BRHW: Tensor) -> Tensor:
    """Return pixels about in [-1, 1] as bytes (B, H, W, R), uint8 on the CPU."""
    scaled = (pixels_BRHW.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
