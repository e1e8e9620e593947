"""Many MLPs of one shape, of which each token visits a few.

Rows are sorted by expert, so that each expert works on rows that lie together. Nothing waits for the device, and no row
is padded or left out.

Shape letters: N tokens, K choices of a token, R rows = N K, D model width, F expert width, E experts, O out, I in.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_core.nn import ops
from titan_core.nn.planning import planning

Backend = Literal["loop", "grouped_mm"]


class GroupedLinear(nn.Module):
    """`x @ weight[e].T` for the rows of each expert e; weight (E, out, in)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.compute_dtype: torch.dtype | None = None
        self.backend: Backend = "loop"

    def forward(self, x_RI: Tensor, ends_E: Tensor) -> Tensor:
        """Map (R, in) to (R, out): expert e has the rows from `ends_E[e - 1]` to `ends_E[e]`; rows after the last one
        give zeros."""
        weight = self.weight
        dtype = self.compute_dtype or weight.dtype
        return grouped_linear(x_RI.to(dtype), weight.to(dtype), ends_E, self.backend)


class Experts(nn.Module):
    """E SwiGLU MLPs."""

    def __init__(self, num_experts: int, dim: int, width: int) -> None:
        super().__init__()
        self.w1 = GroupedLinear(num_experts, dim, width)
        self.w2 = GroupedLinear(num_experts, width, dim)
        self.w3 = GroupedLinear(num_experts, dim, width)

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
        """Return for each token the sum of what its experts give, by weight where there are weights; (N, D)."""
        rows = sort(chosen_NK, self.w1.weight.shape[0])
        out_RD = self.mlp(Gather.apply(x_ND, rows), rows.ends_E)
        return combine(out_RD, rows, weights_NK)

    def mlp(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Map rows that are sorted by expert, (R, D) to (R, D)."""
        return self.w2(ops.swiglu(self.w1(x_RD, ends_E), self.w3(x_RD, ends_E)), ends_E)


class Rows(NamedTuple):
    """Assignments of tokens to experts, sorted by expert and within one by token.

    `order_R` is the flat number n K + k of the assignment in each row, `row_NK` its inverse, `ends_E` (int32) the end
    of each expert's rows.
    """

    order_R: Tensor
    row_NK: Tensor
    ends_E: Tensor


def sort(chosen_NK: Tensor, num_experts: int) -> Rows:
    """Sort assignments by expert."""
    flat_R = chosen_NK.flatten()
    order_R = flat_R.argsort(stable=True)
    row_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.shape[0], device=order_R.device))
    return Rows(order_R, row_R.view(chosen_NK.shape), count(chosen_NK, num_experts).cumsum(0).int())


def count(chosen_NK: Tensor, num_experts: int) -> Tensor:
    """Return how many choices fell on each expert, (E) int64."""
    ones = torch.ones_like(chosen_NK).flatten()
    return ones.new_zeros(num_experts).scatter_add_(0, chosen_NK.flatten(), ones)


class Gather(torch.autograd.Function):
    """The token of each row; its gradient is the sum over the token's rows, in a fixed order."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(rows.row_NK)
        return x_ND[rows.order_R // rows.row_NK.shape[1]]

    @staticmethod
    def backward(ctx, grad_RD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (row_NK,) = ctx.saved_tensors
        grad = grad_RD[row_NK[:, 0]]
        if row_NK.shape[1] > 1:
            grad = grad.float()
            for column in row_NK.unbind(1)[1:]:
                grad += grad_RD[column]
        return grad.to(grad_RD.dtype), None


def combine(out_RD: Tensor, rows: Rows, weights_NK: Tensor | None) -> Tensor:
    """Return the sum over each token's rows, weighed in fp32, (N, D)."""
    if weights_NK is None and rows.row_NK.shape[1] == 1:
        return Pick.apply(out_RD, rows.row_NK[:, 0], rows.order_R)
    if weights_NK is None:
        weights_NK = torch.ones(rows.row_NK.shape, device=out_RD.device)
    return Combine.apply(out_RD, weights_NK, rows)


class Pick(torch.autograd.Function):
    """Rows in another order."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, row_R: Tensor, back_R: Tensor) -> Tensor:
        ctx.save_for_backward(back_R)
        return x_RD[row_R]

    @staticmethod
    def backward(ctx, grad_RD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (back_R,) = ctx.saved_tensors
        return grad_RD[back_R], None, None


class Combine(torch.autograd.Function):
    """`sum_k weights[n, k] x[row[n, k]]`, without a copy of all weighed rows."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, weights_NK: Tensor, rows: Rows) -> Tensor:
        ctx.save_for_backward(x_RD, weights_NK, *rows)
        columns = zip(rows.row_NK.unbind(1), weights_NK.float().unbind(1), strict=True)
        total = sum(x_RD[row].float() * weight[:, None] for row, weight in columns)
        assert isinstance(total, Tensor)
        return total.to(x_RD.dtype)

    @staticmethod
    def backward(ctx, grad_ND: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_RD, weights_NK, order_R, row_NK, _ = ctx.saved_tensors
        choices = row_NK.shape[1]
        grad_RD = grad_ND[order_R // choices]
        grad_weights = None
        if ctx.needs_input_grad[1]:
            products = (grad_RD.float() * x_RD).sum(-1)
            grad_weights = products[row_NK].to(weights_NK.dtype)
        weights_R = weights_NK.float().flatten()[order_R]
        return (grad_RD * weights_R[:, None]).to(x_RD.dtype), grad_weights, None


# ------------------------------------------------------------------------------------------ products


def choose_backend(asked: str, device_type: str, widths: set[int], *, compiled: bool) -> tuple[Backend, str]:
    """Return how to form products, and why. torch's grouped product wants rows of a multiple of 16 bytes."""
    if asked != "auto":
        return ("grouped_mm" if asked == "grouped_mm" else "loop"), "as asked"
    if any(width % 8 for width in widths):
        return "loop", "a width is not a multiple of 8"
    if compiled:
        return "grouped_mm", "the compiler cannot see through a loop"
    return ("loop", "the fastest on a CPU") if device_type == "cpu" else ("grouped_mm", "the host waits for nothing")


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, backend: Backend) -> Tensor:
    """Multiply the rows of each expert with its matrix, (R, O); see `GroupedLinear`."""
    if backend == "grouped_mm":
        return F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)
    return Loop.apply(x_RI, weight_EOI, ends_E)


class Loop(torch.autograd.Function):
    """A product an expert: the reference, and on a CPU the fastest way. It asks the device for the ends."""

    @staticmethod
    def forward(ctx, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.spans = _spans(ends_E, x_RI.shape[0])
        out_RO = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
        for expert, (start, end) in enumerate(ctx.spans):
            torch.mm(x_RI[start:end], weight_EOI[expert].T, out=out_RO[start:end])
        out_RO[ctx.spans[-1][1] :] = 0
        return out_RO

    @staticmethod
    def backward(ctx, grad_RO: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_RI, weight_EOI = ctx.saved_tensors
        grad_x = torch.empty_like(x_RI) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_EOI) if ctx.needs_input_grad[1] else None
        for expert, (start, end) in enumerate(ctx.spans):
            grad = grad_RO[start:end]
            if grad_x is not None:
                torch.mm(grad, weight_EOI[expert], out=grad_x[start:end])
            if grad_weight is not None:
                torch.mm(grad.T, x_RI[start:end], out=grad_weight[expert])
        if grad_x is not None:
            grad_x[ctx.spans[-1][1] :] = 0
        return grad_x, grad_weight, None


def _spans(ends_E: Tensor, rows: int) -> list[tuple[int, int]]:
    """Return where each expert's rows begin and end; in a plan, which knows no numbers, all have as many."""
    experts = ends_E.shape[0]
    ends = [rows * (e + 1) // experts for e in range(experts)] if planning() else ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
