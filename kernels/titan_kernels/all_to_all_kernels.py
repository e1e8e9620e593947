"""Triton kernels of `all_to_all.py`: publish, announce, pull.

Peers are addressed by a table of int64 addresses, so that tests can hand over any memory that processes share. Rows
travel as words, whatever their dtype. One announcement a round orders everything: see `Layout`.

The announcement is a kernel of its own: it begins when the rows are written, and ends before this rank waits for its
peers, so that no program of this rank can keep it from running.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from titan_kernels.launch import num_programs

if TYPE_CHECKING:
    from titan_kernels.all_to_all import Route, SymmetricExchange

# Untuned: never measured on GPUs. A tile is 16 KiB; with two programs a multiprocessor of Hopper 4 MiB are in flight.
TILE_WORDS = 4096
WAVES = 2  # programs a multiprocessor
NUM_WARPS = 8


def as_words(rows: Tensor) -> Tensor:
    """Return rows as the widest words, up to four bytes, that divide them."""
    size = rows.shape[1] * rows.element_size()
    word = torch.int32 if size % 4 == 0 else torch.int16 if size % 2 == 0 else torch.uint8
    return rows.contiguous().view(torch.uint8).view(word) if rows.numel() else rows.new_empty(rows.shape, dtype=word)


def publish(exchange: SymmetricExchange, rows: Tensor, counts_WE: Tensor, starts_WE: Tensor) -> None:
    """Launch the copy of the rows that are used, and of their tables, into this rank's next slot; announce it."""
    layout, words = exchange.layout, as_words(rows)
    _publish[(WAVES * num_programs(words),)](
        words, counts_WE, starts_WE, exchange.memory.addresses_W, exchange.round,
        exchange.rank, words.shape[0], words.shape[1], layout.world * layout.experts,
        layout.tables_at, layout.rows_at, layout.slot_bytes,
        SEGMENTS=triton.next_power_of_2(layout.world * layout.experts), **_tile(words.shape[1]), num_warps=NUM_WARPS,
    )  # fmt: skip
    _announce[(1,)](
        exchange.memory.addresses_W, exchange.round, exchange.rank, layout.world,
        WORLD=triton.next_power_of_2(layout.world), num_warps=1,
    )  # fmt: skip


def pull(exchange: SymmetricExchange, like: Tensor, route: Route, *, align: int, forth: bool, place: bool) -> Tensor:
    """Launch the wait for all peers and the copy of their segments for this rank.

    `forth`: to the experts, with zeros in padding, else back. `place`: find out where segments go and fill the route.
    """
    layout = exchange.layout
    counts, starts = (
        (route.received_counts_WE, route.received_starts_WE) if forth else (route.sent_counts_WE, route.sent_starts_WE)
    )
    words = as_words(like[:0])
    out = like.new_empty(route.capacity if forth else route.num_rows, like.shape[1])
    width = out.shape[1] * out.element_size() // words.element_size()
    flat = out.view(torch.uint8).view(words.dtype) if out.numel() else words
    segments = layout.world * layout.experts
    _pull[(segments, max(1, WAVES * num_programs(out) // segments))](
        exchange.memory.addresses_W, exchange.round, flat, counts, starts, route.ends_E, route.needed,
        exchange.rank, layout.world, layout.experts, out.shape[0], layout.rows, width, align,
        layout.tables_at, layout.rows_at, layout.slot_bytes,
        WORLD=triton.next_power_of_2(layout.world), EXPERTS=triton.next_power_of_2(layout.experts),
        PLACE=place, PAD=forth, **_tile(width), num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def _tile(width: int) -> dict[str, int]:
    columns = min(TILE_WORDS, triton.next_power_of_2(max(1, width)))
    return {"ROWS": TILE_WORDS // columns, "COLUMNS": columns}


@triton.jit
def _tables(base, tables_at, slot, segments):
    """Return pointers to the counts and the starts of a slot of the memory at `base`."""
    counts_ptr = (base + tables_at + slot * segments * 8).to(tl.pointer_type(tl.int32))
    return counts_ptr, counts_ptr + segments


@triton.jit
def _rows(addresses_ptr, rank, rows_at, slot, slot_bytes, word: tl.constexpr):
    """Return a pointer to the rows of a slot of a rank's memory: everything in it begins at a multiple of 16 bytes."""
    base = tl.load(addresses_ptr + rank) + rows_at + slot * slot_bytes
    return tl.multiple_of(base.to(tl.pointer_type(word)), 16)


@triton.jit(do_not_specialize=["rank", "num_rows"])
def _publish(
    words_ptr, counts_ptr, starts_ptr, addresses_ptr, round_ptr, rank, num_rows, width, segments,
    tables_at, rows_at, slot_bytes, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    slot = (tl.load(round_ptr) + 1) % 2
    segment = tl.arange(0, SEGMENTS)
    inside = segment < segments
    start = tl.load(starts_ptr + segment, mask=inside, other=0)
    count = tl.load(counts_ptr + segment, mask=inside, other=0)
    start = tl.minimum(tl.maximum(start, 0), num_rows)
    count = tl.maximum(tl.minimum(count, num_rows - start), 0)
    if tl.program_id(0) == 0:
        to_counts, to_starts = _tables(tl.load(addresses_ptr + rank), tables_at, slot, segments)
        tl.store(to_counts + segment, count, mask=inside)
        tl.store(to_starts + segment, start, mask=inside)
    used = tl.max(start + count, 0)
    to = _rows(addresses_ptr, rank, rows_at, slot, slot_bytes, words_ptr.dtype.element_ty)
    for first in range(tl.program_id(0) * ROWS, used, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None].to(tl.int64)
        for left in range(0, width, COLUMNS):
            column = (left + tl.arange(0, COLUMNS))[None, :]
            mask = (row < used) & (column < width)
            tl.store(to + row * width + column, tl.load(words_ptr + row * width + column, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["rank"])
def _announce(addresses_ptr, round_ptr, rank, world, WORLD: tl.constexpr):
    """Tell every peer, this rank too, that the round is published, and begin it."""
    this = tl.load(round_ptr) + 1
    tl.store(round_ptr, this)
    peer = tl.arange(0, WORLD)
    address = tl.load(addresses_ptr + peer, mask=peer < world, other=0)
    at = address.to(tl.pointer_type(tl.int64)) + rank
    tl.atomic_xchg(at, tl.zeros((WORLD,), tl.int64) + this, mask=peer < world, sem="release", scope="sys")


@triton.jit
def _wait(addresses_ptr, rank, this, world, WORLD: tl.constexpr):
    """Wait until every peer has announced this round. A peer may be a round ahead already, never two."""
    peer = tl.arange(0, WORLD)
    at = tl.load(addresses_ptr + rank).to(tl.pointer_type(tl.int64)) + peer
    nothing = tl.zeros((WORLD,), tl.int64)
    seen = this - 1
    while seen < this:
        announced = tl.atomic_add(at, nothing, mask=peer < world, sem="acquire", scope="sys")
        seen = tl.min(tl.where(peer < world, announced, this), 0)


@triton.jit
def _place(
    addresses_ptr, counts_ptr, starts_ptr, ends_ptr, needed_ptr, rank, world, experts, out_rows, align,
    tables_at, slot, source, expert, first, WORLD: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Return count and start of a segment when they lie by expert, and by source within; `first` writes the tables."""
    s, e = tl.arange(0, WORLD), tl.arange(0, EXPERTS)
    base = tl.load(addresses_ptr + s, mask=s < world, other=0)
    published = (base + tables_at + slot * world * experts * 8).to(tl.pointer_type(tl.int32)) + rank * experts
    inside = (s < world)[:, None] & (e < experts)[None, :]
    counts = tl.maximum(tl.load(published[:, None] + e[None, :], mask=inside, other=0), 0)
    padded = (tl.sum(counts, 0) + align - 1) // align * align
    start = tl.sum(tl.where(e < expert, padded, 0), 0)
    end = start + tl.sum(tl.where(e == expert, padded, 0), 0)
    own = (e == expert)[None, :]
    start += tl.sum(tl.sum(tl.where((s < source)[:, None] & own, counts, 0), 1), 0)
    count = tl.sum(tl.sum(tl.where((s == source)[:, None] & own, counts, 0), 1), 0)
    count = tl.maximum(tl.minimum(count, out_rows - start), 0)
    if first:
        tl.store(counts_ptr + source * experts + expert, count)
        tl.store(starts_ptr + source * experts + expert, start)
        if source == 0:
            tl.store(ends_ptr + expert, tl.minimum(end, out_rows))
            if expert == experts - 1:
                tl.store(needed_ptr, end)
    return count, start, tl.minimum(end, out_rows)


@triton.jit(do_not_specialize=["rank", "out_rows"])
def _pull(
    addresses_ptr, round_ptr, out_ptr, counts_ptr, starts_ptr, ends_ptr, needed_ptr,
    rank, world, experts, out_rows, capacity, width, align, tables_at, rows_at, slot_bytes,
    WORLD: tl.constexpr, EXPERTS: tl.constexpr, PLACE: tl.constexpr, PAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy segment (source, expert) of what a peer published for this rank; rows that the peer lacks become zeros."""
    source, expert = tl.program_id(0) // experts, tl.program_id(0) % experts
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    this = tl.load(round_ptr)
    slot = this % 2
    _wait(addresses_ptr, rank, this, world, WORLD)
    if PLACE:
        count, start, end = _place(
            addresses_ptr, counts_ptr, starts_ptr, ends_ptr, needed_ptr, rank, world, experts, out_rows, align,
            tables_at, slot, source, expert, chunk == 0, WORLD, EXPERTS,
        )  # fmt: skip
    else:
        count = tl.load(counts_ptr + source * experts + expert)
        start = tl.load(starts_ptr + source * experts + expert)
        end = tl.load(ends_ptr + expert) if PAD else 0
    their_counts, their_starts = _tables(tl.load(addresses_ptr + source), tables_at, slot, world * experts)
    there = tl.load(their_counts + rank * experts + expert)
    at = tl.load(their_starts + rank * experts + expert)
    there = tl.minimum(there, capacity - at) * (at >= 0).to(tl.int32)
    rows_ptr = _rows(addresses_ptr, source, rows_at, slot, slot_bytes, out_ptr.dtype.element_ty)
    if PAD and source == world - 1:  # the expert's last segment goes on to the end of its padding
        count = tl.maximum(count, end - start)
    for first in range(chunk * ROWS, count, chunks * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None].to(tl.int64)
        to = start + row
        for left in range(0, width, COLUMNS):
            column = (left + tl.arange(0, COLUMNS))[None, :]
            mask = (row < count) & (to >= 0) & (to < out_rows) & (column < width)
            word = tl.load(rows_ptr + (at + row) * width + column, mask=mask & (row < there), other=0)
            tl.store(out_ptr + to * width + column, word, mask=mask)
