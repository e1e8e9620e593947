"""Loss on the validation slice during training."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from titan_core.runtime.events import Listener, Validated
from titan_core.training.build import Parts


class Validator:
    """Measures the mean loss over a fixed slice; the number does not depend on the layout."""

    def __init__(self, parts: Parts, listener: Listener) -> None:
        self.parts = parts
        self.listener = listener
        self.slice = parts.kind.validation(parts.mesh, listener)

    def due(self, step: int) -> bool:
        """Is this a step to validate at? The first, and every `validation.freq`-th."""
        return step == 1 or step % self.parts.config.validation.freq == 0

    @torch.no_grad()
    def run(self, step: int, stopping: Callable[[], str | None]) -> Validated | str:
        """Return the token-weighted mean loss over the whole slice, or why it was given up.

        `stopping` is asked after every batch, on every rank, and says why to stop or None.
        """
        began = time.perf_counter()
        with self.parts.parallel.evaluation():
            totals, reason = self._totals(stopping)
        if reason is not None:
            return reason
        totals = totals * self.parts.counts
        if self.parts.world.size > 1:
            dist.all_reduce(totals)
        sums, weights = totals.tolist()
        loss, weight, parts = self.parts.kind.mean_loss(sums, weights)
        validated = Validated(step, loss, int(weight), time.perf_counter() - began, parts)
        self.listener(validated)
        return validated

    @torch.no_grad()
    def show(self, step: int) -> None:
        """Show what the model can do by now, where there is something to show."""
        with self.parts.parallel.evaluation():
            self.parts.kind.show(self.parts, step, self.listener)

    def _totals(self, stopping: Callable[[], str | None]) -> tuple[Tensor, str | None]:
        """Return sums of losses and weights, (2, parts that are told apart) fp64, and why it was given up."""
        kind, device, reason = self.parts.kind, self.parts.world.device, None
        totals = torch.zeros(2, 1, dtype=torch.float64, device=device)
        for batch in self.slice:
            for prepared in map(self.parts.cutter, kind.for_validation(batch.to(device))):
                loss, weight = self.parts.parallel.evaluate(prepared), self.parts.task.weight(prepared)
                totals = totals + torch.stack((loss.double().reshape(-1), weight.double().reshape(-1)))
            reason = stopping()
            if reason is not None:
                break
        return totals, reason
