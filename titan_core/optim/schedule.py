"""The learning rate as a pure function of the step: warmup, stable, decay."""

from __future__ import annotations

import math

from titan_core.config import schema


def lr_factor(step: int, steps: int, config: schema.LRScheduler) -> float:
    """Return the share of the peak learning rate at 0-based `step` of a run of `steps`.

    Linear warmup over w steps, then constant, then D steps of decay to `min_lr_factor`. One virtual stable step keeps
    the last step of the run above the floor, as torchtitan does it.
    """
    warmup = min(config.warmup_steps, steps)
    decay = steps - warmup
    if config.decay_ratio is not None:
        decay = min(round(steps * config.decay_ratio), steps - warmup)
    stable = steps + 1 - warmup - decay
    if step < warmup:
        return (step + 1) / warmup
    if step < warmup + stable or decay == 0:
        return 1.0
    progress = min(1.0, (step + 1 - warmup - stable) / decay)
    shape = {
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[config.decay_type]
    return config.min_lr_factor + (1 - config.min_lr_factor) * shape
