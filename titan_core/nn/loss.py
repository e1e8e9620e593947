"""Cross-entropy of a linear head that never stores the logits of more than a few rows.

Logits of a whole batch in fp32 are the largest tensor of a language model's step (Llama 3 8B at 8,192 tokens: 4.2 GB).
Here the head and the loss are computed for a chunk of rows at a time, and the gradients with respect to the hidden
states and the weight are formed in the same pass, while the chunk is at hand.

Shape letters: N rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_core.nn.planning import device_type, planning, step_of

IGNORE = -100
_CHUNK = 1 << 25  # logits of one matmul: 64 MiB in bf16, and enough rows for the matmul to run at full speed
_BLOCK = 1 << 20  # logits that the softmax works on at once on a CPU: 4 MiB in fp32, which stays in the cache


LossAndSlope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    inner: LossAndSlope | None = None,
    *,
    backward_twice: bool = False,
) -> Tensor:
    """Return the sum over rows of -log softmax(hidden @ weight.T)[label], fp32; rows labelled -100 count nothing.

    Computes in the dtype of `hidden_ND`, with the softmax in fp32. Differentiable in `hidden_ND` and `weight_VD`.
    `inner` replaces `loss_and_slope`, e.g. by its compiled form, or by one for a vocabulary of which `weight_VD` is
    only a part. `backward_twice` keeps the gradients when they have been asked for once, for schedules that ask for
    those of inputs and of weights one after the other; it costs a copy.
    """
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        if inner is None:
            inner = _blockwise if device_type(hidden_ND) == "cpu" else loss_and_slope
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, inner, backward_twice)
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    weight = weight_VD.to(hidden_ND.dtype)
    for rows in _slices(hidden_ND.shape[0], _CHUNK // weight.shape[0]):
        logits = hidden_ND[rows] @ weight.T
        if inner is None:
            total += F.cross_entropy(logits.float(), labels_N[rows], ignore_index=IGNORE, reduction="sum")
        else:
            total += inner(logits, labels_N[rows])[0]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward; the backward only scales them."""

    @staticmethod
    def forward(
        ctx, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, inner: LossAndSlope, twice: bool
    ) -> Tensor:
        weight = weight_VD.to(hidden_ND.dtype)
        grad_hidden = torch.empty_like(hidden_ND)
        grad_weight: Tensor | None = None
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        for rows in _slices(hidden_ND.shape[0], _CHUNK // weight.shape[0]):
            loss, slope = inner(hidden_ND[rows] @ weight.T, labels_N[rows])
            total += loss
            torch.mm(slope, weight, out=grad_hidden[rows])
            piece = slope.T @ hidden_ND[rows]
            grad_weight = piece.float() if grad_weight is None else grad_weight.add_(piece)
        assert grad_weight is not None
        # Not saved for the backward but handed to it: autograd then takes the buffers as gradients without a copy
        ctx.gradients = grad_hidden, grad_weight.to(weight_VD.dtype)
        ctx.twice = twice
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_weight = ctx.gradients
        if ctx.twice:
            return grad_hidden * grad, grad_weight * grad, None, None, None
        del ctx.gradients
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None, None


def loss_and_slope(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses of some rows, fp32, and softmax - onehot (0 where ignored) in the logits' dtype."""
    valid = labels_N[:, None] != IGNORE
    target = labels_N[:, None].clamp_min(0)
    log_probs = logits_NV.float().log_softmax(-1)
    loss = -(log_probs.gather(-1, target) * valid).sum()
    slope = log_probs.exp().scatter_add(-1, target, torch.full_like(target, -1.0, dtype=torch.float32))
    return loss, (slope * valid).to(logits_NV.dtype)


def _blockwise(logits_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `loss_and_slope` does on a few rows at a time, in place: the fp32 numbers stay in a CPU's cache."""
    total = logits_NV.new_zeros((), dtype=torch.float32)
    for rows in _slices(logits_NV.shape[0], step_of(_BLOCK // logits_NV.shape[1], logits_NV.shape[0])):
        valid = labels_N[rows, None] != IGNORE
        target = labels_N[rows, None].clamp_min(0)
        log_probs = logits_NV[rows].float().log_softmax(-1)
        total -= log_probs.gather(-1, target).mul_(valid).sum()
        slope = log_probs.exp_()
        slope.scatter_add_(-1, target, torch.full_like(target, -1.0, dtype=torch.float32))
        if planning() or not valid.all():
            slope.mul_(valid)
        logits_NV[rows] = slope
    return total, logits_NV


def _slices(length: int, step: int) -> list[slice]:
    step = max(1, step)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
