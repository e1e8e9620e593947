"""Cross-entropy of a linear head, with gradients, that never stores the logits of all rows.

Three matmuls a chunk of rows and one kernel between them, which turns logits into their gradient where they lie. With
chunks as large as `_rows_of_chunk` allows, the matmuls run at full speed and the weight's gradient is written a few
times only. Beyond the gradients this takes at most a sixth of what a plain head and cross-entropy do: those hold three
fp32 copies of all logits, this one in bf16, or a chunk and an fp32 sum where that is less.

Shapes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titan_kernels.launch import runs_triton

IGNORE = -100
# Logits of one chunk of several: 512 MiB in bf16, 2093 rows at a vocabulary of 128,256. Untuned: never measured on a
# GPU. Smaller chunks pass over the weight's gradient more often (V*D*8 bytes each), larger ones need more memory.
CHUNK = 1 << 28
ROUND_ROWS = 128  # rows of a chunk are a multiple of this: whole tiles for the matmuls


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    scale: Tensor | None = None,
    chunk_logits: int | None = None,
) -> Tensor:
    """Return the sum over rows of -log softmax(hidden @ weight.T)[label], fp32; rows labelled -100 count nothing.

    Matmuls are in the dtype of `hidden_ND`, the softmax in fp32, the weight's gradient is summed over chunks in fp32.
    Gradients are formed in the forward and scaled in place in the backward, which can run once; where the gradient that
    comes is 1, it does nothing. So pass as `scale`, an fp32 scalar on the device, what the loss is to be multiplied
    with, e.g. 1 / number of targets. A label outside the vocabulary makes the loss NaN. `chunk_logits` bounds the
    logits that exist at once; unless it is given, chunks are what takes the least memory.
    """
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or labels_N.dim() != 1:
        raise ValueError("linear_cross_entropy() takes hidden (N, D), weight (V, D) and labels (N)")
    if hidden_ND.shape != (labels_N.shape[0], weight_VD.shape[1]):
        raise ValueError(
            f"linear_cross_entropy(): hidden {tuple(hidden_ND.shape)} does not fit weight {tuple(weight_VD.shape)} and "
            f"{labels_N.shape[0]} labels"
        )
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (hidden_ND, weight_VD)]
    rows = _rows_of_chunk(hidden_ND, weight_VD, chunk_logits, sums=wanted[1])
    return torch.ops.titan_kernels.linear_cross_entropy(hidden_ND, weight_VD, labels_N, scale, rows, *wanted)[0]


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor, scale: Tensor | None = None, slope: bool = True) -> Tensor:
    """Return each row's loss, fp32, and with `slope` overwrite the logits by softmax - onehot, 0 in ignored rows.

    Both are multiplied with the fp32 scalar `scale`.
    """
    return torch.ops.titan_kernels.cross_entropy_(logits_NV, labels_N, scale, slope)


def reference_linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """`linear_cross_entropy` in plain torch, with all logits at once."""
    wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    logits = (hidden_ND @ weight_VD.to(hidden_ND.dtype).T).to(wide)
    return torch.nn.functional.cross_entropy(logits, labels_N, ignore_index=IGNORE, reduction="sum")


def reference_cross_entropy_(
    logits_NV: Tensor, labels_N: Tensor, scale: Tensor | None = None, slope: bool = True
) -> Tensor:
    """`cross_entropy_` in plain torch."""
    valid = labels_N[:, None] != IGNORE
    outside = (valid & ((labels_N[:, None] < 0) | (labels_N[:, None] >= logits_NV.shape[1]))).any(1)
    target = labels_N[:, None].clamp(0, logits_NV.shape[1] - 1)
    log_probs = logits_NV.to(_wide(logits_NV)).log_softmax(-1)
    losses = -(log_probs.gather(-1, target)).where(valid, 0)[:, 0]
    losses = losses if scale is None else losses * scale
    if slope:
        ones = torch.ones_like(target, dtype=log_probs.dtype)
        slopes = log_probs.exp().scatter_add(-1, target, -ones).where(valid, 0)
        logits_NV.copy_(slopes if scale is None else slopes * scale)
    return losses.masked_fill(outside, torch.nan)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows_of_chunk(hidden_ND: Tensor, weight_VD: Tensor, chunk_logits: int | None, sums: bool) -> int:
    """Return how many rows of logits exist at once.

    A gradient of the weight that is summed over chunks takes 4 * V*D bytes more where it is not fp32 in the end: all
    rows at once take less until their logits outgrow that and a chunk.
    """
    rows = max(1, (CHUNK if chunk_logits is None else chunk_logits) // weight_VD.shape[0])
    rows = rows // ROUND_ROWS * ROUND_ROWS or rows
    if chunk_logits is None and sums and weight_VD.dtype != _wide(hidden_ND):
        whole = rows + 4 * hidden_ND.shape[1] // hidden_ND.element_size()
        return whole if hidden_ND.shape[0] <= whole else rows
    return rows


@torch.library.custom_op("titan_kernels::cross_entropy_", mutates_args={"logits_NV"})
def _cross_entropy(logits_NV: Tensor, labels_N: Tensor, scale: Tensor | None, slope: bool) -> Tensor:
    if runs_triton(logits_NV):
        from titan_kernels import linear_cross_entropy_kernels

        return linear_cross_entropy_kernels.cross_entropy_(logits_NV, labels_N.contiguous(), scale, slope)
    return reference_cross_entropy_(logits_NV, labels_N, scale, slope)


@_cross_entropy.register_fake
def _(logits_NV: Tensor, labels_N: Tensor, scale: Tensor | None, slope: bool) -> Tensor:
    return logits_NV.new_empty(logits_NV.shape[0], dtype=_wide(logits_NV))


@torch.library.custom_op("titan_kernels::scale_", mutates_args={"x"})
def _scale(x: Tensor, factor: Tensor) -> None:
    """Multiply in place with a scalar; on a GPU a factor of 1, which only the device knows, costs a launch."""
    if runs_triton(x):
        from titan_kernels import linear_cross_entropy_kernels

        linear_cross_entropy_kernels.scale_(x, factor)
    else:
        x.mul_(factor)


@_scale.register_fake
def _(x: Tensor, factor: Tensor) -> None:
    return None


@torch.library.custom_op("titan_kernels::linear_cross_entropy", mutates_args=())
def _forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    scale: Tensor | None,
    rows: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight_VD.to(hidden_ND.dtype)
    total = hidden_ND.new_zeros((), dtype=_wide(hidden_ND))
    grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else hidden_ND.new_empty(0)
    grad_weight: Tensor | None = None
    wide = hidden_ND.shape[0] > rows or weight_VD.dtype == _wide(hidden_ND)
    for start in range(0, hidden_ND.shape[0], rows):
        part = slice(start, start + rows)
        logits = hidden_ND[part] @ weight.T
        total += cross_entropy_(logits, labels_N[part], scale, wants_hidden or wants_weight).sum()
        if wants_hidden:
            torch.mm(logits, weight, out=grad_hidden[part])
        if wants_weight:
            grad_weight = _accumulate(grad_weight, logits.T, hidden_ND[part], wide)
    if not wants_weight:
        return total, grad_hidden, weight_VD.new_empty(0)
    return total, grad_hidden, (torch.zeros_like(weight) if grad_weight is None else grad_weight).to(weight_VD.dtype)


def _accumulate(into: Tensor | None, a: Tensor, b: Tensor, wide: bool) -> Tensor:
    """Return `into + a @ b`, in fp32 and in place where `wide`; else there is nothing to add to."""
    if not wide:
        return a @ b
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):  # cuBLAS adds within the product, in fp32
        if into is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
    piece = (a @ b).to(_wide(a))
    return piece if into is None else into.add_(piece)


@_forward.register_fake
def _(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    scale: Tensor | None,
    rows: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden_ND.new_empty((), dtype=_wide(hidden_ND))
    grad_hidden = hidden_ND.new_empty(hidden_ND.shape if wants_hidden else (0,))
    return total, grad_hidden, weight_VD.new_empty(weight_VD.shape if wants_weight else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 5
    if grad is None:
        return None, None, *rest
    wanted = [x if needed else None for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)]
    for x in wanted:
        if x is not None:
            torch.ops.titan_kernels.scale_(x, grad)
    return *wanted, *rest


_forward.register_autograd(_backward, setup_context=_save)
