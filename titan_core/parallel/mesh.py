"""The device mesh: the only place that names its axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from titan_core.config.schema import Parallelism
from titan_core.runtime.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism with nothing left open; their product is the number of ranks."""

    dp_replicate: int = 1
    dp_shard: int = 1

    @staticmethod
    def of(config: Parallelism, world_size: int) -> Layout:
        """Resolve the degrees of a config for a number of ranks; raises `UsageError` where they do not fit."""
        replicate, shard = config.data_parallel_replicate_degree, config.data_parallel_shard_degree
        if shard == -1:
            shard = world_size // replicate
        if shard < 1 or replicate * shard != world_size:
            raise UsageError(
                f"{world_size} ranks are not {replicate} replicas x {shard} shards",
                where="parallelism.data_parallel_replicate_degree, .data_parallel_shard_degree",
                tip=f"their product must be {world_size}; a shard degree of -1 takes the ranks that are left",
            )
        return Layout(replicate, shard)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod((self.dp_replicate, self.dp_shard))

    @property
    def dp(self) -> int:
        """Number of ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        names = {"replicate": self.dp_replicate, "fsdp": self.dp_shard}
        parts = [f"{name} {degree}" for name, degree in names.items() if degree > 1]
        return " x ".join(parts) or "one device"


class Mesh:
    """The ranks arranged by a layout, with the sub-meshes that the engines ask for."""

    def __init__(self, layout: Layout, device_type: str, rank: int = 0) -> None:
        self.layout = layout
        self.device_type = device_type
        self.dp_rank = rank % layout.dp

    @cached_property
    def device_mesh(self) -> DeviceMesh:
        """The whole mesh; needs the process groups."""
        from torch.distributed.device_mesh import init_device_mesh

        shape = (self.layout.dp_replicate, self.layout.dp_shard)
        return init_device_mesh(self.device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))

    @property
    def fsdp(self) -> DeviceMesh:
        """Where parameters are sharded: one axis for FSDP, (replicate, shard) for HSDP."""
        if self.layout.dp_replicate > 1:
            return self.device_mesh["dp_replicate", "dp_shard"]
        return self.device_mesh["dp_shard"]

    @property
    def replicate(self) -> DeviceMesh:
        """Where whole models are replicated (DDP)."""
        return self.device_mesh["dp_replicate"]
