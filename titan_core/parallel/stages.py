"""Where a model is cut into the stages of a pipeline, and which rank holds which. Plain arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from titan_core.config.schema import Parallelism
from titan_core.declare.family import Family
from titan_core.declare.sharding import matches
from titan_core.runtime.errors import UsageError

SINGLE = ("1F1B", "GPipe")  # one stage a rank
V_SHAPED = (
    "ZBVZeroBubble",
    "DualPipeV",
)  # rank r holds stages r and 2 n - 1 - r: the first and the last meet on rank 0
LOOPED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")  # rank r holds stages r, r + n, ...
SCHEDULES = SINGLE + LOOPED + V_SHAPED
SPLIT_BACKWARD = ("InterleavedZeroBubble", *V_SHAPED)  # gradients of inputs first, those of weights later


@dataclass(frozen=True)
class Cut:
    """One stage: its place among all, the modules that it holds by name, and the blocks that are elsewhere."""

    index: int
    count: int
    modules: frozenset[str]
    elsewhere: frozenset[str]

    @property
    def first(self) -> bool:
        """Does it take tokens?"""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Does it compute the loss?"""
        return self.index == self.count - 1


def cuts(config: Parallelism, family: Family, names: Sequence[str]) -> list[Cut]:
    """Cut a model, whose modules have these names, into stages; raises `UsageError` where that does not work out."""
    blocks = [name for name in names if matches(name, family.blocks)]
    first = [name for name in names if matches(name, family.sharding.first)]
    last = [name for name in names if matches(name, family.sharding.last)]
    parts = _explicit(config, [*first, *blocks, *last])
    if parts is None:
        counts = block_counts(config, len(blocks))
        parts, start = [], 0
        for count in counts:
            parts.append(blocks[start : start + count])
            start += count
        parts[0] = first + parts[0]
        parts[-1] = parts[-1] + last
    return [
        Cut(index, len(parts), frozenset(part), frozenset(blocks) - frozenset(part)) for index, part in enumerate(parts)
    ]


def _explicit(config: Parallelism, every: list[str]) -> list[list[str]] | None:
    """Return the split that the config spells out, checked against the modules that there are."""
    parts = config.module_fqns_per_model_part
    if parts is None:
        return None
    key = "parallelism.module_fqns_per_model_part"
    listed = [name for part in parts for name in part]
    unknown, missing = [n for n in listed if n not in every], [n for n in every if n not in listed]
    if unknown or missing or listed != sorted(listed, key=every.index):
        said = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
        if not unknown and not missing:
            said = "not in the order of the model, or named twice"
        raise UsageError(f"the stages do not hold each module once, in order: {said}", where=key)
    if len(parts) % config.pipeline_parallel_degree:
        raise UsageError(
            f"{len(parts)} stages do not divide over {config.pipeline_parallel_degree} pipeline ranks", where=key
        )
    return parts


def block_counts(config: Parallelism, num_blocks: int) -> list[int]:
    """Return how many blocks each stage holds.

    The embedding and the head count as so many blocks (`pipeline_parallel_first_stage_less_layers`, `..._last_...`);
    what is left over goes to the first stages.
    """
    ranks = config.pipeline_parallel_degree
    into, out = config.pipeline_parallel_first_stage_less_layers, config.pipeline_parallel_last_stage_less_layers
    total = num_blocks + into + out
    stages = ranks * (1 if config.pipeline_parallel_schedule in SINGLE else 2)
    if config.pipeline_parallel_layers_per_stage is not None:
        stages = -(-total // config.pipeline_parallel_layers_per_stage)
    _check_count(config, stages)
    base, more = divmod(total, stages)
    counts = [base + (index < more) for index in range(stages)]
    counts[0] -= into
    counts[-1] -= out
    if min(counts) < 0 or base == 0:
        raise UsageError(
            f"{num_blocks} blocks are too few for {stages} pipeline stages, with the embedding counting for {into} of "
            f"them and the head for {out}",
            where="parallelism.pipeline_parallel_degree",
            tip="fewer pipeline ranks, more layers, or another schedule",
        )
    return counts


def _check_count(config: Parallelism, stages: int) -> None:
    ranks, schedule = config.pipeline_parallel_degree, config.pipeline_parallel_schedule
    each = stages // ranks
    fits = stages % ranks == 0 and (each == 1 if schedule in SINGLE else each >= 2)
    if schedule in V_SHAPED:
        fits = stages == 2 * ranks
    if not fits:
        wanted = "one stage" if schedule in SINGLE else "two stages" if schedule in V_SHAPED else "two stages or more"
        raise UsageError(
            f"{config.pipeline_parallel_layers_per_stage} layers a stage make {stages} stages, and {schedule} wants "
            f"{wanted} on each of {ranks} pipeline ranks",
            where="parallelism.pipeline_parallel_layers_per_stage",
            tip="leave it unset, or choose another number",
        )


def owned(config: Parallelism, stages: Sequence[Cut], pp_rank: int) -> list[Cut]:
    """Return the stages that a pipeline rank holds."""
    ranks = config.pipeline_parallel_degree
    if config.pipeline_parallel_schedule in V_SHAPED and not config.pipeline_parallel_schedule_csv:
        return [stages[pp_rank], stages[len(stages) - 1 - pp_rank]]
    return list(stages[pp_rank::ranks])


def last_stage_rank(config: Parallelism) -> int:
    """Return the pipeline rank that computes the loss."""
    v_shaped = config.pipeline_parallel_schedule in V_SHAPED and not config.pipeline_parallel_schedule_csv
    return 0 if v_shaped else config.pipeline_parallel_degree - 1
