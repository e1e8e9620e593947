"""From logits to the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titan_core.runtime.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 takes the likeliest; `top_k` 0 and `top_p` 1 leave all in."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UsageError(f"the temperature cannot be {self.temperature}", tip="0 is greedy, 1 is the model's own")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p cannot be {self.top_p}", tip="a share above 0, at most 1")
        if self.top_k < 0:
            raise UsageError(f"top-k cannot be {self.top_k}", tip="0 leaves all tokens in")


def uniforms(sampling: Sampling, rows: int, steps: int) -> Tensor:
    """Return one uniform number a row and step (rows, steps), on the CPU; a row's do not depend on the other rows."""
    generators = [torch.Generator().manual_seed(sampling.seed + row) for row in range(rows)]
    return torch.stack([torch.rand(steps, generator=generator) for generator in generators])


def sample(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the drawn ids (B) and their log-probabilities (B) under the unchanged distribution.

    The draw is the inverse of the cumulative distribution at `uniform_B`, after temperature, top-k and top-p.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        ids_B = logits_BV.argmax(-1)
    else:
        probs, order = _kept(logits_BV / sampling.temperature, sampling)
        cumulative = probs.cumsum(-1)
        target = uniform_B.to(logits_BV.device)[:, None] * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, target, right=True).clamp(max=probs.shape[-1] - 1)
        ids_B = order.gather(-1, place).squeeze(-1)
    log_probs_B = logits_BV.log_softmax(-1).gather(-1, ids_B[:, None]).squeeze(-1)
    return ids_B, log_probs_B


def _kept(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return probabilities, likeliest first, zero where a token is left out, and which tokens they belong to."""
    probs, order = logits_BV.softmax(-1).sort(-1, descending=True)
    if sampling.top_k:
        probs[:, sampling.top_k :] = 0
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs[before >= sampling.top_p] = 0  # the first token that reaches the share stays in
    return probs, order
