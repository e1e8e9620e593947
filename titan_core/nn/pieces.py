"""Softmax attention to a piece of the keys at a time, and how pieces are put together.

A piece gives its own normalised output and the logarithm of its sum of exponentials (lse); two pieces merge exactly by
these (Milakov & Gimelshein 2018, Dao et al. 2022). Plain torch on every device.

Shape letters: N batch x key/value heads, R query rows (tokens x heads of a group), K keys, C head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def piece_forward(q_NRC: Tensor, k_NKC: Tensor, v_NKC: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the attention of scaled queries to a piece of the keys, fp32, and lse (N, R, 1).

    `hidden` (N or 1, R, K) is true where a query may not look. A row that sees nothing gives zeros and -inf.
    """
    scores = _scores(q_NRC, k_NKC, hidden)
    lse = scores.logsumexp(-1, keepdim=True)
    probs = _probabilities(scores, lse).to(v_NKC.dtype)
    return (probs @ v_NKC).float(), lse


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Put two pieces together; `lse` must be finite, `more_lse` need not be."""
    total = torch.logaddexp(lse, more_lse)
    return out * (lse - total).exp() + more * (more_lse - total).exp(), total


def piece_backward(
    q_NRC: Tensor, k_NKC: Tensor, v_NKC: Tensor, grad_NRC: Tensor, lse: Tensor, delta: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a piece's part of the gradients of scaled queries, keys and values, fp32.

    `lse` is that of all pieces, `delta` (N, R, 1) the sum over a row of output times its gradient.
    """
    probs = _probabilities(_scores(q_NRC, k_NKC, hidden), lse)
    slope = (probs * ((grad_NRC @ v_NKC.transpose(1, 2)).float() - delta)).to(q_NRC.dtype)
    grad_v = probs.to(v_NKC.dtype).transpose(1, 2) @ grad_NRC
    return (slope @ k_NKC).float(), (slope.transpose(1, 2) @ q_NRC).float(), grad_v.float()


def _scores(q_NRC: Tensor, k_NKC: Tensor, hidden: Tensor | None) -> Tensor:
    scores = (q_NRC @ k_NKC.transpose(1, 2)).float()
    return scores if hidden is None else scores.masked_fill(hidden, -math.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    return (scores - lse.masked_fill(lse == -math.inf, 0.0)).exp()
