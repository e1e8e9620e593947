"""Where a model is cut into the stages of a pipeline, and which rank holds which. Plain arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from titan_core.config.layout import SINGLE, SPLIT_BACKWARD, V_SHAPED
from titan_core.config.schema import Parallelism
from titan_core.declare.family import Family
from titan_core.declare.sharding import matches
from titan_core.runtime.errors import UsageError


@dataclass(frozen=True)
class Cut:
    """One stage: its place among all, the modules that it holds by name, and the blocks that are elsewhere.

    `shared` are the parameters that it uses and another stage too: by name, the stages that do. The first of them is
    the one of whose modules the parameter is; the others hold that module once more, and of it the weights alone.
    """

    index: int
    count: int
    modules: frozenset[str]
    elsewhere: frozenset[str]
    shared: Mapping[str, tuple[int, ...]]

    @property
    def first(self) -> bool:
        """Does it take tokens?"""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Does it compute the loss?"""
        return self.index == self.count - 1

    @property
    def borrowed(self) -> frozenset[str]:
        """The modules of other stages that it holds once more."""
        return frozenset(_module(name) for name, (home, *_) in self.shared.items() if home != self.index)


def cuts(config: Parallelism, family: Family, sizes: Any, names: Sequence[str]) -> list[Cut]:
    """Cut a model, whose modules have these names, into stages; raises `UsageError` where that does not work out."""
    sharding = family.sharding
    first, last = ([n for n in names if matches(n, patterns)] for patterns in (sharding.first, sharding.last))
    blocks = [name for name in names if matches(name, family.blocks) and name not in last]
    at_end = [name for name in last if matches(name, family.blocks)]
    bound = first, [name for name in last if not matches(name, sharding.closing)]
    parts = _explicit(config, [*first, *blocks, *last], *bound)
    if parts is None:
        counts = block_counts(config, len(blocks), len(at_end))
        parts, start = [], 0
        for count in counts:
            parts.append(blocks[start : start + count])
            start += count
        parts[0] = first + parts[0]
        parts[-1] = parts[-1] + last
    shared = _shared(family, sizes, parts)
    return [
        Cut(
            index,
            len(parts),
            frozenset(part),
            frozenset([*blocks, *at_end]) - frozenset(part),
            {name: stages for name, stages in shared.items() if index in stages},
        )
        for index, part in enumerate(parts)
    ]


def _shared(family: Family, sizes: Any, parts: Sequence[Sequence[str]]) -> dict[str, tuple[int, ...]]:
    """Return the parameters that several stages use, and which: that of their module first."""
    found: dict[str, tuple[int, ...]] = {}
    for parameter in family.parameters(sizes):
        if parameter.tied_to is not None:
            home, user = (_stage_of(name, parts) for name in (parameter.tied_to, parameter.name))
            found[parameter.tied_to] = tuple(dict.fromkeys((*found.get(parameter.tied_to, (home,)), user)))
    found = {name: stages for name, stages in found.items() if len(stages) > 1}
    # A borrowed module lets the stream pass that a stage begins with, and still looks tokens up: only of what stands
    # before the blocks can one tell by its input which of the two is meant.
    assert all(matches(_module(name), family.sharding.first) for name in found), found
    return found


def _stage_of(parameter: str, parts: Sequence[Sequence[str]]) -> int:
    """Return the stage that uses a parameter by this name. A tied head is no module: it is used where the loss is."""
    for index, part in enumerate(parts):
        if any(parameter.startswith(module + ".") for module in part):
            return index
    return len(parts) - 1


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _explicit(
    config: Parallelism, every: list[str], first: Sequence[str], last: Sequence[str]
) -> list[list[str]] | None:
    """Return the split that the config spells out, checked against the modules that there are, and those that must be
    where tokens come in and where the loss is computed."""
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
    for bound, place, part in ((first, "first", parts[0]), (last, "last", parts[-1])):
        for name in (name for name in bound if name not in part):
            raise UsageError(f"`{name}` belongs to the {place} stage", where=key, tip="move it there")
    _check_count(config, len(parts), f"these are {len(parts)} stages", key)
    return parts


def block_counts(config: Parallelism, num_blocks: int, at_end: int = 0) -> list[int]:
    """Return how many blocks each stage holds, the `at_end` that belong to the last one not counted.

    The embedding and the head count as so many blocks (`pipeline_parallel_first_stage_less_layers`, `..._last_...`);
    what is left over goes to the first stages. Where what belongs to the last one is more than its share, the others
    share all else.
    """
    ranks = config.pipeline_parallel_degree
    into, out = config.pipeline_parallel_first_stage_less_layers, config.pipeline_parallel_last_stage_less_layers
    total = num_blocks + at_end + into + out
    stages = ranks * (1 if config.pipeline_parallel_schedule in SINGLE else 2)
    if config.pipeline_parallel_layers_per_stage is not None:
        stages = -(-total // config.pipeline_parallel_layers_per_stage)
    said = f"{config.pipeline_parallel_layers_per_stage} layers a stage make {stages} stages"
    _check_count(config, stages, said, "parallelism.pipeline_parallel_layers_per_stage")
    counts = _evenly(total, stages)
    if at_end and counts[-1] < out + at_end:
        counts = [*_evenly(num_blocks + into, stages - 1), out + at_end]
    too_few = min(counts) == 0
    counts[0] -= into
    counts[-1] -= out + at_end
    if min(counts) < 0 or too_few:
        further = f", and {at_end} more on the last" if at_end else ""
        raise UsageError(
            f"{num_blocks} blocks are too few for {stages} pipeline stages, with the embedding counting for {into} of "
            f"them and the head for {out}{further}",
            where="parallelism.pipeline_parallel_degree",
            tip="fewer pipeline ranks, more layers, another schedule, or parallelism.module_fqns_per_model_part",
        )
    return counts


def _evenly(total: int, parts: int) -> list[int]:
    base, more = divmod(total, parts)
    return [base + (index < more) for index in range(parts)]


def _check_count(config: Parallelism, stages: int, said: str, where: str) -> None:
    """Raise `UsageError` if a schedule wants another number of stages; a schedule of one's own may want any."""
    ranks, schedule = config.pipeline_parallel_degree, config.pipeline_parallel_schedule
    each, left = divmod(stages, ranks)
    if config.pipeline_parallel_schedule_csv:
        schedule, wanted, fits = "a schedule", "equally many stages", True
    elif schedule in SINGLE:
        wanted, fits = "one stage", each == 1
    elif schedule in V_SHAPED:
        wanted, fits = "two stages", each == 2
    else:
        wanted, fits = "two stages or more", each >= 2
    if left or not fits:
        raise UsageError(
            f"{said}, and {schedule} wants {wanted} on each of {ranks} pipeline ranks",
            where=where,
            tip="leave it unset, or choose another number",
        )


def rank_of(config: Parallelism, stage: int, count: int) -> int:
    """Return the pipeline rank that holds a stage of so many."""
    ranks = config.pipeline_parallel_degree
    v_shaped = config.pipeline_parallel_schedule in V_SHAPED and not config.pipeline_parallel_schedule_csv
    return min(stage, count - 1 - stage) if v_shaped else stage % ranks


def may_split(config: Parallelism) -> bool:
    """May a schedule ask for gradients of inputs first, and for those of weights later? One's own may do anything."""
    return bool(config.pipeline_parallel_schedule_csv) or config.pipeline_parallel_schedule in SPLIT_BACKWARD


def owned(config: Parallelism, stages: Sequence[Cut], pp_rank: int) -> list[Cut]:
    """Return the stages that a pipeline rank holds."""
    return [stage for stage in stages if rank_of(config, stage.index, stage.count) == pp_rank]


def last_stage_rank(config: Parallelism) -> int:
    """Return the pipeline rank that computes the loss."""
    ranks = config.pipeline_parallel_degree
    return rank_of(config, 2 * ranks - 1, 2 * ranks)
