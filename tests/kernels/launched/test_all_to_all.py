"""Rows to experts and back through shared memory, against plain collectives: uneven, empty, clipped, many rounds."""

import pytest
import torch
from titan_kernels import all_to_all_kernels as kernels
from titan_kernels.all_to_all import (
    CollectiveExchange,
    Layout,
    Route,
    SharedMemory,
    SymmetricExchange,
    combine,
    dispatch,
    exclusive_starts,
    place_by_expert,
)
from titan_kernels.launch import interpreting
from torch import Tensor

from tests.ranks import run_ranks

WORLD, EXPERTS, ROUNDS = 3, 2, 3


def exchanges(layout: Layout, device: torch.device) -> list[SymmetricExchange]:
    """Return one exchange a rank over memory that this process, and what it forks, can address."""
    memory = [torch.zeros(layout.total + 128, dtype=torch.uint8, device=device) for _ in range(layout.world)]
    if device.type == "cpu":
        memory = [x.share_memory_() for x in memory]
    memory = [x[-x.data_ptr() % 128 :][: layout.total] for x in memory]
    addresses = torch.tensor([x.data_ptr() for x in memory], dtype=torch.int64, device=device)
    return [SymmetricExchange(SharedMemory(x, addresses), layout, rank) for rank, x in enumerate(memory)]


def counts_of(round_number: int, most: int = 9) -> Tensor:
    """Return how many rows each rank sends to each expert of each rank: (sender, rank, expert); some send none."""
    dice = torch.Generator().manual_seed(round_number)
    counts = torch.randint(most, (WORLD, WORLD, EXPERTS), generator=dice, dtype=torch.int32)
    counts[torch.rand(WORLD, WORLD, EXPERTS, generator=dice) < 0.4] = 0
    counts[round_number % WORLD] *= round_number % 2
    return counts


def rows_of(counts_WE: Tensor, sender: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return rows that tell who sent them, and which they are."""
    rows = torch.arange(int(counts_WE.sum()) * width).reshape(-1, width) + 1000 * sender
    return (rows % 251).to(dtype)


# ------------------------------------------------------------------------------------------------ one process


@pytest.mark.parametrize(
    ("dtype", "width", "align", "rounds"),
    [(torch.bfloat16, 8, 1, 3), (torch.float32, 4200, 1, 1), (torch.uint8, 7, 4, 2), (torch.bfloat16, 5, 8, 1)],
    ids=str,
)
def test_each_rank_gets_its_rows_by_expert(
    device: torch.device, dtype: torch.dtype, width: int, align: int, rounds: int
) -> None:
    ranks = exchanges(Layout(WORLD, EXPERTS, 256, width * dtype.itemsize), device)
    for number in range(rounds):
        counts = counts_of(number)
        sent = [rows_of(counts[rank], rank, width, dtype) for rank in range(WORLD)]
        received = phased(ranks, sent, counts, capacity=128, align=align)
        for rank, (rows, route) in enumerate(received):
            expected, ends = by_expert(sent, counts, rank, align)
            assert torch.equal(route.ends_E.cpu(), ends)
            assert torch.equal(rows[: len(expected)].cpu(), expected)
            assert int(route.needed) == len(expected)
            route.check()
        returned = phased_back(ranks, [rows for rows, _ in received], [route for _, route in received])
        for mine, back in zip(sent, returned, strict=True):
            assert torch.equal(mine, back.cpu())


def phased(
    ranks: list[SymmetricExchange], sent: list[Tensor], counts: Tensor, capacity: int, align: int
) -> list[tuple[Tensor, Route]]:
    """Publish on every rank, then pull on every rank: programs of one process must not wait for later ones."""
    device = ranks[0].round.device
    routes = []
    for rank, exchange in enumerate(ranks):
        mine = counts[rank].to(device)
        empty = torch.full_like(mine, -1)
        route = Route(
            mine, exclusive_starts(mine), empty, empty.clone(), empty[0].clone(), empty[0, :1].clone(),
            len(sent[rank]), capacity,
        )  # fmt: skip
        kernels.publish(exchange, sent[rank].to(device), mine, route.sent_starts_WE)
        routes.append(route)
    like = [x.to(device) for x in sent]
    pulled = [
        kernels.pull(exchange, x, route, align=align, forth=True, place=True)
        for exchange, x, route in zip(ranks, like, routes, strict=True)
    ]
    return list(zip(pulled, routes, strict=True))


def phased_back(ranks: list[SymmetricExchange], rows: list[Tensor], routes: list[Route]) -> list[Tensor]:
    for exchange, x, route in zip(ranks, rows, routes, strict=True):
        kernels.publish(exchange, x, route.received_counts_WE, route.received_starts_WE)
    return [
        kernels.pull(exchange, x, route, align=1, forth=False, place=False)
        for exchange, x, route in zip(ranks, rows, routes, strict=True)
    ]


def by_expert(sent: list[Tensor], counts: Tensor, rank: int, align: int) -> tuple[Tensor, Tensor]:
    """Return what a rank's experts should receive, padding included, and where each one's rows end."""
    pieces, ends = [], []
    for expert in range(EXPERTS):
        for sender in range(WORLD):
            before = int(counts[sender].flatten()[: rank * EXPERTS + expert].sum())
            pieces.append(sent[sender][before : before + int(counts[sender, rank, expert])])
        missing = -sum(map(len, pieces)) % align
        pieces.append(torch.zeros(missing, sent[0].shape[1], dtype=sent[0].dtype))
        ends.append(sum(map(len, pieces)))
    return torch.cat(pieces), torch.tensor(ends, dtype=torch.int32)


def test_what_does_not_fit_is_dropped_and_nothing_is_written_elsewhere(device: torch.device) -> None:
    width, capacity = 4, 6
    ranks = exchanges(Layout(WORLD, EXPERTS, 64, 2 * width), device)
    counts = torch.full((WORLD, WORLD, EXPERTS), 2, dtype=torch.int32)  # 12 rows for every rank
    sent = [1 + rows_of(counts[rank], rank, width, torch.bfloat16) for rank in range(WORLD)]
    before = [exchange.memory.own[exchange.layout.rows_at :].clone() for exchange in ranks]
    received = phased(ranks, sent, counts, capacity=capacity, align=1)
    for rank, (rows, route) in enumerate(received):
        expected, _ = by_expert(sent, counts, rank, 1)
        assert torch.equal(rows.cpu(), expected[:capacity])
        assert int(route.ends_E.max()) == capacity
        with pytest.raises(RuntimeError, match="sent 12 rows, padding included, and had room for 6"):
            route.check()
    returned = phased_back(ranks, [rows for rows, _ in received], [route for _, route in received])
    for rank, back in enumerate(returned):
        kept = back.cpu() != 0
        assert torch.equal(back.cpu(), sent[rank].where(kept, 0))
        assert kept.any(1).sum() == WORLD * 2  # of 12 rows, the 2 for the first expert of each rank
    for exchange, old in zip(ranks, before, strict=True):  # a slot's unused rows are as they were
        unused = slice(12 * 2 * width, exchange.layout.slot_bytes)
        assert torch.equal(exchange.memory.own[exchange.layout.rows_at :][unused], old[unused])


def test_tables_that_lie_move_nothing_out_of_bounds(device: torch.device) -> None:
    """Counts far too large, and negative ones: clamped where they are published and where they are read."""
    width = 4
    ranks = exchanges(Layout(WORLD, EXPERTS, 16, 4 * width), device)
    counts = torch.full((WORLD, WORLD, EXPERTS), 1 << 29, dtype=torch.int32)
    counts[1] = -5
    sent = [torch.full((8, width), float(rank + 1)) for rank in range(WORLD)]
    for rows, route in phased(ranks, sent, counts, capacity=16, align=1):
        assert rows.shape == (16, width)
        assert int(route.ends_E.max()) <= 16
        assert (route.received_counts_WE >= 0).all()
        assert (route.received_counts_WE + route.received_starts_WE <= 16 + 8).all()


# ------------------------------------------------------------------------------------------------ processes


def one_rank(ranks: list[SymmetricExchange], capacity: int, align: int) -> list[tuple[Tensor, ...]]:
    """Send rows forth and back for some rounds, with gradients, both ways of exchanging; return what each gave."""
    rank = torch.distributed.get_rank()
    found = []
    for number in range(ROUNDS):
        counts = counts_of(number)[rank]
        rows = torch.randn(int(counts.sum()), 6, generator=torch.Generator().manual_seed(10 * number + rank))
        for exchange in (ranks[rank], CollectiveExchange()):
            leaf = rows.clone().requires_grad_()
            received, route = dispatch(exchange, leaf, counts, capacity=capacity, align=align)
            back = combine(exchange, torch.tanh(received * (rank + 1)), route)
            (grad,) = torch.autograd.grad(back.square().sum(), leaf)
            end = int(route.ends_E[-1])
            found.append((received.detach()[:end], route.ends_E, route.needed, back.detach(), grad))
    return found


@pytest.mark.skipif(not interpreting(), reason="ranks are forked, and share the memory of a CPU")
@pytest.mark.parametrize(("capacity", "align"), [(64, 8), (16, 2)])
def test_processes_exchange_as_plain_collectives_do(capacity: int, align: int) -> None:
    ranks = exchanges(Layout(WORLD, EXPERTS, 64, 4 * 6), torch.device("cpu"))
    for found in run_ranks(one_rank, WORLD, ranks, capacity, align, timeout=60):
        for mine, plain in zip(found[0::2], found[1::2], strict=True):
            for a, b in zip(mine, plain, strict=True):
                assert torch.equal(a, b)


def _ask_for_different_rows() -> str:
    rank = torch.distributed.get_rank()
    with pytest.raises(ValueError, match="must ask for the same exchange") as caught:
        SymmetricExchange.make(rows=8 + rank, width=4, dtype=torch.float32, num_experts=1)
    return str(caught.value)


@pytest.mark.skipif(not interpreting(), reason="ranks are forked")
def test_ranks_that_ask_for_different_exchanges_are_told() -> None:
    assert "rows=9" in run_ranks(_ask_for_different_rows, 2)[0]


def test_segments_are_placed_by_expert_then_by_source() -> None:
    starts, ends = place_by_expert(torch.tensor([[3, 0], [2, 5]], dtype=torch.int32), 4)
    assert starts.tolist() == [[0, 8], [3, 8]]
    assert ends.tolist() == [8, 16]
