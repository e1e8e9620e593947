"""Cross-entropy of a linear head, with gradients, that never stores the logits of all rows.

Three matmuls a chunk of rows and one kernel between them, which turns logits into their gradient where they lie. With
chunks as large as `CHUNK` allows, the matmuls run at full speed and the weight's gradient is written a few times only.

Shapes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titan_kernels.launch import runs_triton

IGNORE = -100
# Logits of one chunk: 512 MiB in bf16, 2093 rows at a vocabulary of 128,256. Untuned: never measured on a GPU. Smaller
# chunks pass over the weight's gradient more often (V*D*8 bytes each), larger ones need more memory.
CHUNK = 1 << 28
ROUND_ROWS = 128  # rows of a chunk are a multiple of this: whole tiles for the matmuls


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, chunk_logits: int = CHUNK
) -> Tensor:
    """Return the sum over rows of -log softmax(hidden @ weight.T)[label], fp32; rows labelled -100 count nothing.

    Matmuls are in the dtype of `hidden_ND`, the softmax in fp32, the weight's gradient is summed over chunks in fp32.
    Gradients are formed in the forward and scaled in place in the backward, which can run once. A label outside the
    vocabulary makes the loss NaN. `chunk_logits` bounds the logits that exist at once.
    """
    if hidden_ND.dim() != 2 or weight_VD.dim() != 2 or labels_N.dim() != 1:
        raise ValueError("linear_cross_entropy() takes hidden (N, D), weight (V, D) and labels (N)")
    if hidden_ND.shape != (labels_N.shape[0], weight_VD.shape[1]):
        raise ValueError(
            f"linear_cross_entropy(): hidden {tuple(hidden_ND.shape)} does not fit weight {tuple(weight_VD.shape)} and "
            f"{labels_N.shape[0]} labels"
        )
    wanted = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    rows = _rows_of_chunk(weight_VD.shape[0], chunk_logits)
    return torch.ops.titan_kernels.linear_cross_entropy(hidden_ND, weight_VD, labels_N, rows, wanted)[0]


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor, slope: bool = True) -> Tensor:
    """Return each row's loss, fp32, and with `slope` overwrite the logits by softmax - onehot, 0 in ignored rows."""
    return torch.ops.titan_kernels.cross_entropy_(logits_NV, labels_N, slope)


def reference_linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """`linear_cross_entropy` in plain torch, with all logits at once."""
    wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    logits = (hidden_ND @ weight_VD.to(hidden_ND.dtype).T).to(wide)
    return torch.nn.functional.cross_entropy(logits, labels_N, ignore_index=IGNORE, reduction="sum")


def reference_cross_entropy_(logits_NV: Tensor, labels_N: Tensor, slope: bool = True) -> Tensor:
    """`cross_entropy_` in plain torch."""
    valid = labels_N[:, None] != IGNORE
    outside = (valid & ((labels_N[:, None] < 0) | (labels_N[:, None] >= logits_NV.shape[1]))).any(1)
    target = labels_N[:, None].clamp(0, logits_NV.shape[1] - 1)
    log_probs = logits_NV.to(_wide(logits_NV)).log_softmax(-1)
    losses = -(log_probs.gather(-1, target)).where(valid, 0)[:, 0]
    if slope:
        ones = torch.ones_like(target, dtype=log_probs.dtype)
        logits_NV.copy_(log_probs.exp().scatter_add(-1, target, -ones).where(valid, 0))
    return losses.masked_fill(outside, torch.nan)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows_of_chunk(vocabulary: int, chunk_logits: int) -> int:
    rows = max(1, chunk_logits // vocabulary)
    return rows // ROUND_ROWS * ROUND_ROWS or rows


@torch.library.custom_op("titan_kernels::cross_entropy_", mutates_args={"logits_NV"})
def _cross_entropy(logits_NV: Tensor, labels_N: Tensor, slope: bool) -> Tensor:
    if runs_triton(logits_NV):
        from titan_kernels import linear_cross_entropy_kernels

        return linear_cross_entropy_kernels.cross_entropy_(logits_NV, labels_N.contiguous(), slope)
    return reference_cross_entropy_(logits_NV, labels_N, slope)


@_cross_entropy.register_fake
def _(logits_NV: Tensor, labels_N: Tensor, slope: bool) -> Tensor:
    return logits_NV.new_empty(logits_NV.shape[0], dtype=_wide(logits_NV))


@torch.library.custom_op("titan_kernels::linear_cross_entropy", mutates_args=())
def _forward(
    hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, rows: int, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight_VD.to(hidden_ND.dtype)
    total = hidden_ND.new_zeros((), dtype=_wide(hidden_ND))
    grad_hidden = torch.empty_like(hidden_ND) if wanted else hidden_ND.new_empty(0)
    grad_weight: Tensor | None = None
    for start in range(0, hidden_ND.shape[0], rows):
        part = slice(start, start + rows)
        logits = hidden_ND[part] @ weight.T
        total += cross_entropy_(logits, labels_N[part], wanted).sum()
        if wanted:
            torch.mm(logits, weight, out=grad_hidden[part])
            grad_weight = _accumulate(grad_weight, logits.T, hidden_ND[part], hidden_ND.shape[0] > rows)
    if not wanted:
        return total, grad_hidden, weight_VD.new_empty(0)
    return total, grad_hidden, (torch.zeros_like(weight) if grad_weight is None else grad_weight).to(weight_VD.dtype)


def _accumulate(into: Tensor | None, a: Tensor, b: Tensor, more: bool) -> Tensor:
    """Return `into + a @ b`, in fp32 and in place where there is more than one product to add."""
    if not more:
        return a @ b
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):  # cuBLAS adds within the product, in fp32
        if into is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(into, a, b, out_dtype=torch.float32, out=into)
    piece = (a @ b).to(_wide(a))
    return piece if into is None else into.add_(piece)


@_forward.register_fake
def _(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, rows: int, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden_ND.shape, weight_VD.shape) if wanted else ((0,), (0,))
    total = hidden_ND.new_empty((), dtype=_wide(hidden_ND))
    return total, hidden_ND.new_empty(shapes[0]), weight_VD.new_empty(shapes[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    hidden, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return hidden.mul_(grad) if wanted[0] else None, weight.mul_(grad) if wanted[1] else None, None, None, None


_forward.register_autograd(_backward, setup_context=_save)
