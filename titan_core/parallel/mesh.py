"""The device mesh: the only place that arranges ranks and names the axes between them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from titan_core.config.layout import AXES, Layout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_EXPERT_AXES = ("pp", "dp_replicate", "expert_fsdp", "ep", "expert_tp")
__all__ = ["Layout", "Mesh"]


class Mesh:
    """The ranks arranged by a layout, with the sub-meshes and groups that the engines ask for.

    Parameters live on (pp, dp_replicate, fsdp, tp), where fsdp joins the shards and the pieces of a sequence; tokens on
    (pp, dp_replicate, dp_shard, cp, tp). Both number the ranks alike.
    """

    def __init__(self, layout: Layout, device_type: str, rank: int = 0) -> None:
        self.layout = layout
        self.device_type = device_type
        self.rank = rank
        self.at = layout.coordinates(rank)

    @property
    def dp_rank(self) -> int:
        """Which part of the data this rank reads."""
        return self.at["dp_replicate"] * self.layout.dp_shard + self.at["dp_shard"]

    def seed_offset(self) -> int:
        """Return a number that is the same for ranks that must draw the same: those of one tensor-parallel group."""
        return self.rank // self.layout.tp

    @cached_property
    def parameters(self) -> DeviceMesh:
        """Where parameters live; needs the process groups."""
        from torch.distributed.device_mesh import init_device_mesh

        layout = self.layout
        shape = (layout.pp, layout.dp_replicate, layout.fsdp, layout.tp)
        return init_device_mesh(self.device_type, shape, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))

    @cached_property
    def tokens(self) -> DeviceMesh:
        """Where tokens live."""
        from torch.distributed.device_mesh import init_device_mesh

        shape = tuple(getattr(self.layout, axis) for axis in AXES)
        return init_device_mesh(self.device_type, shape, mesh_dim_names=AXES)

    @property
    def fsdp(self) -> DeviceMesh:
        """Where parameters are sharded: one axis for FSDP, (replicate, shard) for HSDP."""
        if self.layout.dp_replicate > 1:
            return self.parameters["dp_replicate", "fsdp"]
        return self.parameters["fsdp"]

    @cached_property
    def experts(self) -> DeviceMesh:
        """Where experts live: as `parameters`, with the ranks of fsdp (and tp) dealt to experts."""
        from torch.distributed.device_mesh import init_device_mesh

        layout = self.layout
        shape = (layout.pp, layout.dp_replicate, layout.expert_fsdp, layout.ep, layout.expert_tp)
        return init_device_mesh(self.device_type, shape, mesh_dim_names=_EXPERT_AXES)

    @property
    def expert_fsdp(self) -> DeviceMesh:
        """Where the experts of one expert-parallel rank are sharded."""
        if self.layout.dp_replicate > 1:
            return self.experts["dp_replicate", "expert_fsdp"]
        return self.experts["expert_fsdp"]

    @property
    def replicate(self) -> DeviceMesh:
        """Where whole models are replicated (DDP)."""
        return self.parameters["dp_replicate"]

    @property
    def tp(self) -> DeviceMesh:
        """Where matrices are split."""
        return self.parameters["tp"]

    @cached_property
    def cp_group(self) -> ProcessGroup:
        """Who holds the other pieces of this rank's sequences."""
        return self.tokens["cp"].get_group()

    @cached_property
    def pp_group(self) -> ProcessGroup:
        """Who holds the other stages of this rank's model."""
        return self.parameters["pp"].get_group()

    def pp_ranks(self, places: Sequence[int]) -> ProcessGroup:
        """Return a group of those of them at some places, this rank's among them; only these ranks call it."""
        import torch.distributed as dist

        if len(places) == self.layout.pp:
            return self.pp_group
        every = dist.get_process_group_ranks(self.pp_group)
        ranks = [every[place] for place in places]
        group = dist.new_group(ranks, use_local_synchronization=True, group_desc="tied parameters")
        assert isinstance(group, dist.ProcessGroup)  # and not the mark of a rank that is no member
        return group
