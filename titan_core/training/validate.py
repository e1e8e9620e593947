"""Loss on the validation slice during training."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from titan_core.data.build import build_validation_slice
from titan_core.runtime.events import Listener, Validated
from titan_core.training.build import Parts


class Validator:
    """Measures the mean loss over a fixed slice; the number does not depend on the layout."""

    def __init__(self, parts: Parts, listener: Listener) -> None:
        self.parts = parts
        self.listener = listener
        self.slice = build_validation_slice(
            parts.config,
            parts.tokenizer,
            dp_rank=parts.mesh.dp_rank,
            dp_size=parts.mesh.layout.dp,
            listener=listener,
        )

    def due(self, step: int) -> bool:
        """Is this a step to validate at? The first, and every `validation.freq`-th."""
        return step == 1 or step % self.parts.config.validation.freq == 0

    @torch.no_grad()
    def run(self, step: int, stopping: Callable[[], str | None]) -> Validated | str:
        """Return the token-weighted mean loss over the whole slice, or why it was given up.

        `stopping` is asked after every batch, on every rank, and says why to stop or None.
        """
        began = time.perf_counter()
        modules = self.parts.parallel.modules()
        totals = torch.zeros(2, dtype=torch.float64, device=self.parts.world.device)
        reason = None
        for module in modules:
            module.eval()
        for batch in self.slice:
            batch = self.parts.cutter(batch.to(self.parts.world.device))
            totals[0] += self.parts.parallel.evaluate(batch)
            totals[1] += self.parts.task.weight(batch)
            reason = stopping()
            if reason is not None:
                break
        for module in modules:
            module.train()
        if reason is not None:
            return reason
        totals *= self.parts.counts
        if self.parts.world.size > 1:
            dist.all_reduce(totals)
        loss, weight = totals.tolist()
        validated = Validated(step, loss / max(weight, 1.0), int(weight), time.perf_counter() - began)
        self.listener(validated)
        return validated
