"""Balance of experts: how many tokens each got in a step, and what follows from it.

Shape letters: L mixtures of the whole model, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_core.config.layout import Layout
from titan_core.config.schema import Config
from titan_core.declare.family import Family
from titan_core.nn.experts import Experts, choose_backend
from titan_core.nn.moe import Router
from titan_core.parallel.data_parallel import DTYPES
from titan_core.parallel.expert import DROPPED
from titan_core.parallel.mesh import Mesh
from titan_core.runtime.errors import RunFailed


@dataclass
class Balance:
    """The routers on this rank, by their number among all of the model's.

    `mine` is whether this rank's counts are its own: tensor-parallel ranks that see the same tokens count the same.
    `penalties` are the losses of balance that are on, by their places in the routers' sums over `sequences` a step.
    """

    routers: dict[int, Router]
    dropped: list[Tensor]
    shape: tuple[int, int]
    mine: bool
    penalties: dict[str, int]
    sequences: int
    loads_LE: Tensor | None = None
    sums: Tensor | None = None

    def collect(self) -> None:
        """Add up what all ranks have counted since the last time; the counts begin anew."""
        count, experts = self.shape
        if not count:
            return
        device = next(iter(self.routers.values())).tally_E.device if self.routers else torch.device("cpu")
        totals = torch.zeros(count * experts + 3, device=device)
        for number, router in self.routers.items():
            if self.mine:
                totals[number * experts : (number + 1) * experts] = router.tally_E
                totals[-3:-1] += router.penalties
            router.tally_E.zero_()
            router.penalties.zero_()
        for rows in self.dropped:
            totals[-1:] += rows
            rows.zero_()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(totals)
        self.loads_LE, self.sums = totals[:-3].view(count, experts), totals[-3:-1]
        self._refuse(totals[-1])

    def _refuse(self, dropped: Tensor) -> None:
        """Rows are dropped only by ways to travel that have room for a fixed number of them."""
        if self.dropped and dropped.item():
            raise RunFailed(
                f"{dropped.item():.0f} rows found no room at their experts, and the step would be wrong",
                where="parallelism.expert_parallel_capacity",
                tip="raise it, or set parallelism.expert_parallel_dispatch to `alltoall`",
            )

    @torch.no_grad()
    def update(self) -> None:
        """Raise the biases of experts that had too few tokens, lower the others' (Wang et al. 2024), so that their sum
        stays; remember the loads where a loss wants them."""
        for number, router in self.routers.items():
            assert self.loads_LE is not None
            load_E, sizes = self.loads_LE[number], router.sizes
            if sizes.load_balance_coeff:
                delta_E = sizes.load_balance_coeff * (load_E.mean() - load_E).sign()
                router.expert_bias += delta_E - delta_E.mean()
            if sizes.global_balance_loss:
                router.last_load.copy_(load_E)

    def metrics(self) -> dict[str, float]:
        """Return the load of the busiest expert relative to the mean (of the worst mixture, and on average), and the
        entropy of the loads relative to that of equal ones; and the losses of balance, weighed, the mean over sequences
        of the sum over mixtures."""
        if self.loads_LE is None or self.sums is None:
            return {}
        shares_LE = self.loads_LE / self.loads_LE.sum(1, keepdim=True).clamp(min=1)
        most_L = shares_LE.amax(1) * self.shape[1]
        entropy_L = torch.special.entr(shares_LE).sum(1) / max(math.log(self.shape[1]), 1e-9)
        shown = torch.stack((most_L.max(), most_L.mean(), entropy_L.mean(), *(self.sums / self.sequences)))
        worst, mean, entropy, *losses = shown.tolist()
        return {
            "experts/max_load": worst,
            "experts/mean_max_load": mean,
            "experts/entropy": entropy,
            "experts/dropped": 0,
            **{f"experts/{name}": losses[place] for name, place in self.penalties.items()},
        }


def prepare(
    models: Sequence[nn.Module], family: Family, sizes: Any, config: Config, mesh: Mesh, global_batch: int
) -> Balance:
    """Find the routers of a laid-out model, and tell them what their losses are multiplied with."""
    names = [p.name.removesuffix(".gate.weight") for p in family.parameters(sizes) if p.role == "router"]
    numbers = {name: number for number, name in enumerate(names)}
    found = {numbers[n]: m for model in models for n, m in model.named_modules() if isinstance(m, Router)}
    layout = mesh.layout
    for router in found.values():
        router.penalty_scale = _penalty_scale(layout, global_batch)
        router.evenly = config.training.debug_moe_force_load_balance
    dropped = [b for model in models for n, b in model.named_buffers() if n.endswith(f".{DROPPED}")]
    experts = next(iter(found.values())).sizes.num_experts if found else getattr(sizes, "num_experts", 0)
    mine = layout.routed_by_parts or mesh.at["tp"] == 0
    kinds = ("sequence_balance_loss", "global_balance_loss")
    penalties = {name: place for place, name in enumerate(kinds) if getattr(sizes, name, 0)}
    return Balance(found, dropped, (len(names), experts), mine, penalties, global_batch)


def _penalty_scale(layout: Layout, global_batch: int) -> float:
    """Return what makes of a sum over a rank's sequences the mean over all of the batch: gradients are averaged over
    data ranks, and added over tensor-parallel ranks, each of which has the whole loss where it has whole sequences."""
    again = 1 if layout.routed_by_parts else layout.tp
    return layout.dp * layout.cp / (global_batch * again)


def set_backend(model: nn.Module, config: Config, device: torch.device) -> list[str]:
    """Choose how products of experts are formed, and say so."""
    layers = [m for m in model.modules() if isinstance(m, Experts)]
    if not layers:
        return []
    dtype = DTYPES[config.training.mixed_precision_param]
    there = device.type == "cuda" and torch.cuda.is_available()  # a plan may be for a GPU that is not
    capability = torch.cuda.get_device_capability(device)[0] if there else None
    backend, why = choose_backend(config.training.expert_backend, device.type, dtype, capability)
    for layer in layers:
        layer.backend = backend
    return [f"experts by {backend} ({why})"]
