"""Layers with weights: linear, embedding, RMSNorm, SwiGLU MLP.

Each has a `compute_dtype`: where it is set, weights and inputs are cast to it at use, so that fp32 master weights
compute in bf16 on any layout; where FSDP has cast them already the cast does nothing.

Shape letters: B batch, T tokens, D model width, F feed-forward width, V vocabulary, N anything.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titan_core.nn import ops


class Linear(nn.Module):
    """`x @ weight.T`, plus a bias where there is one; weight (out, in)."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.compute_dtype: torch.dtype | None = None

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return ops.linear(x_ND, self.weight, self.compute_dtype, self.bias)

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class Embedding(nn.Module):
    """Rows of a table; weight (vocabulary, width)."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.compute_dtype: torch.dtype | None = None

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Map ids (B, T) to vectors (B, T, D)."""
        x_BTD = nn.functional.embedding(tokens_BT, self.weight)
        return x_BTD if self.compute_dtype is None else x_BTD.to(self.compute_dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a scale (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x_ND: Tensor) -> Tensor:
        """Normalise (..., D); statistics in fp32, result in the dtype of the input."""
        return ops.rms_norm(x_ND, self.weight, self.eps)


class SwiGLU(nn.Module):
    """`w2(silu(w1 x) * w3 x)` (Shazeer 2020)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = Linear(dim, hidden_dim)
        self.w2 = Linear(hidden_dim, dim)
        self.w3 = Linear(dim, hidden_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.w2(ops.swiglu(self.w1(x_BTD), self.w3(x_BTD)))


def set_compute_dtype(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Make every layer of a module compute in `dtype`."""
    for layer in module.modules():
        if "compute_dtype" in vars(layer):
            vars(layer)["compute_dtype"] = dtype


def set_parameter_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Store the parameters of a module in `dtype`; buffers, which are counts and small corrections, stay fp32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
