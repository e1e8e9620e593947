"""Many MLPs of one shape, of which each token visits a few.

Rows are sorted by expert, so that each expert works on rows that lie together. Nothing waits for the device, and no row
is padded or left out.

Shape letters: N tokens, K choices of a token, R rows = N K, D model width, F expert width, E experts, O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from titan_kernels.expert_mlp import expert_mlp, routed_mlp
from titan_kernels.grouped_gemm import grouped_linear, reference_grouped_linear
from titan_kernels.permutation import Placement, permute, place, unpermute
from torch import Tensor, nn

from titan_core.nn import ops

Backend = Literal["titan", "grouped_mm", "loop"]
Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # of rows (R, I), weights (E, O, I) and the ends of rows: (R, O)


class GroupedLinear(nn.Module):
    """The matrices of a linear layer of each expert; weight (E, out, in)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.compute_dtype: torch.dtype | None = None

    def forward(self) -> Tensor:
        """Return the weights (E, out, in) in the dtype to compute in."""
        return self.weight if self.compute_dtype is None else self.weight.to(self.compute_dtype)


class Experts(nn.Module):
    """E SwiGLU MLPs.

    `product` forms products instead of the backend where they are not plain ones. Rows of an expert begin at multiples
    of `align`.
    """

    def __init__(self, num_experts: int, dim: int, width: int) -> None:
        super().__init__()
        self.w1 = GroupedLinear(num_experts, dim, width)
        self.w2 = GroupedLinear(num_experts, width, dim)
        self.w3 = GroupedLinear(num_experts, dim, width)
        self.backend: Backend = "titan"
        self.product: Product | None = None
        self.align = 1

    @property
    def held(self) -> int:
        """Number of experts that are at hand."""
        return self.w1.weight.shape[0]

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
        """Return for each token the sum of what its experts give, by weight where there are weights; (N, D).

        What is chosen and not at hand gives nothing.
        """
        return self.visit(x_ND, place(chosen_NK, self.held, self.align), weights_NK)

    def visit(self, x_ND: Tensor, placement: Placement, weights_NK: Tensor | None) -> Tensor:
        """Return the sums for tokens whose rows are placed."""
        w1, w2, w3 = self.w1(), self.w2(), self.w3()
        if weights_NK is not None and self.product is None and self.backend == "titan":
            return routed_mlp(x_ND.to(w1.dtype), placement, weights_NK, w1, w3, w2)
        return unpermute(self.mlp(permute(x_ND, placement), placement.ends_E), placement, weights_NK)

    def mlp(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Map rows that are sorted by expert, (R, D) to (R, D): those of expert e end at `ends_E[e]` (int32)."""
        w1, w2, w3 = self.w1(), self.w2(), self.w3()
        x_RD = x_RD.to(w1.dtype)
        if self.product is None and self.backend == "titan":
            return expert_mlp(x_RD, w1, w3, w2, ends_E)
        product = self.product or partial(multiply, backend=self.backend)
        gate, up = (product(x_RD, weight, ends_E) for weight in (w1, w3))
        return product(ops.swiglu(gate, up), w2, ends_E)


def multiply(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, backend: Backend) -> Tensor:
    """Multiply the rows of each expert with its matrix, (R, O); rows after the last end are nobody's."""
    if backend == "grouped_mm":
        return F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)
    if backend == "loop":
        return reference_grouped_linear(x_RI, weight_EOI, ends_E)
    return grouped_linear(x_RI, weight_EOI, ends_E)


def choose_backend(
    asked: Backend | Literal["auto"], device_type: str, dtype: torch.dtype, capability: int | None = None
) -> tuple[Backend, str]:
    """Return how to form products, and why; `capability` is the major compute capability of a GPU."""
    if asked != "auto":
        return asked, "as asked"
    if device_type == "cpu":
        return "titan", "a product an expert: the fastest on a CPU"
    if dtype != torch.bfloat16:
        return "titan", f"torch's grouped product takes no {str(dtype).removeprefix('torch.')}"
    if capability == 9:
        return "titan", "whole layers are 1.4 to 5.7 times as fast as with torch's grouped product, on an H200"
    return "grouped_mm", "titan's kernels are untimed on this device: `titan bench moe-gemm` compares them"
