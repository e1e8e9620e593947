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

    `loss` is the mean over all targets (nats), `max_loss` the largest mean of a data rank, `targets` how many counted;
    `further` are the means of the other parts of the task's loss, by name.
    """

    loss: float
    max_loss: float
    grad_norm: float
    targets: int
    further: dict[str, float]


def forward_backward(parts: Parts, read: Callable[[], Any]) -> Outcome:
    """Accumulate the gradient of the mean loss over all targets of all microbatches of all ranks, and clip it.

    The divisor is the global number of targets, known before the first backward; so padding, accumulation and ragged
    batches give the number that one process would give. A loss of several parts has a divisor and a factor for each.
    """
    parts.optimizer.zero_grad(set_to_none=True)
    batches = [parts.cutter(parts.kind.prepare(read().to(parts.world.device))) for _ in range(parts.microbatches)]
    weights = torch.stack([parts.task.weight(batch).reshape(-1) for batch in batches]).sum(0).float()
    totals = _all_reduce(weights * parts.counts, parts)
    # filled on the device: a list that is copied there would wait for the update of the step before
    factors = torch.cat([totals.new_full((1,), factor) for factor in parts.task.factors.values()])
    sums = parts.parallel.forward_backward(batches, factors / totals.clamp(min=1))
    parts.balance.collect()
    stages = parts.mesh.pp_group if parts.mesh.layout.pp > 1 else None
    elsewhere = parts.parallel.counted_elsewhere()
    norm = clip_grad_norm(parts.parameters.values(), parts.config.training.max_norm, stages, elsewhere)
    return _agree(sums, weights, norm, parts)


def _agree(sums: Tensor, weights: Tensor, norm: Tensor, parts: Parts) -> Outcome:
    """Gather every rank's sums and weights in one collective, and bring the numbers to the host.

    This waits for the device once a step, before the update: what goes into the weights must be known to be finite.
    """
    mine = torch.cat((sums, weights, norm.to(sums.device)[None]))
    everyone = mine[None]
    if parts.world.size > 1:
        everyone = mine.new_empty(parts.world.size, len(mine))
        dist.all_gather(list(everyone.unbind()), mine)
    count = len(sums)
    every_sums, every_weights, norms = everyone.double().cpu().split((count, count, 1), 1)
    layout = parts.mesh.layout
    stage = last_stage_rank(parts.config.parallelism)
    by_rank, weighed = (  # of the ranks whose loss counts, those of pieces of one sequence added
        x.view(layout.pp, layout.dp, layout.cp, layout.tp, count)[stage, :, :, 0].sum(1)
        for x in (every_sums.contiguous(), every_weights.contiguous())
    )
    means = by_rank[:, 0] / weighed[:, 0].clamp(min=1)
    losses = dict(zip(parts.task.factors, (by_rank.sum(0) / weighed.sum(0).clamp(min=1)).tolist(), strict=True))
    targets = int(weighed[:, 0].sum().item())
    return Outcome(losses.pop("loss"), means.max().item(), norms[0].item(), targets, losses)


def _all_reduce(value: Tensor, parts: Parts) -> Tensor:
    if parts.world.size > 1:
        dist.all_reduce(value)
    return value
