"""Which checkpoints may go."""

from __future__ import annotations

import math

from titan_core.config import schema

METRIC = "validation_loss"


def to_remove(
    steps: list[int],
    metrics: dict[int, dict[str, float]],
    config: schema.Checkpoint,
    protected: int | None,
) -> list[int]:
    """Return the steps to remove: all but the newest `keep_latest_k`, the best `keep_best_k` and the protected one.

    `steps` are in order; `keep_latest_k` 0 keeps all. Best is the lowest validation loss; one that is not a number
    is never among the best.
    """
    if config.keep_latest_k == 0:
        return []
    keep = set(steps[-config.keep_latest_k :])
    scored = [
        (metrics[step][METRIC], step) for step in steps if math.isfinite(metrics.get(step, {}).get(METRIC, math.nan))
    ]
    keep.update(step for _, step in sorted(scored)[: config.keep_best_k])
    if protected is not None:
        keep.add(protected)
    return [step for step in steps if step not in keep]
