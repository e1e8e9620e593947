"""The feed-forward layer of experts, w2 (silu(w1 x) * w3 x) (Shazeer 2020, arXiv 2002.05202), over grouped rows.

Shapes: T tokens, K choices a token, R rows, E experts, D model width, F hidden width.

The gate is applied where the two products that it needs end, and its gradient where the product w2 grad ends, so the
hidden rows are neither written for the gate nor stored for the backward pass: gate and up are, and hidden is computed
anew. `routed_mlp` also gathers its rows while the first product loads them, and weighs them; the rows of tokens are
then stored nowhere. The last product writes its rows and a second kernel sums them: scattering with atomics would lose
reproducibility, and on Hopper time too (SonicMoE, arXiv 2512.14080, section 4).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_kernels.grouped_gemm import (
    check_groups,
    reference_grouped_linear,
    reference_input_gradient,
    reference_weight_gradient,
)
from titan_kernels.launch import runs_triton
from titan_kernels.permutation import Placement, reference_permute, reference_unpermute


def expert_mlp(x_RD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Return y_RD: w2 (silu(w1 x) * w3 x) with the weights of each row's expert; rows after the last end are zeros."""
    _check("expert_mlp", x_RD, w1_EFD, w3_EFD, w2_EDF, ends_E)
    save = _needs_gradient(x_RD, w1_EFD, w3_EFD, w2_EDF)
    return torch.ops.titan_kernels.expert_mlp(x_RD, w1_EFD, w3_EFD, w2_EDF, ends_E, save)[0]


def routed_mlp(
    x_TD: Tensor, placement: Placement, weights_TK: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor
) -> Tensor:
    """Return y_TD = unpermute(expert_mlp(permute(x)), weights) with the gather and the weights inside the products."""
    ends_E, row_TK, source_R = placement.ends_E, placement.row_TK, placement.source_R
    _check("routed_mlp", x_TD, w1_EFD, w3_EFD, w2_EDF, ends_E)
    if weights_TK.shape != row_TK.shape or x_TD.shape[0] != row_TK.shape[0]:
        raise ValueError(
            f"routed_mlp() takes the {row_TK.shape[0]} tokens of this placement and weights {tuple(row_TK.shape)}; "
            f"got {x_TD.shape[0]} tokens and weights {tuple(weights_TK.shape)}"
        )
    save = _needs_gradient(x_TD, weights_TK, w1_EFD, w3_EFD, w2_EDF)
    op = torch.ops.titan_kernels.routed_mlp
    return op(x_TD, weights_TK, w1_EFD, w3_EFD, w2_EDF, ends_E, row_TK, source_R, save)[0]


def reference_expert_mlp(x_RD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """`expert_mlp` in plain torch."""
    gate, up = (reference_grouped_linear(x_RD, weight, ends_E) for weight in (w1_EFD, w3_EFD))
    return reference_grouped_linear(F.silu(gate) * up, w2_EDF, ends_E)


def reference_routed_mlp(
    x_TD: Tensor, placement: Placement, weights_TK: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor
) -> Tensor:
    """`routed_mlp` in plain torch."""
    rows = reference_permute(x_TD, placement)
    return reference_unpermute(
        reference_expert_mlp(rows, w1_EFD, w3_EFD, w2_EDF, placement.ends_E), placement, weights_TK
    )


def _check(name: str, x: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor, ends_E: Tensor) -> None:
    check_groups(name, x, w1_EFD, ends_E)
    experts, hidden, width = w1_EFD.shape
    if w3_EFD.shape != w1_EFD.shape or w2_EDF.shape != (experts, width, hidden):
        raise ValueError(
            f"{name}() takes w1 and w3 (experts, hidden, width) and w2 (experts, width, hidden); "
            f"got {tuple(w1_EFD.shape)}, {tuple(w3_EFD.shape)} and {tuple(w2_EDF.shape)}"
        )


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _reference_forward(
    x_RD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor, ends_E: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = (reference_grouped_linear(x_RD, weight, ends_E) for weight in (w1_EFD, w3_EFD))
    y = reference_grouped_linear(F.silu(gate) * up, w2_EDF, ends_E)
    return (y, gate, up) if save else (y, x_RD.new_empty(0), x_RD.new_empty(0))


def _reference_gate_gradient(
    grad_RD: Tensor, gate_RF: Tensor, up_RF: Tensor, w2_EDF: Tensor, ends_E: Tensor, weights_R: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients to gate and up, the (weighted) hidden rows, and the gradient to the weights of the rows."""
    wide = torch.float64 if gate_RF.dtype == torch.float64 else torch.float32
    grad_hidden = reference_input_gradient(grad_RD, w2_EDF, ends_E).to(wide)
    gate, up = gate_RF.to(wide), up_RF.to(wide)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    hidden, grad_weights = silu * up, grad_RD.new_empty(0)
    if weights_R is not None:
        grad_weights = (grad_hidden * hidden).sum(1)
        grad_hidden, hidden = grad_hidden * weights_R.to(wide)[:, None], hidden * weights_R.to(wide)[:, None]
    grad_gate = grad_hidden * up * (sigmoid + silu * (1 - sigmoid))
    grad_up = grad_hidden * silu
    dtype = gate_RF.dtype
    return grad_gate.to(dtype), grad_up.to(dtype), hidden.to(dtype), grad_weights


def _backward_of_rows(
    x_RD: Tensor,
    grad_RD: Tensor,
    gate_RF: Tensor,
    up_RF: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    ends_E: Tensor,
    weights_R: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients to x, w1, w3, w2 and the weights of the rows."""
    w1, w3, w2 = weights
    if runs_triton(x_RD):
        from titan_kernels import expert_mlp_kernels

        return expert_mlp_kernels.backward(x_RD, grad_RD, gate_RF, up_RF, w1, w3, w2, ends_E, weights_R)
    grad_gate, grad_up, hidden, grad_weights = _reference_gate_gradient(grad_RD, gate_RF, up_RF, w2, ends_E, weights_R)
    grad_x = reference_input_gradient(grad_gate, w1, ends_E).add_(reference_input_gradient(grad_up, w3, ends_E))
    pairs = ((grad_gate, x_RD), (grad_up, x_RD), (grad_RD, hidden))
    grad_1, grad_3, grad_2 = (reference_weight_gradient(grad, rows, ends_E) for grad, rows in pairs)
    return grad_x, grad_1, grad_3, grad_2, grad_weights


@torch.library.custom_op("titan_kernels::expert_mlp", mutates_args=())
def _expert_mlp(
    x_RD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor, ends_E: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if runs_triton(x_RD):
        from titan_kernels import expert_mlp_kernels

        return expert_mlp_kernels.forward(x_RD.contiguous(), *_contiguous(w1_EFD, w3_EFD, w2_EDF), ends_E, save)
    return _reference_forward(x_RD, w1_EFD, w3_EFD, w2_EDF, ends_E, save)


@_expert_mlp.register_fake
def _(
    x_RD: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor, ends_E: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kept = (x_RD.shape[0], w1_EFD.shape[1]) if save else (0,)
    return x_RD.new_empty(x_RD.shape[0], w2_EDF.shape[1]), x_RD.new_empty(kept), x_RD.new_empty(kept)


@torch.library.custom_op("titan_kernels::expert_mlp_backward", mutates_args=())
def _expert_mlp_gradients(
    grad_RD: Tensor, x_RD: Tensor, gate_RF: Tensor, up_RF: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = _contiguous(w1, w3, w2)
    grads = _backward_of_rows(x_RD.contiguous(), grad_RD.contiguous(), gate_RF, up_RF, weights, ends_E, None)
    return grads[:4]


@_expert_mlp_gradients.register_fake
def _(
    grad_RD: Tensor, x_RD: Tensor, gate_RF: Tensor, up_RF: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(x_RD), _like(w1), _like(w3), _like(w2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_RD, w1, w3, w2, ends_E, _ = inputs
    _, gate_RF, up_RF = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gate_RF, up_RF)
    ctx.save_for_backward(x_RD, gate_RF, up_RF, w1, w3, w2, ends_E)


def _backward(ctx: Any, grad_RD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_RD is None:  # gate and up have none, and autograd is told not to make zeros of their size
        return (None,) * 6
    grads = torch.ops.titan_kernels.expert_mlp_backward(grad_RD, *ctx.saved_tensors)
    return *grads, None, None


_expert_mlp.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("titan_kernels::routed_mlp", mutates_args=())
def _routed_mlp(
    x_TD: Tensor, weights_TK: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor,
    ends_E: Tensor, row_TK: Tensor, source_R: Tensor, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if runs_triton(x_TD):
        from titan_kernels import expert_mlp_kernels, permutation_kernels

        weights = _contiguous(w1_EFD, w3_EFD, w2_EDF)
        rows, gate, up = expert_mlp_kernels.forward(
            x_TD.contiguous(), *weights, ends_E, save, source_R=source_R, top_k=row_TK.shape[1]
        )
        return permutation_kernels.combine(rows, row_TK, weights_TK.contiguous()), gate, up
    placement = Placement(ends_E, ends_E, row_TK, source_R)
    rows = reference_permute(x_TD, placement)
    rows, gate, up = _reference_forward(rows, w1_EFD, w3_EFD, w2_EDF, ends_E, save)
    return reference_unpermute(rows, placement, weights_TK), gate, up


@_routed_mlp.register_fake
def _(
    x_TD: Tensor, weights_TK: Tensor, w1_EFD: Tensor, w3_EFD: Tensor, w2_EDF: Tensor,
    ends_E: Tensor, row_TK: Tensor, source_R: Tensor, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    kept = (source_R.shape[0], w1_EFD.shape[1]) if save else (0,)
    return _like(x_TD), x_TD.new_empty(kept), x_TD.new_empty(kept)


@torch.library.custom_op("titan_kernels::routed_mlp_backward", mutates_args=())
def _routed_mlp_gradients(
    grad_TD: Tensor, x_TD: Tensor, weights_TK: Tensor, gate_RF: Tensor, up_RF: Tensor, w1: Tensor, w3: Tensor,
    w2: Tensor, ends_E: Tensor, row_TK: Tensor, source_R: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    ops = torch.ops.titan_kernels
    rows, grad_rows = (ops.permute(tokens, row_TK, source_R) for tokens in (x_TD, grad_TD))
    assignment = source_R.clamp_min(0)
    weights_R = weights_TK.flatten()[assignment].masked_fill(source_R < 0, 0)
    grad_rows, grad_1, grad_3, grad_2, grad_R = _backward_of_rows(
        rows, grad_rows, gate_RF, up_RF, _contiguous(w1, w3, w2), ends_E, weights_R
    )
    placed = grad_R[row_TK.clamp_min(0)].masked_fill(row_TK < 0, 0).to(weights_TK.dtype)
    return ops.unpermute(grad_rows, row_TK, source_R, None), placed, grad_1, grad_3, grad_2


@_routed_mlp_gradients.register_fake
def _(
    grad_TD: Tensor, x_TD: Tensor, weights_TK: Tensor, gate_RF: Tensor, up_RF: Tensor, w1: Tensor, w3: Tensor,
    w2: Tensor, ends_E: Tensor, row_TK: Tensor, source_R: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(x_TD), _like(weights_TK), _like(w1), _like(w3), _like(w2)


def _save_routed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_TD, weights_TK, w1, w3, w2, ends_E, row_TK, source_R, _ = inputs
    _, gate_RF, up_RF = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gate_RF, up_RF)
    ctx.save_for_backward(x_TD, weights_TK, gate_RF, up_RF, w1, w3, w2, ends_E, row_TK, source_R)


def _routed_backward(ctx: Any, grad_TD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 9
    grads = torch.ops.titan_kernels.routed_mlp_backward(grad_TD, *ctx.saved_tensors)
    return *grads, None, None, None, None


_routed_mlp.register_autograd(_routed_backward, setup_context=_save_routed)


def _contiguous(w1: Tensor, w3: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return w1.contiguous(), w3.contiguous(), w2.contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
