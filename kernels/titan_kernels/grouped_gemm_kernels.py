"""Triton kernels of `grouped_gemm.py` and `contiguous.py`.

One product a tile of rows of one expert. A plan, made on the device, lists these tiles, so that the persistent programs
of a product neither search for their group nor need the host to know its size. What belongs to nobody (rows after the
last end) is planned as an expert past the last: its tiles read zeros for one step, and write them.

The loop over tiles and the one over a tile's sum are flattened into one by the compiler, so that the copy engine
fetches the next tile's operands while this one is written, which it also does itself, a piece at a time.

Bound: 2*R*O*I operations; bytes (R*I + E*O*I + R*O) * e. At 128 x 256 tiles a bf16 product needs 85 operations a byte
of shared-memory fill, so L2 feeds it where tiles that run together share rows (`group_m`).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false
# (a checker sees a kernel as the Python function that it is not)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_kernels import permutation_kernels
from titan_kernels.gemm_configs import GemmConfig, config_for, constants_of, fitting
from titan_kernels.launch import dot_precision, num_programs, takes_tensor_map
from titan_kernels.tensor_maps import blocks_of, halves, load_rows, rows_of, store_rows

PLANNED = 4  # int32 an entry of a plan: expert, first row, end of rows, unused


def plan(ends_E: Tensor, num_rows: int, block_m: int) -> Tensor:
    """Launch the plan of the tiles of `num_rows` rows: entry 0 is their number, and the first row of nobody."""
    num_experts = ends_E.shape[0]
    most = triton.cdiv(num_rows, block_m) + num_experts + 1
    tiles = torch.empty(1 + most, PLANNED, dtype=torch.int32, device=ends_E.device)
    _plan[(num_experts + 1,)](
        ends_E, tiles, num_rows, most, num_experts,
        BINS=triton.next_power_of_2(num_experts + 1), BLOCK_M=block_m, TILES=128, num_warps=1,
    )  # fmt: skip
    return tiles


def forward(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, config: GemmConfig | None = None) -> Tensor:
    """Launch y = x @ weight[e].T."""
    config = config or config_for("product", x_RI, weight_EOI.shape[1])
    return product(x_RI, weight_EOI, plan(ends_E, x_RI.shape[0], config.block_m), config, transposed=False)


def input_gradient(grad_RO: Tensor, weight_EOI: Tensor, ends_E: Tensor, config: GemmConfig | None = None) -> Tensor:
    """Launch grad_x = grad @ weight[e]."""
    config = config or config_for("transposed", grad_RO, weight_EOI.shape[2])
    return product(grad_RO, weight_EOI, plan(ends_E, grad_RO.shape[0], config.block_m), config, transposed=True)


def forward_blocks(
    x_RI: Tensor, weight_EOI: Tensor, expert_B: Tensor, block_rows: int, config: GemmConfig | None = None
) -> Tensor:
    """Launch y = x @ weight[e].T where blocks of rows share an expert."""
    config = fitting(config or config_for("product", x_RI, weight_EOI.shape[1]), block_rows)
    tiles = plan_blocks(expert_B, x_RI.shape[0], config.block_m, weight_EOI.shape[0])
    return product(x_RI, weight_EOI, tiles, config, transposed=False)


def input_gradient_blocks(
    grad_RO: Tensor, weight_EOI: Tensor, expert_B: Tensor, block_rows: int, config: GemmConfig | None = None
) -> Tensor:
    """Launch grad_x = grad @ weight[e] where blocks of rows share an expert."""
    config = fitting(config or config_for("transposed", grad_RO, weight_EOI.shape[2]), block_rows)
    tiles = plan_blocks(expert_B, grad_RO.shape[0], config.block_m, weight_EOI.shape[0])
    return product(grad_RO, weight_EOI, tiles, config, transposed=True)


def weight_gradient_blocks(
    grad_RO: Tensor,
    x_RI: Tensor,
    expert_B: Tensor,
    num_experts: int,
    block_rows: int,
    config: GemmConfig | None = None,
) -> Tensor:
    """Launch the gradient to the weight where blocks of rows share an expert: sort the blocks, then sum."""
    config = fitting(config or config_for("weight_gradient", x_RI, x_RI.shape[1]), block_rows)
    num_blocks = expert_B.shape[0]
    _, ends, _, blocks = permutation_kernels.place(expert_B[:, None], num_experts, 1, num_blocks)
    return weight_gradient(grad_RO, x_RI, ends, config, blocks, block_rows)


def plan_blocks(expert_B: Tensor, num_rows: int, block_m: int, num_experts: int) -> Tensor:
    """Launch the plan of tiles where each block of rows names its expert."""
    num_tiles = num_rows // block_m
    tiles = torch.empty(1 + num_tiles, PLANNED, dtype=torch.int32, device=expert_B.device)
    _plan_blocks[(triton.cdiv(num_tiles + 1, 1024),)](
        expert_B, tiles, num_tiles, num_tiles // max(expert_B.shape[0], 1), num_experts,
        BLOCK_M=block_m, TILES=1024, num_warps=4,
    )  # fmt: skip
    return tiles


def product(
    x_RK: Tensor,
    weight: Tensor,
    tiles: Tensor,
    config: GemmConfig,
    transposed: bool,
    also: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Launch x @ weight[e].T, or x @ weight[e] if `transposed`, over planned tiles of rows.

    The product of `also`, another x and weight of the same shapes, is added to it before it is rounded.
    """
    num_rows, width_k = x_RK.shape
    width_n = weight.shape[2 if transposed else 1]
    y = x_RK.new_empty(num_rows, width_n)
    if y.numel() == 0 or width_k == 0:
        return y.zero_()
    others = also or (x_RK, weight)
    mapped = config.tensor_map and takes_tensor_map(x_RK, weight, *others, y)
    x_block = [config.block_m, config.block_k]
    weight_block = [1, config.block_k, config.block_n] if transposed else [1, config.block_n, config.block_k]
    _product[(num_programs(x_RK) * config.programs,)](
        rows_of(x_RK, x_block, mapped), blocks_of(weight, weight_block, mapped),
        rows_of(others[0], x_block, mapped), blocks_of(others[1], weight_block, mapped),
        rows_of(y, [config.block_m, config.block_n // config.pieces], mapped),
        tiles, num_rows, width_n, width_k, weight.shape[0],
        PAIR=also is not None, TRANSPOSED=transposed, EVEN_K=width_k % config.block_k == 0,
        PRECISION=dot_precision(x_RK), **constants_of(config, mapped),
    )  # fmt: skip
    return y


def weight_gradient(
    grad_RO: Tensor,
    x_RI: Tensor,
    ends_E: Tensor,
    config: GemmConfig | None = None,
    blocks: Tensor | None = None,
    block_rows: int = 0,
) -> Tensor:
    """Launch grad_weight[e] = grad[rows of e].T @ x[rows of e].

    With `blocks`, `ends_E` counts blocks of `block_rows` rows (a multiple of block_k), and `blocks` says which.
    """
    (num_rows, out), width = grad_RO.shape, x_RI.shape[1]
    config = config or config_for("weight_gradient", x_RI, width)
    gradient = x_RI.new_empty(ends_E.shape[0], out, width)
    if gradient.numel() == 0 or num_rows == 0:
        return gradient.zero_()
    mapped = config.tensor_map and takes_tensor_map(grad_RO, x_RI, gradient)
    _weight_gradient[(num_programs(x_RI) * config.programs,)](
        rows_of(grad_RO, [config.block_k, config.block_m], mapped),
        rows_of(x_RI, [config.block_k, config.block_n], mapped),
        blocks_of(gradient, [1, config.block_m, config.block_n // config.pieces], mapped),
        ends_E, ends_E if blocks is None else blocks, num_rows, out, width, ends_E.shape[0],
        BLOCK_ROWS=block_rows, PRECISION=dot_precision(x_RI), **constants_of(config, mapped),
    )  # fmt: skip
    return gradient


@triton.jit(do_not_specialize=["num_rows", "most"])
def _plan(
    ends_ptr, tiles_ptr, num_rows, most, num_experts,
    BINS: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """List the tiles of one expert; after the last one come the rows that belong to nobody."""
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    end = tl.minimum(tl.load(ends_ptr + bins, mask=bins < num_experts, other=num_rows), num_rows)
    start = tl.minimum(tl.load(ends_ptr + bins - 1, mask=(bins > 0) & (bins <= num_experts), other=0), num_rows)
    counts = tl.where(bins <= num_experts, tl.cdiv(tl.maximum(end - start, 0), BLOCK_M), 0)
    before = tl.sum(tl.where(bins < expert, counts, 0), 0)
    count = tl.sum(tl.where(bins == expert, counts, 0), 0)
    first_row = tl.sum(tl.where(bins == expert, start, 0), 0)
    end_row = tl.sum(tl.where(bins == expert, end, 0), 0)
    if expert == num_experts:
        count = 0
        tl.store(tiles_ptr, tl.minimum(before, most))
        tl.store(tiles_ptr + 1, first_row)
    for index in range(0, count, TILES):
        tile = index + tl.arange(0, TILES)
        inside = (tile < count) & (before + tile < most)
        entry = tiles_ptr + (1 + before + tile) * 4
        tl.store(entry, tl.full((TILES,), 0, tl.int32) + expert, mask=inside)
        tl.store(entry + 1, first_row + tile * BLOCK_M, mask=inside)
        tl.store(entry + 2, tl.full((TILES,), 0, tl.int32) + end_row, mask=inside)


@triton.jit(do_not_specialize=["num_tiles"])
def _plan_blocks(
    experts_ptr, tiles_ptr, num_tiles, tiles_a_block, num_experts, BLOCK_M: tl.constexpr, TILES: tl.constexpr
):
    """List all blocks; those of nobody as an expert past the last, which makes zeros in as many steps as others."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    inside = tile < num_tiles
    expert = tl.load(experts_ptr + tile // tiles_a_block, mask=inside, other=-1)
    expert = tl.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    entry = tiles_ptr + (1 + tile) * 4
    tl.store(entry, expert, mask=inside)
    tl.store(entry + 1, tile * BLOCK_M, mask=inside)
    tl.store(entry + 2, (tile + 1) * BLOCK_M, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(tiles_ptr, num_tiles)
        tl.store(tiles_ptr + 1, num_tiles * BLOCK_M)


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return (tile of rows, tile of columns) of the index-th tile: GROUP_M tiles of rows, column by column."""
    together = GROUP_M * tiles_n
    first = index // together * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = index % together
    return first + within % rows, within // rows


@triton.jit
def planned_tile(tiles_ptr, index, tiles_m, tiles_n, num_experts, GROUP_M: tl.constexpr):
    """Return (expert, first row, end of the expert's rows, end of what is read, tile of columns) of a plan's tile.

    Nothing is read for nobody's rows, as the end is where they begin.
    """
    tile, n = tile_at(index, tiles_m, tiles_n, GROUP_M)
    entry = tiles_ptr + (1 + tile) * 4
    expert, row, end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    return expert, row, end, tl.where(expert < num_experts, end, row), n


@triton.jit
def steps_of(row, stop, width, BLOCK: tl.constexpr):
    """Return the steps over `width`: one, of zeros, where no row is read. Loops that run at least once flatten."""
    steps = tl.where(row < stop, tl.cdiv(width, BLOCK), 1)
    tl.assume(steps > 0)
    return steps


@triton.jit
def weight_block(
    weight, expert, n, k, width_n, width_k, num_experts, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr, TENSOR_MAP: tl.constexpr,
):  # fmt: skip
    """Load a block of weight[expert], (N, K) or if TRANSPOSED (K, N), as (BLOCK_K, BLOCK_N); zeros outside."""
    if TENSOR_MAP:
        if TRANSPOSED:
            block = weight.load([expert, k, n]).reshape(BLOCK_K, BLOCK_N)
        else:
            block = weight.load([expert, n, k]).reshape(BLOCK_N, BLOCK_K).T
    else:
        column, step = (n + tl.arange(0, BLOCK_N))[None, :], (k + tl.arange(0, BLOCK_K))[:, None]
        at = step * width_n + column if TRANSPOSED else column * width_k + step
        start = expert.to(tl.int64) * width_n * width_k
        inside = (column < width_n) & (step < width_k) & (expert < num_experts)
        block = tl.load(weight + start + at, mask=inside, other=0.0)
    return block


@triton.jit(do_not_specialize=["num_rows"])
def _product(
    x, weight, other_x, other_weight, y, tiles_ptr, num_rows, width_n, width_k, num_experts,
    PAIR: tl.constexpr, TRANSPOSED: tl.constexpr, TENSOR_MAP: tl.constexpr, FLATTEN: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.load(tiles_ptr)
    tiles_n = tl.cdiv(width_n, BLOCK_N)
    steps = tl.cdiv(width_k, BLOCK_K)  # the same for all tiles: 5 % faster on an H200 than one that a tile decides
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        expert, row, end, stop, n = planned_tile(tiles_ptr, index, tiles_m, tiles_n, num_experts, GROUP_M)
        n *= BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            k = step * BLOCK_K
            a = load_rows(x, row, stop, k, width_k, BLOCK_M, BLOCK_K, TENSOR_MAP, EVEN_K)
            b = weight_block(
                weight, expert, n, k, width_n, width_k, num_experts, BLOCK_N, BLOCK_K, TRANSPOSED, TENSOR_MAP
            )
            total = tl.dot(a, b, total, input_precision=PRECISION)
        if PAIR:
            for step in range(steps):
                k = step * BLOCK_K
                a = load_rows(other_x, row, stop, k, width_k, BLOCK_M, BLOCK_K, TENSOR_MAP, EVEN_K)
                b = weight_block(
                    other_weight, expert, n, k, width_n, width_k, num_experts, BLOCK_N, BLOCK_K, TRANSPOSED, TENSOR_MAP
                )
                total = tl.dot(a, b, total, input_precision=PRECISION)
        store_tile(y, row, end, n, width_n, total, PIECES, TENSOR_MAP)
    zero_rest(y, tiles_ptr, num_rows, width_n, BLOCK_M, BLOCK_N, PIECES, TENSOR_MAP)


@triton.jit
def zero_rest(
    y, tiles_ptr, num_rows, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
    TENSOR_MAP: tl.constexpr,
):  # fmt: skip
    """Write zeros to the rows after the last end, which are nobody's."""
    first, tiles_n = tl.load(tiles_ptr + 1), tl.cdiv(width, BLOCK_N)
    for index in range(tl.program_id(0), tl.cdiv(num_rows - first, BLOCK_M) * tiles_n, tl.num_programs(0)):
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        row, n = first + index // tiles_n * BLOCK_M, index % tiles_n * BLOCK_N
        store_tile(y, row, num_rows, n, width, zeros, PIECES, TENSOR_MAP)


@triton.jit
def store_tile(y, row, end, column, width, tile, PIECES: tl.constexpr, TENSOR_MAP: tl.constexpr):
    """Write a tile of rows that end at `end`, whole or in two pieces."""
    if PIECES == 2:
        HALF: tl.constexpr = tile.shape[1] // 2
        left, right = halves(tile)
        store_rows(y, row, end, column, width, left, TENSOR_MAP)
        store_rows(y, row, end, column + HALF, width, right, TENSOR_MAP)
    else:
        store_rows(y, row, end, column, width, tile, TENSOR_MAP)


@triton.jit(do_not_specialize=["num_rows"])
def _weight_gradient(
    grad, x, gradient, ends_ptr, blocks_ptr, num_rows, out, width, num_experts,
    BLOCK_ROWS: tl.constexpr, TENSOR_MAP: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PIECES: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Sum over rows. The tiles of an expert are neighbours, so that even one hot expert spreads over all programs."""
    tiles_m, tiles_n = tl.cdiv(out, BLOCK_M), tl.cdiv(width, BLOCK_N)
    for index in tl.range(tl.program_id(0), num_experts * tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        expert = index // (tiles_m * tiles_n)
        m, n = tile_at(index % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
        m, n = m * BLOCK_M, n * BLOCK_N
        start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends_ptr + expert)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        first, stop = start, tl.minimum(end, num_rows)
        for step in range(steps_of(start, end, (end - start) * (BLOCK_ROWS if BLOCK_ROWS else 1), BLOCK_K)):
            if BLOCK_ROWS:
                block = start + step * BLOCK_K // BLOCK_ROWS
                first = tl.load(blocks_ptr + block, mask=block < end, other=0) * BLOCK_ROWS
                row = first + step * BLOCK_K % BLOCK_ROWS
                stop = tl.where(block < end, row + BLOCK_K, row)
            else:
                row = start + step * BLOCK_K
            a = load_rows(grad, row, stop, m, out, BLOCK_K, BLOCK_M, TENSOR_MAP, False)
            b = load_rows(x, row, stop, n, width, BLOCK_K, BLOCK_N, TENSOR_MAP, False)
            total = tl.dot(a.T, b, total, input_precision=PRECISION)
        if PIECES == 2:
            left, right = halves(total)
            store_block(gradient, expert, m, n, out, width, left, TENSOR_MAP)
            store_block(gradient, expert, m, n + BLOCK_N // 2, out, width, right, TENSOR_MAP)
        else:
            store_block(gradient, expert, m, n, out, width, total, TENSOR_MAP)


@triton.jit
def store_block(gradient, expert, m, n, out, width, block, TENSOR_MAP: tl.constexpr):
    """Write `block` to gradient[expert, m:, n:], inside of (out, width)."""
    ROWS: tl.constexpr = block.shape[0]
    COLUMNS: tl.constexpr = block.shape[1]
    if TENSOR_MAP:
        gradient.store([expert, m, n], block.to(gradient.dtype).reshape(1, ROWS, COLUMNS))
    else:
        row, column = m + tl.arange(0, ROWS), n + tl.arange(0, COLUMNS)
        at = expert.to(tl.int64) * out * width + row[:, None] * width + column[None, :]
        inside = (row < out)[:, None] & (column < width)[None, :]
        tl.store(gradient + at, block.to(gradient.dtype.element_ty), mask=inside)
