"""Blocks of the rows of one group, read and written by the copy engine of Hopper and later.

The engine checks the bounds of a tensor, but the rows of a group end in the middle of one. So rows are described by
three dimensions, of strides 2^34 - s, s and s for rows that lie s elements apart. In the coordinates (2^30, end,
2^30 - end + r) the first two undo what the third has too much: 2^30 * 2^34 elements are a multiple of 2^64 bytes, by
which addresses wrap around, and what is left is row r. The third has a bound of 2^30, so a row at or past `end` is
outside of the tensor: zeros where it is read, dropped where it is written. (The same trick is in Triton's tools, as
`ragged_tma`; here a group is told by its end alone.)
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
# (a checker sees a kernel as the Python function that it is not)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BOUND = tl.constexpr(1 << 30)
UNBOUNDED = (1 << 31) - (1 << 16)


def rows_of(x_RX: Tensor, block: list[int], mapped: bool) -> Any:
    """Return the rows of `x_RX` as a kernel takes them: a map of blocks that end with a group, or a pointer."""
    if not mapped:
        return x_RX
    (_, width), stride = x_RX.shape, x_RX.stride(0)
    sizes, strides = [UNBOUNDED, UNBOUNDED, 1 << 30, width], [(1 << 34) - stride, stride, stride, 1]
    return TensorDescriptor(x_RX, sizes, strides, [1, 1, *block])


def blocks_of(x: Tensor, block: list[int], mapped: bool) -> Any:
    """Return `x` as a kernel takes it: a map of its blocks, or a pointer."""
    return TensorDescriptor.from_tensor(x, block) if mapped else x


@triton.jit
def load_rows(
    x, row, end, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TENSOR_MAP: tl.constexpr, EVEN: tl.constexpr
):
    """Load x[row : row + ROWS, column : column + COLUMNS]; zeros from row `end` and column `width` on.

    EVEN says that no block reaches over `width`.
    """
    if TENSOR_MAP:
        block = x.load([BOUND, end, BOUND - end + row, column]).reshape(ROWS, COLUMNS)
    else:
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        mask = (rows < end)[:, None] if EVEN else (rows < end)[:, None] & (columns < width)[None, :]
        block = tl.load(x + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0)
    return block


@triton.jit
def store_rows(y, row, end, column, width, block, TENSOR_MAP: tl.constexpr):
    """Write `block` to y[row:, column:], but nothing from row `end` and column `width` on."""
    ROWS: tl.constexpr = block.shape[0]
    COLUMNS: tl.constexpr = block.shape[1]
    if TENSOR_MAP:
        y.store([BOUND, end, BOUND - end + row, column], block.to(y.dtype).reshape(1, 1, ROWS, COLUMNS))
    else:
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        inside = (rows < end)[:, None] & (columns < width)[None, :]
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(y + at, block.to(y.dtype.element_ty), mask=inside)


@triton.jit
def halves(x):
    """Return the left and the right half of the columns of a tile."""
    ROWS: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    return x.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
