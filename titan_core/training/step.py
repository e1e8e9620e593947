"""One optimizer step: microbatches, one division, one clip, one update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_core.parallel.clip import clip_grad_norm
from titan_core.parallel.stages import last_stage_rank
from titan_core.training.build import Parts


@dataclass(frozen=True)
class Outcome:
    """What a step's forward and backward gave; all numbers are global.

    `loss` is the mean over all targets (nats), `max_loss` the largest mean of a data rank, `targets` how many counted.
    """

    loss: float
    max_loss: float
    grad_norm: float
    targets: int


def forward_backward(parts: Parts, read: Callable[[], Any]) -> Outcome:
    """Accumulate the gradient of the mean loss over all targets of all microbatches of all ranks, and clip it.

    The divisor is the global number of targets, known before the first backward; so padding, accumulation and ragged
    batches give the number that one process would give.
    """
    parts.optimizer.zero_grad(set_to_none=True)
    batches = [parts.cutter(parts.kind.prepare(read().to(parts.world.device))) for _ in range(parts.microbatches)]
    weight = torch.stack([parts.task.weight(batch) for batch in batches]).sum().float()
    total = _all_reduce(weight * parts.counts, parts)
    loss_sum = parts.parallel.forward_backward(batches, 1 / total.clamp(min=1))
    parts.balance.collect()
    stages = parts.mesh.pp_group if parts.mesh.layout.pp > 1 else None
    norm = clip_grad_norm(parts.parameters.values(), parts.config.training.max_norm, stages)
    return _agree(loss_sum, weight, norm, parts)


def _agree(loss_sum: Tensor, weight: Tensor, norm: Tensor, parts: Parts) -> Outcome:
    """Gather every rank's sum and weight in one collective, and bring the numbers to the host.

    This waits for the device once a step, before the update: what goes into the weights must be known to be finite.
    """
    mine = torch.stack((loss_sum, weight, norm.to(loss_sum.device)))
    everyone = mine[None]
    if parts.world.size > 1:
        everyone = mine.new_empty(parts.world.size, 3)
        dist.all_gather(list(everyone.unbind()), mine)
    sums, weights, norms = everyone.double().cpu().unbind(1)
    layout = parts.mesh.layout
    stage = last_stage_rank(parts.config.parallelism)
    sums, weights = (  # of the ranks whose loss counts, those of pieces of one sequence added
        x.view(layout.pp, layout.dp, layout.cp, layout.tp)[stage, :, :, 0].sum(-1) for x in (sums, weights)
    )
    means = sums / weights.clamp(min=1)
    loss = (sums.sum() / weights.sum().clamp(min=1)).item()
    return Outcome(loss, means.max().item(), norms[0].item(), int(weights.sum().item()))


def _all_reduce(value: Tensor, parts: Parts) -> Tensor:
    if parts.world.size > 1:
        dist.all_reduce(value)
    return value
