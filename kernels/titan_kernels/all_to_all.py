"""Rows to the ranks that hold their experts, and back: the all-to-all of expert parallelism.

`SymmetricExchange` does it within a node without the host: every rank publishes its rows in memory that its peers can
read, and pulls what is for its experts straight to where the experts want it, grouped by expert. `CollectiveExchange`
does the same with `all_to_all_single` on any backend and any number of nodes; it waits for the device to learn sizes.

Shapes: W ranks, E experts of one rank, R rows sent, C capacity of rows received, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """Who sends what where. Segment (w, e) of the rows sent goes to expert e of rank w, segment (w, e) of the rows
    received came from rank w for expert e of this rank. All int32."""

    sent_counts_WE: Tensor
    sent_starts_WE: Tensor
    received_counts_WE: Tensor
    received_starts_WE: Tensor
    ends_E: Tensor  # the end of each expert's rows, padding included; at most the capacity
    needed: Tensor  # rows that would have been needed, (1,): more than the capacity where some were dropped
    num_rows: int
    capacity: int

    def check(self) -> None:
        """Raise if rows were dropped for want of capacity. Waits for the device."""
        needed = int(self.needed)
        if needed > self.capacity:
            raise RuntimeError(
                f"this rank's experts were sent {needed} rows, padding included, and had room for {self.capacity}: "
                f"the others were dropped; raise the capacity"
            )


class Exchange(Protocol):
    """What carries rows. None of its methods is differentiable: `dispatch` and `combine` are."""

    def route(self, rows_RD: Tensor, counts_WE: Tensor, capacity: int, align: int) -> tuple[Tensor, Route]:
        """Send rows, ordered by rank and expert, and return those received, by expert and then by rank."""
        ...

    def forth(self, rows_RD: Tensor, route: Route) -> Tensor:
        """Send other rows along a route that is known: (C, D), zeros in padding."""
        ...

    def back(self, rows_CD: Tensor, route: Route) -> Tensor:
        """Return to each rank what became of its rows, in their order; zeros for those that were dropped."""
        ...


def dispatch(
    exchange: Exchange, rows_RD: Tensor, counts_WE: Tensor, *, capacity: int, align: int = 1
) -> tuple[Tensor, Route]:
    """Send rows to the experts: returns (C, D) and the route.

    `rows_RD` is ordered by rank and, within, by expert; `counts_WE` (int32) says how many are for each. What is
    received is ordered by expert, then by the rank that sent it; each expert's rows begin at a multiple of `align`,
    with zeros in between. Rows after the last expert's are unspecified. What does not fit the capacity is dropped, and
    `Route.check()` says so. Differentiable: the gradient comes back the way that `combine` does.
    """
    if rows_RD.dim() != 2 or counts_WE.dim() != 2 or counts_WE.dtype != torch.int32:
        raise ValueError(
            f"dispatch() takes rows (R, D) and int32 counts (ranks, experts); got {tuple(rows_RD.shape)} and "
            f"{counts_WE.dtype} {tuple(counts_WE.shape)}"
        )
    if capacity < 1 or align < 1 or capacity % align:
        raise ValueError(f"dispatch() needs a capacity that is a multiple of align; got {capacity} and {align}")
    return _Dispatch.apply(rows_RD, exchange, counts_WE, capacity, align)


def combine(exchange: Exchange, rows_CD: Tensor, route: Route) -> Tensor:
    """Bring rows back to the ranks that sent them: (R, D), in the order in which they were sent. Differentiable."""
    if rows_CD.dim() != 2 or rows_CD.shape[0] != route.capacity:
        raise ValueError(f"combine() takes the {route.capacity} rows of this route; got shape {tuple(rows_CD.shape)}")
    return _Combine.apply(rows_CD, exchange, route)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, exchange: Exchange, counts_WE: Tensor, capacity: int, align: int
    ) -> tuple[Tensor, Route]:
        out, route = exchange.route(rows_RD, counts_WE, capacity, align)
        ctx.exchange, ctx.route = exchange, route
        return out, route

    @staticmethod
    def backward(ctx: Any, grad_CD: Tensor, _route: None):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.exchange.back(grad_CD, ctx.route), None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_CD: Tensor, exchange: Exchange, route: Route) -> Tensor:
        ctx.exchange, ctx.route = exchange, route
        return exchange.back(rows_CD, route)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.exchange.forth(grad_RD, ctx.route), None, None


def exclusive_starts(counts_WE: Tensor) -> Tensor:
    """Return where each segment begins when all lie one after the other, int32."""
    flat = counts_WE.flatten()
    return (flat.cumsum(0, dtype=torch.int32) - flat).view(counts_WE.shape)


def place_by_expert(counts_WE: Tensor, align: int) -> tuple[Tensor, Tensor]:
    """Return where segments (source, expert) begin when ordered by expert, and where experts end, with padding."""
    totals_E = counts_WE.sum(0, dtype=torch.int32)
    padded_E = (totals_E + align - 1) // align * align
    ends_E = padded_E.cumsum(0, dtype=torch.int32)
    before_WE = counts_WE.cumsum(0, dtype=torch.int32) - counts_WE
    return (ends_E - padded_E) + before_WE, ends_E


# ------------------------------------------------------------------------------------------------ plain collectives


class CollectiveExchange:
    """Rows between the ranks of a group by `all_to_all_single`."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def route(self, rows_RD: Tensor, counts_WE: Tensor, capacity: int, align: int) -> tuple[Tensor, Route]:
        """Exchange the counts, then the rows."""
        received = torch.empty_like(counts_WE)
        dist.all_to_all_single(received, counts_WE.contiguous(), group=self.group)
        if int(counts_WE.sum()) > rows_RD.shape[0]:
            raise ValueError(f"the counts name {int(counts_WE.sum())} rows, and there are {rows_RD.shape[0]}")
        starts, ends_E = place_by_expert(received, align)
        route = Route(
            counts_WE,
            exclusive_starts(counts_WE),
            (capacity - starts).clamp_min(0).minimum(received),
            starts,
            ends_E.clamp_max(capacity),
            ends_E[-1:],
            rows_RD.shape[0],
            capacity,
        )
        return self.forth(rows_RD, route, received), route

    def forth(self, rows_RD: Tensor, route: Route, received_WE: Tensor | None = None) -> Tensor:
        """Exchange rows and lay them out by expert."""
        sizes, places = self._layout(route, received_WE)
        sent = route.sent_counts_WE.sum(1).tolist()
        arrived = rows_RD.new_empty(sum(sizes), rows_RD.shape[1])
        dist.all_to_all_single(arrived, rows_RD[: sum(sent)].contiguous(), sizes, sent, group=self.group)
        out = rows_RD.new_zeros(route.capacity, rows_RD.shape[1])
        kept = places < route.capacity
        out[places[kept]] = arrived[kept]
        return out

    def back(self, rows_CD: Tensor, route: Route) -> Tensor:
        """Collect the rows by rank and exchange them."""
        sizes, places = self._layout(route, None)
        kept = (places < route.capacity)[:, None]
        leaving = rows_CD[places.clamp_max(route.capacity - 1)].where(kept, 0)
        sent = route.sent_counts_WE.sum(1).tolist()
        out = rows_CD.new_zeros(route.num_rows, rows_CD.shape[1])
        dist.all_to_all_single(out[: sum(sent)], leaving, sent, sizes, group=self.group)
        return out

    def _layout(self, route: Route, received_WE: Tensor | None) -> tuple[list[int], Tensor]:
        """Return how many rows each rank sends here, and where each of them goes; at or after the capacity: nowhere."""
        if received_WE is None:
            received_WE = torch.empty_like(route.sent_counts_WE)
            dist.all_to_all_single(received_WE, route.sent_counts_WE.contiguous(), group=self.group)
        counts = received_WE.flatten().long()
        segment = torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        within = torch.arange(segment.numel(), device=counts.device) - first[segment]
        return received_WE.sum(1).tolist(), route.received_starts_WE.flatten().long()[segment] + within


# ------------------------------------------------------------------------------------------------ symmetric memory


@dataclass(frozen=True)
class SharedMemory:
    """Memory that all ranks can address: this rank's own, bytes and zero at first, and the address of everyone's."""

    own: Tensor  # uint8
    addresses_W: Tensor  # int64, on the device: where this rank sees each rank's memory


def allocate(num_bytes: int, group: dist.ProcessGroup | None = None) -> SharedMemory:
    """Allocate memory on this rank's GPU that the node's other GPUs can address; all ranks of the group together."""
    import torch.distributed._symmetric_memory as symmetric

    group = dist.group.WORLD if group is None else group
    device = torch.device("cuda", torch.cuda.current_device())
    own = symmetric.empty(num_bytes, dtype=torch.uint8, device=device)
    handle = symmetric.rendezvous(own, group)  # pyright: ignore[reportArgumentType]: a group's name or the group
    own.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group)  # nobody signals before everyone's signals are zero
    return SharedMemory(own, torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device))


@dataclass(frozen=True)
class Layout:
    """Where things lie in a rank's memory, in bytes: the rounds that peers announced, two slots of tables, of rows.

    Slots are taken in turn. A rank writes a slot again two rounds later, when every peer has announced the round in
    between, which it does after it has read the slot: so one announcement a round is enough.
    """

    world: int
    experts: int
    rows: int
    row_bytes: int

    @property
    def tables_at(self) -> int:
        """Return where the tables begin: of each slot, counts (W, E) and starts (W, E), int32."""
        return -(-8 * self.world // 128) * 128

    @property
    def rows_at(self) -> int:
        """Return where the rows begin: of each slot, `rows` times `row_bytes`."""
        return -(-(self.tables_at + 2 * 8 * self.world * self.experts) // 128) * 128

    @property
    def slot_bytes(self) -> int:
        """Return the bytes of the rows of a slot."""
        return -(-self.rows * self.row_bytes // 128) * 128

    @property
    def total(self) -> int:
        """Return how much memory a rank needs."""
        return self.rows_at + 2 * self.slot_bytes


class SymmetricExchange:
    """Rows between the GPUs of a node, through memory that all of them address.

    `rows` is the most that a rank publishes at once: those that it sends, and the capacity of those it receives. All
    ranks must make the same calls in the same order, on one stream. No kernel writes outside this rank's own memory but
    for the announcement of a round, and no index is trusted: counts and starts that peers publish are clamped.
    """

    def __init__(self, memory: SharedMemory, layout: Layout, rank: int) -> None:
        if memory.own.numel() < layout.total:
            raise ValueError(f"the exchange needs {layout.total} bytes of shared memory; got {memory.own.numel()}")
        if memory.addresses_W.numel() != layout.world or not 0 <= rank < layout.world:
            raise ValueError(f"rank {rank} of {layout.world} got the addresses of {memory.addresses_W.numel()} ranks")
        if memory.own.data_ptr() % 128:
            raise ValueError("the shared memory must begin at a multiple of 128 bytes: the kernels move 16 at once")
        self.memory, self.layout, self.rank = memory, layout, rank
        self.round = torch.zeros(1, dtype=torch.int64, device=memory.own.device)

    @classmethod
    def make(
        cls, *, rows: int, width: int, dtype: torch.dtype, num_experts: int, group: dist.ProcessGroup | None = None
    ) -> SymmetricExchange:
        """Allocate an exchange of `rows` rows of `width` numbers for a group whose ranks hold `num_experts` each.

        All ranks ask together, and for the same: a rank finds its peers' rows where its own would lie.
        """
        layout = Layout(dist.get_world_size(group), num_experts, rows, width * dtype.itemsize)
        asked: list[Any] = [None] * layout.world
        dist.all_gather_object(asked, layout, group)
        for rank, theirs in enumerate(asked):
            if theirs != layout:
                raise ValueError(f"all ranks must ask for the same exchange: here {layout}, on rank {rank} {theirs}")
        return cls(allocate(layout.total, group), layout, dist.get_rank(group))

    def route(self, rows_RD: Tensor, counts_WE: Tensor, capacity: int, align: int) -> tuple[Tensor, Route]:
        """Publish rows and counts, and pull what is for this rank's experts."""
        from titan_kernels import all_to_all_kernels as kernels

        self._check(rows_RD, capacity)
        if counts_WE.shape != (self.layout.world, self.layout.experts):
            raise ValueError(
                f"this exchange takes counts of shape {(self.layout.world, self.layout.experts)}; got "
                f"{tuple(counts_WE.shape)}"
            )
        counts_WE = counts_WE.contiguous()
        starts_WE = exclusive_starts(counts_WE)
        empty = torch.empty_like(counts_WE)
        ends_E, needed = empty.new_empty(self.layout.experts), empty.new_empty(1)
        route = Route(counts_WE, starts_WE, empty, torch.empty_like(empty), ends_E, needed, rows_RD.shape[0], capacity)
        kernels.publish(self, rows_RD, counts_WE, starts_WE)
        return kernels.pull(self, rows_RD, route, align=align, forth=True, place=True), route

    def forth(self, rows_RD: Tensor, route: Route) -> Tensor:
        """Publish rows along a known route and pull those for this rank's experts."""
        from titan_kernels import all_to_all_kernels as kernels

        self._check(rows_RD, route.capacity)
        kernels.publish(self, rows_RD, route.sent_counts_WE, route.sent_starts_WE)
        return kernels.pull(self, rows_RD, route, align=1, forth=True, place=False)

    def back(self, rows_CD: Tensor, route: Route) -> Tensor:
        """Publish what the experts made of the rows, and pull those that this rank had sent."""
        from titan_kernels import all_to_all_kernels as kernels

        self._check(rows_CD, route.num_rows)
        kernels.publish(self, rows_CD, route.received_counts_WE, route.received_starts_WE)
        return kernels.pull(self, rows_CD, route, align=1, forth=False, place=False)

    def _check(self, rows: Tensor, coming: int) -> None:
        row_bytes = rows.shape[1] * rows.element_size()
        if row_bytes != self.layout.row_bytes:
            raise ValueError(f"this exchange carries rows of {self.layout.row_bytes} bytes; got {row_bytes}")
        if max(rows.shape[0], coming) > self.layout.rows:
            raise ValueError(
                f"this exchange carries {self.layout.rows} rows at once; got {rows.shape[0]}, and {coming} to come back"
            )
