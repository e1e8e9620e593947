"""Cross-entropy of a linear head that never stores the logits of more than a few rows.

Logits of a whole batch in fp32 are the largest tensor of a language model's step (Llama 3 8B at 8,192 tokens: 4.2 GB).
Here the head and the loss are computed for a chunk of rows at a time, and the gradients with respect to the hidden
states and the weight are formed in the same pass, while the chunk is still in the cache.

Shape letters: N rows, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
_LOGIT_BUDGET = 1 << 25  # fp32 logits held at once: 128 MiB at most


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Return the sum over rows of -log softmax(hidden @ weight.T)[label], fp32; rows labelled -100 count nothing.

    Computes in the dtype of `hidden_ND`, with fp32 log-sum-exp. Differentiable in `hidden_ND` and `weight_VD`.
    """
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N)
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for rows in _chunks(hidden_ND, weight_VD):
        logits = hidden_ND[rows] @ weight_VD.to(hidden_ND.dtype).T
        total += F.cross_entropy(logits.float(), labels_N[rows], ignore_index=IGNORE, reduction="sum")
    return total


def _chunks(hidden_ND: Tensor, weight_VD: Tensor) -> list[slice]:
    num_rows, vocab = hidden_ND.shape[0], weight_VD.shape[0]
    size = max(1, min(num_rows, _LOGIT_BUDGET // vocab))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward; the backward only scales them."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        dtype = hidden_ND.dtype
        weight = weight_VD.to(dtype)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for rows in _chunks(hidden_ND, weight_VD):
            logits = (hidden_ND[rows] @ weight.T).float()
            labels = labels_N[rows]
            valid = labels != IGNORE
            target = labels.clamp_min(0)[:, None]
            lse = logits.logsumexp(-1, keepdim=True)
            loss = (lse - logits.gather(-1, target)).squeeze(-1)
            total += torch.where(valid, loss, 0.0).sum()
            slope = logits.sub_(lse).exp_()  # softmax - onehot, in place
            slope.scatter_add_(-1, target, torch.full_like(lse, -1.0))
            slope = slope.mul_(valid[:, None]).to(dtype)
            grad_hidden[rows] = slope @ weight
            grad_weight.addmm_(slope.T.float(), hidden_ND[rows].float()) if dtype == torch.float32 else (
                grad_weight.add_(slope.T @ hidden_ND[rows])
            )
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad.to(grad_hidden.dtype),
            grad_weight * grad.to(grad_weight.dtype),
            None,
        )
