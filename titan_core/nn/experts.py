"""Many MLPs of one shape, of which each token visits a few.

Rows are sorted by expert, so that each expert works on rows that lie together. Nothing waits for the device, and no row
is padded or left out.

Shape letters: N tokens, K choices of a token, R rows = N K, D model width, F expert width, E experts, O out, I in.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from titan_kernels.grouped_gemm import grouped_linear, reference_grouped_linear
from titan_kernels.permutation import permute, place, unpermute
from torch import Tensor, nn

from titan_core.nn import ops

Backend = Literal["titan", "grouped_mm", "loop"]


class GroupedLinear(nn.Module):
    """`x @ weight[e].T` for the rows of each expert e; weight (E, out, in)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.compute_dtype: torch.dtype | None = None
        self.backend: Backend = "titan"

    def forward(self, x_RI: Tensor, ends_E: Tensor) -> Tensor:
        """Map (R, in) to (R, out): expert e has the rows from `ends_E[e - 1]` to `ends_E[e]` (int32)."""
        dtype = self.compute_dtype or self.weight.dtype
        return multiply(x_RI.to(dtype), self.weight.to(dtype), ends_E, self.backend)


class Experts(nn.Module):
    """E SwiGLU MLPs."""

    def __init__(self, num_experts: int, dim: int, width: int) -> None:
        super().__init__()
        self.w1 = GroupedLinear(num_experts, dim, width)
        self.w2 = GroupedLinear(num_experts, width, dim)
        self.w3 = GroupedLinear(num_experts, dim, width)

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
        """Return for each token the sum of what its experts give, by weight where there are weights; (N, D)."""
        placement = place(chosen_NK, self.w1.weight.shape[0])
        out_RD = self.mlp(permute(x_ND, placement), placement.ends_E)
        return unpermute(out_RD, placement, weights_NK)

    def mlp(self, x_RD: Tensor, ends_E: Tensor) -> Tensor:
        """Map rows that are sorted by expert, (R, D) to (R, D)."""
        return self.w2(ops.swiglu(self.w1(x_RD, ends_E), self.w3(x_RD, ends_E)), ends_E)


def multiply(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, backend: Backend) -> Tensor:
    """Multiply the rows of each expert with its matrix, (R, O); rows after the last end are nobody's."""
    if backend == "grouped_mm":
        return F.grouped_mm(x_RI, weight_EOI.transpose(1, 2), offs=ends_E)
    if backend == "loop":
        return reference_grouped_linear(x_RI, weight_EOI, ends_E)
    return grouped_linear(x_RI, weight_EOI, ends_E)


def choose_backend(asked: Backend | Literal["auto"], device_type: str, dtype: torch.dtype) -> tuple[Backend, str]:
    """Return how to form products, and why."""
    if asked != "auto":
        return asked, "as asked"
    if device_type == "cpu":
        return "titan", "a product an expert: the fastest on a CPU"
    if dtype != torch.bfloat16:
        return "titan", f"torch's grouped product takes no {str(dtype).removeprefix('torch.')}"
    return "grouped_mm", "titan's kernels are untimed on this device: `titan bench moe-gemm` compares them"
