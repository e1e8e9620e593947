"""Collectives between the ranks of a job, by size: how much each one's links carry.

Bus bandwidth is what every rank must send at least, over the time: it compares with a link's rate whatever the number
of ranks n. all_reduce sends 2 (n-1)/n of its buffer, all_gather and reduce_scatter (n-1)/n of the whole, all_to_all
(n-1)/n of what a rank has (the definitions of NVIDIA's nccl-tests). `experts` is what expert parallelism does with an
all_to_all: counts, rows, and rows in the order of the experts; `experts_symmetric` the same through memory that the
GPUs of a node share.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from titan_kernels.all_to_all import CollectiveExchange, Exchange, SymmetricExchange, dispatch
from torch import Tensor

from titan_core.jobs.bench.case import Absent
from titan_core.runtime.distributed import World
from titan_core.runtime.errors import RunFailed
from titan_core.runtime.events import Listener, Note, silent

# torch 2.14 renamed them; the old names go when 2.13 is no longer supported
_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_from: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_ROW = 1024  # numbers of a row that goes to an expert: 4 KiB
_CALLS = 20
_WARM_UP = 3


@dataclass(frozen=True)
class CollectiveRow:
    """One collective at one size: medians over calls of the slowest rank's seconds. `size` is the whole buffer's bytes:
    what is gathered, reduced or exchanged, on one rank."""

    name: str
    size: int
    seconds: float
    bus_gigabytes_per_second: float


@dataclass(frozen=True)
class CollectiveReport:
    """What was measured, between whom."""

    device: str
    backend: str
    ranks: int
    rows: list[CollectiveRow]
    absent: dict[str, str]


@dataclass(frozen=True)
class _Collective:
    """`share` of the buffer that a rank must send, by the number of ranks; `make` returns the call and its check."""

    share: Callable[[int], float]
    make: Callable[[Tensor, World], tuple[Callable[[], object], Callable[[], bool]]]


def run(world: World, *, largest: int = 1 << 26, listener: Listener = silent) -> CollectiveReport:
    """Check and time every collective at sizes from 64 KiB up, by fours, on all ranks of the job."""
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    rows: list[CollectiveRow] = []
    absent: dict[str, str] = {}
    size = 1 << 16
    while size <= largest:
        for collective in COLLECTIVES:
            listener(Note(f"{collective} {size >> 10} KiB"))
            try:
                rows.append(_measure(collective, size, world))
            except Absent as reason:  # known before any rank communicates, and the same on all
                absent[collective] = str(reason)
        size *= 4
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    return CollectiveReport(name, backend, world.size, rows, absent)


def _measure(name: str, size: int, world: World) -> CollectiveRow:
    collective = COLLECTIVES[name]
    unit = _ROW * world.size  # numbers: whole rows for everybody
    count = max(1, size // 4 // unit) * unit
    buffer = torch.full((count,), float(world.rank + 1), device=world.device)
    call, right = collective.make(buffer, world)
    call()
    agreed = torch.tensor([float(right())], device=world.device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    if not agreed.item():
        raise RunFailed(
            f"{name} of {size} bytes gave a wrong result on a rank", tip="`titan doctor` looks at the links"
        )
    for _ in range(_WARM_UP):
        call()
    taken = []
    for _ in range(_CALLS):
        dist.barrier()
        _wait(world.device)
        began = time.perf_counter()
        call()
        _wait(world.device)
        taken.append(time.perf_counter() - began)
    times = torch.tensor(taken, dtype=torch.float64, device=world.device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    seconds = statistics.median(times.tolist())
    return CollectiveRow(name, count * 4, seconds, collective.share(world.size) * count * 4 / seconds / 1e9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _all_reduce(buffer: Tensor, world: World) -> tuple[Callable[[], object], Callable[[], bool]]:
    first = buffer.clone()
    dist.all_reduce(first)
    total = world.size * (world.size + 1) / 2
    return lambda: dist.all_reduce(buffer), lambda: bool((first == total).all())


def _all_gather(buffer: Tensor, world: World) -> tuple[Callable[[], object], Callable[[], bool]]:
    own, whole = buffer[: buffer.numel() // world.size].clone(), torch.zeros_like(buffer)
    expected = torch.arange(1, world.size + 1, device=buffer.device).repeat_interleave(own.numel())
    return lambda: _gather_into(whole, own), lambda: bool((whole == expected).all())


def _reduce_scatter(buffer: Tensor, world: World) -> tuple[Callable[[], object], Callable[[], bool]]:
    own = torch.zeros_like(buffer[: buffer.numel() // world.size])
    total = world.size * (world.size + 1) / 2
    return lambda: _scatter_from(own, buffer), lambda: bool((own == total).all())


def _all_to_all(buffer: Tensor, world: World) -> tuple[Callable[[], object], Callable[[], bool]]:
    received = torch.zeros_like(buffer)
    part = buffer.numel() // world.size
    expected = torch.arange(1, world.size + 1, device=buffer.device).repeat_interleave(part)
    return lambda: dist.all_to_all_single(received, buffer), lambda: bool((received == expected).all())


def _experts(
    buffer: Tensor, world: World, exchange: Exchange | None = None
) -> tuple[Callable[[], object], Callable[[], bool]]:
    """Send equal parts to all ranks, of which the experts get a half, two quarters and nothing."""
    exchange = CollectiveExchange() if exchange is None else exchange
    rows = buffer.view(-1, _ROW)
    part = rows.shape[0] // world.size
    shares = [part // 2, part // 4, part - part // 2 - part // 4, 0]
    counts = torch.tensor([shares] * world.size, dtype=torch.int32, device=buffer.device)
    sender = torch.arange(1, world.size + 1, device=buffer.device)
    expected = torch.cat([sender.repeat_interleave(share) for share in shares])

    def call() -> Tensor:
        return dispatch(exchange, rows, counts, capacity=rows.shape[0])[0]

    return call, lambda: bool((call() == expected[:, None]).all())


def _experts_symmetric(buffer: Tensor, world: World) -> tuple[Callable[[], object], Callable[[], bool]]:
    if world.device.type != "cuda":
        raise Absent("memory that devices share needs GPUs")
    if world.local_size != world.size:
        raise Absent("memory that devices share needs one host")
    rows = buffer.numel() // _ROW
    exchange = SymmetricExchange.make(rows=rows, width=_ROW, dtype=buffer.dtype, num_experts=4)
    return _experts(buffer, world, exchange)


COLLECTIVES = {
    "all_gather": _Collective(lambda n: (n - 1) / n, _all_gather),
    "reduce_scatter": _Collective(lambda n: (n - 1) / n, _reduce_scatter),
    "all_to_all": _Collective(lambda n: (n - 1) / n, _all_to_all),
    "all_reduce": _Collective(lambda n: 2 * (n - 1) / n, _all_reduce),
    "experts": _Collective(lambda n: (n - 1) / n, _experts),
    "experts_symmetric": _Collective(lambda n: (n - 1) / n, _experts_symmetric),
}
