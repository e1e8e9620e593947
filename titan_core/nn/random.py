"""Random numbers as a pure function of (seed, name, index).

Initial weights must not depend on the number of ranks, the order of construction or the device. So each element is a
hash of the seed, the parameter's name and its own position in the full tensor, and any shard can be filled alone.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements hashed at once: 2 MiB of int64, which stays in the cache of one core
_MULTIPLIERS = (
    -0x40A7B892E31B1A47,
    -0x6B2FB644ECCEEE15,
)  # splitmix64's finaliser, as signed integers
_GOLDEN = -0x61C8864680B583EB


def fill_normal(
    out: Tensor,
    *,
    seed: int,
    name: str,
    full_shape: tuple[int, ...],
    offset: tuple[int, ...],
    std: float,
    cut: float | None = None,
) -> None:
    """Fill `out`, the block at `offset` of a tensor of `full_shape`, with normal numbers of deviation `std`.

    `cut` redraws nothing: it maps uniform numbers to the normal distribution truncated at that many deviations.
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)
    bound = 1.0 if cut is None else math.erf(cut / math.sqrt(2))
    rows = out.reshape(out.shape[0] if out.dim() > 1 else 1, -1)
    if rows.data_ptr() != out.data_ptr():
        raise AssertionError("initial weights must be contiguous")
    strides = [math.prod(full_shape[d + 1 :]) for d in range(len(full_shape))]
    columns = _column_index(out, strides, offset)
    step = max(1, _CHUNK // max(1, rows.shape[1]))
    row_stride = strides[0] if out.dim() > 1 else 0
    first = offset[0] if out.dim() > 1 else 0
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step]
        number = torch.arange(first + start, first + start + block.shape[0], device=out.device)
        index = number[:, None] * row_stride + columns
        block.copy_(_normal(_hash(index, key), bound) * std)


def normal_rows(seed: int, name: str, rows_B: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return standard normal numbers (B, *shape), fp32, for samples of these numbers (int64), wherever each of them is
    computed, and in whatever company."""
    bits = _row_bits(seed, name, rows_B, math.prod(shape))
    return _normal(bits, 1.0).view(-1, *shape)


def uniform_rows(seed: int, name: str, rows_B: Tensor) -> Tensor:
    """Return a number in (0, 1) for each sample, (B) fp32."""
    return ((_row_bits(seed, name, rows_B, 1)[:, 0] >> 40) & ((1 << 23) - 1)).float().add_(0.5) / (1 << 23)


def _row_bits(seed: int, name: str, rows_B: Tensor, count: int) -> Tensor:
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little", signed=True)
    return _hash(torch.arange(count, device=rows_B.device), _hash(rows_B, key)[:, None])


def _column_index(out: Tensor, strides: list[int], offset: tuple[int, ...]) -> Tensor:
    """Return the flat positions, within one row of the full tensor, of the columns of the block."""
    first = 1 if out.dim() > 1 else 0
    index = torch.zeros(1, dtype=torch.int64, device=out.device)
    for d in range(first, out.dim()):
        here = torch.arange(offset[d], offset[d] + out.shape[d], device=out.device) * strides[d]
        index = (index[:, None] + here[None, :]).flatten()
    return index


def _hash(index: Tensor, key: int | Tensor) -> Tensor:
    """Return 64 well-mixed bits an index (splitmix64); int64 arithmetic wraps as unsigned does."""
    x = index * _GOLDEN + key
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _normal(bits: Tensor, bound: float) -> Tensor:
    """Turn hashed bits into standard normal numbers, fp32, by the inverse of the error function.

    23 bits make the magnitude, one the sign: magnitudes (k + 1/2) / 2^23 are exact in fp32 and never reach 1.
    """
    magnitude = ((bits >> 40) & ((1 << 23) - 1)).float().add_(0.5).mul_(bound / (1 << 23))
    sign = 1.0 - 2.0 * ((bits >> 63) & 1).float()
    return torch.erfinv(magnitude).mul_(math.sqrt(2)).mul_(sign)
