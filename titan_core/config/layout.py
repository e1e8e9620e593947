"""Degrees of parallelism: how a number of ranks is factored. Plain arithmetic, no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from titan_core.config.schema import Parallelism
from titan_core.runtime.errors import UsageError

# Axes from the slowest to the fastest: neighbouring ranks, which share a host, exchange tensor-parallel activations.
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
KEYS = {
    "pp": "pipeline_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
}
_NAMES = {"pp": "pipeline", "dp_replicate": "replicate", "dp_shard": "fsdp", "cp": "context", "tp": "tensor"}

# Pipeline schedules by the stages that a rank holds
SINGLE = ("1F1B", "GPipe")  # one stage a rank
V_SHAPED = (
    "ZBVZeroBubble",
    "DualPipeV",
)  # rank r holds stages r and 2 n - 1 - r: the first and the last meet on rank 0
LOOPED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")  # rank r holds stages r, r + n, ...
SCHEDULES = SINGLE + LOOPED + V_SHAPED
SPLIT_BACKWARD = ("InterleavedZeroBubble", *V_SHAPED)  # gradients of inputs first, those of weights later


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism with nothing left open; their product is the number of ranks.

    Experts are split over `ep` ranks, which are otherwise those of `fsdp`, and each over `etp` ranks.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @staticmethod
    def of(config: Parallelism, world_size: int) -> Layout:
        """Resolve the degrees of a config for a number of ranks; raises `UsageError` where they do not fit."""
        asked = {axis: getattr(config, KEYS[axis]) for axis in AXES}
        if asked["dp_shard"] == -1:
            asked["dp_shard"] = max(1, world_size // -math.prod(asked.values()))
        layout = Layout(**asked, ep=config.expert_parallel_degree, etp=config.expert_tensor_parallel_degree)
        if layout.world_size != world_size:
            near = " or ".join(f"`{n}`" for n in itertools.islice(_nearest(layout, world_size), 2))
            more = f", or start {_ranks(layout.world_size)}" if layout.world_size > world_size else ""
            raise UsageError(
                f"{_ranks(world_size)} do{'es' * (world_size == 1)} not divide into {_product(config)}",
                where="parallelism",
                tip=f"try {near}{more}; a data_parallel_shard_degree of -1 takes the ranks that are left",
            )
        layout.check_experts()
        return layout

    def check_experts(self) -> None:
        """Raise `UsageError` where experts cannot be split as asked."""
        if self.ep == 1:
            return
        if self.etp not in (1, self.tp):
            raise UsageError(
                f"each expert over {self.etp} ranks does not go with {self.tp} tensor-parallel ranks",
                where="parallelism.expert_tensor_parallel_degree",
                tip=f"use 1 or {self.tp}",
            )
        over = self.fsdp * (self.tp if self.routed_by_parts else 1)
        if over % self.ep or (self.routed_by_parts and self.ep % self.tp):
            fits = [n for n in range(1, over + 1) if over % n == 0 and not (self.routed_by_parts and n % self.tp)]
            parts = f"shards x context{' x tensor' if self.routed_by_parts else ''}"
            more = self.world_size * (self.ep // math.gcd(over, self.ep))
            start = (
                f", or start {_ranks(more)}" if more > self.world_size and self.ep % (over // self.fsdp) == 0 else ""
            )
            raise UsageError(
                f"experts are split over the ranks of {parts}; these are {over}, and {self.ep} does not divide them",
                where="parallelism.expert_parallel_degree",
                tip=f"try {' or '.join(map(str, fits[-3:]))}{start}",
            )

    @property
    def routed_by_parts(self) -> bool:
        """Are experts split over the tensor-parallel ranks too, so that each routes its own part of the stream?"""
        return self.ep > 1 and self.tp > 1 and self.etp == 1

    @property
    def expert_tp(self) -> int:
        """Number of ranks over which each expert is split."""
        return 1 if self.routed_by_parts else self.tp

    @property
    def expert_fsdp(self) -> int:
        """Number of ranks over which the experts of one expert-parallel rank are sharded."""
        return self.fsdp * self.tp // (self.ep * self.expert_tp)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def dp(self) -> int:
        """Number of ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Number of ranks over which parameters are sharded: pieces of a sequence need the same weights."""
        return self.dp_shard * self.cp

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return where a rank is on each axis."""
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return found

    def __str__(self) -> str:
        parts = [f"{_NAMES[axis]} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        if self.ep > 1:
            parts.append(f"expert {self.ep}")
        return " x ".join(parts) or "one device"


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number != 1)}"


def _product(config: Parallelism) -> str:
    """Say the degrees that were asked for by their keys."""
    asked = {KEYS[axis]: getattr(config, KEYS[axis]) for axis in AXES}
    return " x ".join(f"{key} {degree}" for key, degree in asked.items() if degree not in (1, -1)) or "1"


def _nearest(asked: Layout, world_size: int) -> Iterator[str]:
    """Name the layouts of `world_size` ranks, those first that change the fewest degrees, other than that of shards,
    and by the least."""
    legal = [Layout(**dict(zip(AXES, split, strict=True))) for split in factorings(world_size, len(AXES))]

    def distance(layout: Layout) -> tuple[int, float]:
        axes = [a for a in AXES if a != "dp_shard"]
        ratios = [abs(math.log(getattr(layout, a) / max(1, getattr(asked, a)))) for a in axes]
        return sum(r > 0 for r in ratios), sum(ratios)

    for layout in sorted(legal, key=distance):
        yield str(layout)


def factorings(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield all ordered ways to write a number as a product of so many factors."""
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in factorings(number // first, parts - 1):
                yield (first, *rest)
