"""float8 e4m3 with fp32 scales: by row, by 1 x 128 blocks of activations, by 128 x 128 blocks of weights.

Shapes: R rows, K width, B blocks of 128 (the last may be cut short); E experts, O output width, I input width; P rows
of whole blocks, Q blocks of P.

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
    """Return q_KP, transposed, and its scale_QK, a scale for 128 rows of a column: operands of a weight gradient.

    P is R padded with zeros to whole blocks. With `ends_E`, rows after the last end count as zeros, whatever they hold,
    and two blocks an expert follow: the rows at its begin and at its end of the blocks that it shares with others, and
    zeros for the rows of those. They are written only where there is such a block.
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


def dequantize_128x1(q_KP: Tensor, scale_QK: Tensor) -> Tensor:
    """Return the values in fp32, as (P, K)."""
    return q_KP.float().T * scale_QK.repeat_interleave(BLOCK, 0)


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
    q = _rounded(blocks, scale[:, None, :]).view(torch.uint8)
    if ends_E is not None:
        shared, inside = _shared_blocks(ends_E, q.shape[0])
        q = torch.cat((q, torch.where(inside[:, :, None], q[shared], 0)))
        scale = torch.cat((scale, scale[shared]))
    return q.view(-1, width).T.contiguous().view(E4M3), scale


def _shared_blocks(ends_E: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return the blocks in which each expert begins and ends (2E), and which of their rows are its own (2E, 128)."""
    ends = ends_E.long().clamp_max(num_blocks * BLOCK)
    starts = F.pad(ends[:-1], (1, 0))
    shared = (torch.stack((starts, ends), 1) // BLOCK).clamp_max(num_blocks - 1).flatten()
    rows = shared[:, None] * BLOCK + torch.arange(BLOCK, device=ends.device)
    return shared, (rows >= starts.repeat_interleave(2)[:, None]) & (rows < ends.repeat_interleave(2)[:, None])


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


def _empty_128x1(x_RK: Tensor, ends_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return an empty q_KP and scale_QK."""
    rows, width = x_RK.shape
    blocks = -(-rows // BLOCK) + (0 if ends_E is None else 2 * ends_E.shape[0])
    return x_RK.new_empty(width, blocks * BLOCK, dtype=E4M3), x_RK.new_empty(blocks, width, dtype=torch.float32)


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

        q, scale = _empty_128x1(x_RK, ends_E)
        quant_kernels.quantize_128x1(x_RK.contiguous(), ends_E, q, scale)
        return q, scale
    return reference_quantize_128x1(x_RK, ends_E)


_quantize_128x1.register_fake(_empty_128x1)


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
