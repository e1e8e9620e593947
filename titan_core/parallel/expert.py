"""Expert parallelism: experts are split over ranks, and tokens travel to them and back.

The ranks are those that otherwise hold other data (or other parts of the stream); a rank's experts are then sharded by
FSDP over the ranks that hold the same ones. Three ways to travel:

- `alltoall`: each row goes to the rank of its expert and back. What a rank will get is not known before the ranks have
  told each other, and the host waits for that once a layer.
- `symmetric`: ranks of a node pull rows from memory that all their GPUs address. Nobody waits; there is room for a
  fixed number of rows, and what does not fit is counted, so that the step can be refused.
- `allgather`: every rank gets the tokens of all, works on those that its experts want, and the partial sums are added
  while they are scattered back. Nobody waits, with as much room.

Shape letters: N tokens of a rank, A of all ranks, K choices, R rows, P ranks, L experts of a rank, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from titan_kernels.all_to_all import CollectiveExchange, Exchange, SymmetricExchange, combine, dispatch
from titan_kernels.permutation import Placement, permute, place, placement_rows, unpermute
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from titan_core.declare.sharding import Sharding, matches
from titan_core.nn.moe import tally
from titan_core.nn.planning import planning
from titan_core.parallel.exchange import AllToAllUneven, Gather, Scaled, Scatter, all_gather, all_reduce, all_to_all
from titan_core.parallel.mesh import Mesh
from titan_core.parallel.views import split, wrap_forward

DROPPED = "dropped_rows"  # the buffer of experts that counts rows for which there was no room


def apply(model: nn.Module, sharding: Sharding, mesh: Mesh, way: str, capacity: float) -> None:
    """Split the experts of a model on the meta device, each also by tensor parallelism where the layout says so."""
    inner = mesh.layout.expert_tp
    axes = mesh.experts["ep", "expert_tp"] if inner > 1 else mesh.experts["ep"]
    # gradients of experts are sums over the tokens of all data ranks, and averaged over those alone that share them
    share = mesh.layout.expert_fsdp / mesh.layout.fsdp
    group, size, rank = mesh.experts["ep"].get_group(), mesh.layout.ep, mesh.experts["ep"].get_local_rank()
    exchanges = Exchanges(group)
    for name, module in model.named_modules():
        if not matches(name, sharding.experts):
            continue
        for part_name, part in module.named_modules():
            dim = sharding.split_dim(f"{name}.{part_name}")
            for parameter_name in list(part._parameters):
                split(
                    part, parameter_name, axes, [0, dim] if inner > 1 else [0], lambda local: Scaled.apply(local, share)
                )
        if way != "alltoall":
            module.register_buffer(DROPPED, torch.zeros(1), persistent=False)
        if way == "allgather":
            wrap_forward(module, _gathered(module, group, size, rank, capacity))
        elif way == "symmetric":
            wrap_forward(module, _pulled(module, exchanges, size, capacity))
        else:
            wrap_forward(module, _sent(module, group, size))


def count_whole_sequences(model: nn.Module, sharding: Sharding, group: ProcessGroup) -> None:
    """Add up what parts of the same sequences, on the ranks of a group, send to each expert."""
    for name, module in model.named_modules():
        if matches(name, sharding.loads):
            wrap_forward(module, lambda forward, *args: all_reduce(forward(*args), group))


def _sent(module: Any, group: ProcessGroup, size: int) -> Callable[..., Tensor]:
    def around(forward: Callable[..., Tensor], x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
        placement = place(chosen_NK, module.held * size)
        mine_PL = placement.counts_E.view(size, -1)
        theirs_PL = all_to_all(mine_PL, group)
        sent, received = _numbers(mine_PL, theirs_PL, chosen_NK.numel())
        x_RD = AllToAllUneven.apply(permute(x_ND, placement), sent, received, group)
        every_L = torch.arange(mine_PL.shape[1], device=x_RD.device)
        whose_R = every_L.repeat(size).repeat_interleave(theirs_PL.flatten(), output_size=sum(received))
        y_RD = AllToAllUneven.apply(forward(x_RD, whose_R[:, None], None), received, sent, group)
        return unpermute(y_RD, placement, weights_NK)

    return around


def _numbers(mine_PL: Tensor, theirs_PL: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """Return how many rows go to each rank and come from it; in a plan, which knows no numbers, equally many."""
    size = mine_PL.shape[0]
    if planning():
        equal = [rows * (rank + 1) // size - rows * rank // size for rank in range(size)]
        return equal, equal
    sent, received = torch.stack((mine_PL.sum(1), theirs_PL.sum(1))).tolist()
    return sent, received


class Exchanges:
    """What carries rows between the ranks of a group: one exchange, of all layers, for each shape that comes.

    Where there is no GPU, plain collectives do what the shared memory does, and wait.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.known: dict[tuple[int, int, int, torch.dtype], Exchange] = {}

    def of(self, rows_RD: Tensor, num_experts: int, capacity: int) -> Exchange:
        """Return the exchange for rows to be sent, and room for those received."""
        if rows_RD.device.type != "cuda":
            return CollectiveExchange(self.group)
        rows, width = max(rows_RD.shape[0], capacity), rows_RD.shape[1]
        key = rows, width, num_experts, rows_RD.dtype
        if key not in self.known:
            self.known[key] = SymmetricExchange.make(
                rows=rows, width=width, dtype=rows_RD.dtype, num_experts=num_experts, group=self.group
            )
        return self.known[key]


def _pulled(module: Any, exchanges: Exchanges, size: int, capacity: float) -> Callable[..., Tensor]:
    in_a_plan = _sent(module, exchanges.group, size)  # which holds as much, and knows no numbers to lay out

    def around(forward: Callable[..., Tensor], x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
        if planning():
            return in_a_plan(forward, x_ND, chosen_NK, weights_NK)
        placement = place(chosen_NK, module.held * size)
        room = placement_rows(math.ceil(min(capacity, size) * chosen_NK.numel()), module.held, module.align)
        rows_RD = permute(x_ND, placement)
        exchange = exchanges.of(rows_RD, module.held, room)
        counts_PL = placement.counts_E.view(size, -1)
        rows_CD, route = dispatch(exchange, rows_RD, counts_PL, capacity=room, align=module.align)
        tally(module.get_buffer(DROPPED), (route.needed[None] - room).clamp(min=0))
        return unpermute(combine(exchange, module.mlp(rows_CD, route.ends_E), route), placement, weights_NK)

    return around


def _gathered(module: Any, group: ProcessGroup, size: int, rank: int, capacity: float) -> Callable[..., Tensor]:
    def around(_: Callable[..., Tensor], x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
        held = module.held
        x_AD = Gather.apply(x_ND, 0, group)
        weights_AK = None if weights_NK is None else Gather.apply(weights_NK, 0, group)
        local_AK = all_gather(chosen_NK, 0, group) - rank * held  # those of others are dropped
        rows = min(local_AK.numel(), math.ceil(capacity * chosen_NK.numel()))
        room = placement_rows(rows, held, module.align)
        placement, lost = _within(place(local_AK, held, module.align), room)
        tally(module.get_buffer(DROPPED), lost[None, None])
        return Scatter.apply(module.visit(x_AD, placement, weights_AK), 0, group)

    return around


def _within(placement: Placement, room: int) -> tuple[Placement, Tensor]:
    """Return the first `room` rows of a placement, and how many rows that are somebody's were lost."""
    counts_E, ends_E, row_TK, source_R = placement
    kept = Placement(counts_E, ends_E.clamp(max=room), row_TK.where(row_TK < room, -1), source_R[:room])
    return kept, (ends_E[-1] - room).clamp(min=0)
