"""float8 e4m3 with fp32 scales: by row, by 1 x 128 blocks of activations, by 128 x 128 blocks of weights.

Shapes: R rows, K width, B blocks of 128 (the last may be cut short); E experts, O output width, I input width.

A scale is amax / 448, at least SMALLEST_SCALE so that a block of zeros divides by no zero; value = q * scale. The
reciprocal of a scale is rounded once and multiplied with, here and in the kernels, so both give the same bytes. NaN
stays NaN and does not count for the maximum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_kernels.launch import runs_triton

BLOCK = 128
LARGEST = 448.0  # of e4m3
SMALLEST_SCALE = 1e-30  # its reciprocal is still finite, and so is the product of two such
E4M3 = torch.float8_e4m3fn


def quantize_1x128(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Return q_RK and its scale_RB, a scale for 128 values of a row.

    The scales lie column by column, each column padded to 16 bytes: the layout that TMA loads a tile's scales from.
    """
    _check_2d("quantize_1x128", x_RK)
    return torch.ops.titan_kernels.quantize_1x128(x_RK)


def quantize_128x1(x_RK: Tensor, ends_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return q_KR, transposed, and its scale_BK, a scale for 128 rows of a column: operands of a weight gradient.

    With `ends_E`, rows after the last end count as zeros, whatever they hold. Rows of q_KR are padded to 16 bytes.
    """
    _check_2d("quantize_128x1", x_RK)
    return torch.ops.titan_kernels.quantize_128x1(x_RK, ends_E)


def quantize_128x128(weight_EOI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q_EOI, its transpose q_EIO, and the scale (E, O blocks, I blocks) of both."""
    if weight_EOI.dim() != 3:
        raise ValueError(f"quantize_128x128() takes weights (experts, out, in); got shape {tuple(weight_EOI.shape)}")
    return torch.ops.titan_kernels.quantize_128x128(weight_EOI)


def quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return q like `x` (..., K) and its scale (...): one scale a row."""
    return torch.ops.titan_kernels.quantize_rowwise(x)


def dequantize_1x128(q_RK: Tensor, scale_RB: Tensor) -> Tensor:
    """Return the values in fp32."""
    return q_RK.float() * scale_RB.repeat_interleave(BLOCK, 1)[:, : q_RK.shape[1]]


def dequantize_128x1(q_KR: Tensor, scale_BK: Tensor) -> Tensor:
    """Return the values in fp32, as (R, K) again."""
    return q_KR.float().T * scale_BK.repeat_interleave(BLOCK, 0)[: q_KR.shape[1]]


def dequantize_128x128(q_EOI: Tensor, scale: Tensor) -> Tensor:
    """Return the values in fp32."""
    _, out, width = q_EOI.shape
    return q_EOI.float() * scale.repeat_interleave(BLOCK, 1)[:, :out].repeat_interleave(BLOCK, 2)[:, :, :width]


def reference_quantize_1x128(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_1x128` in plain torch."""
    rows, width = x_RK.shape
    blocks = _padded(x_RK.float(), 1).view(rows, -1, BLOCK)
    scale = _scale(_largest(blocks, 2))
    q = _rounded(blocks, scale[:, :, None]).view(rows, -1)[:, :width].contiguous()
    columns = _columns(x_RK)
    columns.copy_(scale)
    return q, columns


def reference_quantize_128x1(x_RK: Tensor, ends_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_128x1` in plain torch."""
    rows, width = x_RK.shape
    x = x_RK.float()
    if ends_E is not None:
        x = torch.where((torch.arange(rows, device=x.device) < ends_E[-1])[:, None], x, 0)
    blocks = _padded(x, 0).view(-1, BLOCK, width)
    scale = _scale(_largest(blocks, 1))
    q = _transposed_rows(x_RK)
    q.copy_(_rounded(blocks, scale[:, None, :]).view(-1, width)[:rows].T)
    return q, scale


def reference_quantize_128x128(weight_EOI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_128x128` in plain torch."""
    experts, out, width = weight_EOI.shape
    padded = _padded(_padded(weight_EOI.float(), 1), 2)
    blocks = padded.view(experts, padded.shape[1] // BLOCK, BLOCK, -1, BLOCK)
    scale = _scale(_largest(blocks, (2, 4)))
    q = _rounded(blocks, scale[:, :, None, :, None]).view_as(padded)[:, :out, :width].contiguous()
    return q, q.transpose(1, 2).contiguous(), scale


def reference_quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rowwise` in plain torch."""
    scale = _scale(_largest(x.float(), -1))
    return _rounded(x.float(), scale[..., None]).contiguous(), scale


def _scale(largest: Tensor) -> Tensor:
    return (largest * (1 / LARGEST)).clamp_min(SMALLEST_SCALE)


def _largest(x: Tensor, dim: int | tuple[int, int]) -> Tensor:
    return x.abs().nan_to_num(0, torch.inf).amax(dim)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(E4M3)


def _padded(x: Tensor, dim: int) -> Tensor:
    missing = -x.shape[dim] % BLOCK
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x


def _columns(x_RK: Tensor) -> Tensor:
    """Return an empty scale_RB whose columns are contiguous and start at multiples of 16 bytes."""
    rows, width = x_RK.shape
    return x_RK.new_empty(-(-width // BLOCK), -(-rows // 4) * 4, dtype=torch.float32)[:, :rows].T


def _transposed_rows(x_RK: Tensor) -> Tensor:
    """Return an empty q_KR whose rows start at multiples of 16 bytes."""
    rows, width = x_RK.shape
    return x_RK.new_empty(width, -(-rows // 16) * 16, dtype=E4M3)[:, :rows]


def _check_2d(name: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name}() takes a matrix (rows, width); got shape {tuple(x.shape)}")


@torch.library.custom_op("titan_kernels::quantize_1x128", mutates_args=())
def _quantize_1x128(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    if runs_triton(x_RK):
        from titan_kernels import quant_kernels

        q, scale = torch.empty_like(x_RK, dtype=E4M3), _columns(x_RK)
        quant_kernels.quantize_1x128(x_RK.contiguous(), q, scale)
        return q, scale
    return reference_quantize_1x128(x_RK)


@_quantize_1x128.register_fake
def _(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_RK, dtype=E4M3, memory_format=torch.contiguous_format), _columns(x_RK)


@torch.library.custom_op("titan_kernels::quantize_128x1", mutates_args=())
def _quantize_128x1(x_RK: Tensor, ends_E: Tensor | None) -> tuple[Tensor, Tensor]:
    if runs_triton(x_RK):
        from titan_kernels import quant_kernels

        q, scale = _transposed_rows(x_RK), _blocks_of_rows(x_RK)
        quant_kernels.quantize_128x1(x_RK.contiguous(), ends_E, q, scale)
        return q, scale
    return reference_quantize_128x1(x_RK, ends_E)


def _blocks_of_rows(x_RK: Tensor) -> Tensor:
    return x_RK.new_empty(-(-x_RK.shape[0] // BLOCK), x_RK.shape[1], dtype=torch.float32)


@_quantize_128x1.register_fake
def _(x_RK: Tensor, ends_E: Tensor | None) -> tuple[Tensor, Tensor]:
    return _transposed_rows(x_RK), _blocks_of_rows(x_RK)


@torch.library.custom_op("titan_kernels::quantize_128x128", mutates_args=())
def _quantize_128x128(weight_EOI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if runs_triton(weight_EOI):
        from titan_kernels import quant_kernels

        outputs = _empty_weights(weight_EOI)
        quant_kernels.quantize_128x128(weight_EOI.contiguous(), *outputs)
        return outputs
    return reference_quantize_128x128(weight_EOI)


@_quantize_128x128.register_fake
def _empty_weights(weight_EOI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    experts, out, width = weight_EOI.shape
    scales = (experts, -(-out // BLOCK), -(-width // BLOCK))
    q, transposed = (weight_EOI.new_empty(experts, *shape, dtype=E4M3) for shape in ((out, width), (width, out)))
    return q, transposed, weight_EOI.new_empty(scales, dtype=torch.float32)


@torch.library.custom_op("titan_kernels::quantize_rowwise", mutates_args=())
def _quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    if runs_triton(x):
        from titan_kernels import quant_kernels

        q, scale = _empty_rowwise(x)
        quant_kernels.quantize_rowwise(x.contiguous(), q, scale)
        return q, scale
    return reference_quantize_rowwise(x)


@_quantize_rowwise.register_fake
def _empty_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    q: Any = torch.empty_like(x, dtype=E4M3, memory_format=torch.contiguous_format)
    return q, x.new_empty(x.shape[:-1], dtype=torch.float32)
