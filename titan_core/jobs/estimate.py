"""`titan estimate-flops`: what a run costs, by arithmetic on its config. No torch, no GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from titan_core.config.fields import get
from titan_core.config.layout import KEYS, Layout, factorings
from titan_core.config.load import Resolved
from titan_core.config.schema import Config
from titan_core.declare.family import Family
from titan_core.estimation.devices import USABLE, Device
from titan_core.estimation.flops import Counts, count_parameters, flops_per_token
from titan_core.estimation.memory import GIB, Memory, rank_memory
from titan_core.estimation.step_time import StepTime, step_time
from titan_core.estimation.traffic import traffic
from titan_core.models import resolve
from titan_core.parallel import legal
from titan_core.runtime.errors import UsageError

_SHORTEST_PIECE = 2048  # tokens of a sequence on a rank, in the search


@dataclass(frozen=True)
class Fit:
    """A layout that fits a device's memory, and what its step is estimated to take.

    `settings` are the config keys to change for it; `mfu` counts full attention, as `Estimate` does.
    """

    layout: str
    local_batch_size: int
    recompute: str
    settings: dict[str, Any]
    memory: Memory
    tokens_per_step: int
    time: StepTime
    tokens_per_second: float
    mfu: float


@dataclass(frozen=True)
class Estimate:
    """What a run costs. FLOPs are those of a token's forward and backward, recomputation not counted: `flops` with all
    keys of a sequence counted for every token, `flops_causal` with those that it sees; `attention` is their part in
    the first. Seconds need a device; they are those of `tokens` at a share `mfu` of its data sheet's FLOP/s. `modelled`
    is a step as the search models it: what computes, waits and is sent, at a fixed share while it computes.
    """

    model: str
    parameters: Counts
    tokens_per_sample: int
    flops: float
    flops_causal: float
    attention: float
    layout: str
    ranks: int
    tokens_per_step: int
    tokens: int
    memory: Memory
    device: Device | None = None
    mfu: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None
    modelled: Fit | None = None
    fits: list[Fit] = dataclasses.field(default_factory=list)


def run(resolved: Resolved, ranks: int, device: Device | None, mfu: float, tokens: int | None = None) -> Estimate:
    """Estimate a run of `tokens`, or of the config's steps, on so many ranks."""
    config = resolved.config
    family, sizes = resolve(config.model)
    layout = Layout.of(config.parallelism, ranks)
    full, causal, products = (
        flops_per_token(family.parameters(sizes), attentions, family.lengths(config), causal=flag)
        for attentions, flag in ((family.attentions(sizes), False), (family.attentions(sizes), True), ((), False))
    )
    a_step = tokens_per_step(config, family, layout)
    tokens = tokens or a_step * config.training.steps
    speed = ranks * device.peak * mfu / full if device else None
    memory = _memory(config, family, sizes, layout)
    return Estimate(
        model=f"{family.name} {config.model.flavor}",
        parameters=count_parameters(family.parameters(sizes)),
        tokens_per_sample=next(iter(family.lengths(config).values())),
        flops=full,
        flops_causal=causal,
        attention=full - products,
        layout=str(layout),
        ranks=ranks,
        tokens_per_step=a_step,
        tokens=tokens,
        memory=memory,
        device=device,
        mfu=mfu if device else None,
        tokens_per_second=speed,
        seconds=tokens / speed if speed else None,
        modelled=_judged(config, config, family, sizes, layout, device, memory) if device else None,
    )


def tokens_per_step(config: Config, family: Family, layout: Layout) -> int:
    """Return the tokens of an optimizer step."""
    rows = config.training.global_batch_size
    rows = rows if rows > 0 else config.training.local_batch_size * layout.dp
    return rows * next(iter(family.lengths(config).values()))


def _memory(config: Config, family: Family, sizes: Any, layout: Layout) -> Memory:
    parameters, attentions, lengths = family.parameters(sizes), family.attentions(sizes), family.lengths(config)
    return rank_memory(config, parameters, attentions, getattr(sizes, "vocab_size", 0), layout, lengths)


# ------------------------------------------------------------------------------------------------ what fits


def fit(resolved: Resolved, ranks: int, device: Device, most: int = 10) -> list[Fit]:
    """Return the layouts, batches and recomputations that fit the device, those first whose step is estimated to be the
    fastest; of alike layouts the best one only.

    Degrees of shards, tensor, context, pipeline and expert parallelism are tried, and sequences a rank up to 64;
    everything else is as the config has it. Raises `UsageError` if nothing fits.
    """
    family, sizes = resolve(resolved.config.model)
    family = _tabled(family, sizes)
    room = USABLE * device.memory
    best: list[Fit] = []
    least: int | None = None
    for config, layout in _layouts(resolved.config, family, sizes, ranks, device):
        found: list[Fit] = []
        for mode in _RECOMPUTATIONS:  # that which needs the least memory first
            recompute = dataclasses.replace(config.activation_checkpoint, **mode)
            for tried in _batches(dataclasses.replace(config, activation_checkpoint=recompute), layout):
                memory = _memory(tried, family, sizes, layout)
                least = min(memory.total - memory.host, least or memory.total)
                if memory.total - memory.host > room:
                    break  # more sequences need more
                found.append(_judged(resolved.config, tried, family, sizes, layout, device, memory))
            if not found:
                break
        best += sorted(found, key=_slowest_last)[:1]
    if not best:
        needs = f"the least is {least / GIB:.0f} GiB a rank" if least else "no layout suits the model"
        usable = f"{room / GIB:.0f} of {device.name}'s {device.memory // GIB} GiB"
        tip = "more ranks, a shorter training.seq_len, or training.enable_cpu_offload"
        raise UsageError(f"nothing fits {usable} on {ranks} rank{'s' * (ranks > 1)}: {needs}", where="--fit", tip=tip)
    return sorted(best, key=_slowest_last)[:most]


def _slowest_last(found: Fit) -> float:
    return -found.tokens_per_second


def _tabled(family: Family, sizes: Any) -> Family:
    """Return the family with its tables of these sizes made once."""
    parameters, attentions = family.parameters(sizes), family.attentions(sizes)
    return dataclasses.replace(family, parameters=lambda _: parameters, attentions=lambda _: attentions)


_RECOMPUTATIONS = (
    {"mode": "full"},
    {"mode": "selective", "selective_ac_option": "op"},
    {"mode": "none"},
)


def _layouts(config: Config, family: Family, sizes: Any, ranks: int, device: Device) -> Iterator[tuple[Config, Layout]]:
    """Give legal layouts with one sequence a rank: tensor parallelism within a host, and pieces of a sequence no
    shorter than some thousand tokens."""
    longest = max(1, next(iter(family.lengths(config).values())) // _SHORTEST_PIECE)
    for pp, shard, cp, tp in factorings(ranks, 4):
        if tp > device.neighbours or cp > longest or pp > len(family.attentions(sizes)):
            continue
        for ep in _expert_degrees(family, sizes, shard * cp * tp):
            degrees = {"pp": pp, "dp_replicate": 1, "dp_shard": shard, "cp": cp, "tp": tp}
            parallel = dataclasses.replace(
                config.parallelism,
                **{KEYS[axis]: degree for axis, degree in degrees.items()},
                expert_parallel_degree=ep,
                expert_tensor_parallel_degree=1,
            )
            tried = dataclasses.replace(config, parallelism=parallel, training=_training(config, 1))
            try:
                layout = Layout.of(parallel, ranks)
            except UsageError:
                continue
            if not legal.problems(tried, layout, family, sizes):
                yield tried, layout


def _expert_degrees(family: Family, sizes: Any, most: int) -> list[int]:
    experts = next((p.shape[0] for p in family.parameters(sizes) if p.role == "expert"), 1)
    return [n for n in range(1, min(experts, most) + 1) if experts % n == 0 and most % n == 0]


def _batches(config: Config, layout: Layout) -> Iterator[Config]:
    """Give the config with ever more sequences a rank, as far as they divide the batch that is asked for."""
    wanted = config.training.global_batch_size
    for rows in (1, 2, 4, 8, 16, 32, 64):
        if wanted > 0 and wanted % (rows * layout.dp):
            return
        yield dataclasses.replace(config, training=_training(config, rows))


def _training(config: Config, rows: int) -> Any:
    return dataclasses.replace(config.training, local_batch_size=rows)


def _judged(
    asked: Config, config: Config, family: Family, sizes: Any, layout: Layout, device: Device, memory: Memory
) -> Fit:
    parameters, attentions, lengths = family.parameters(sizes), family.attentions(sizes), family.lengths(config)
    full, causal = (flops_per_token(parameters, attentions, lengths, causal=flag) for flag in (False, True))
    tokens = tokens_per_step(config, family, layout)
    sent = traffic(config, parameters, attentions, layout, lengths)
    time = step_time(config, layout, causal * tokens / layout.world_size, sent, device)
    speed = tokens / time.total
    return Fit(
        layout=str(layout),
        local_batch_size=config.training.local_batch_size,
        recompute=config.activation_checkpoint.mode,
        settings={key: value for key, value in _settings(config).items() if value != get(asked, key)},
        memory=memory,
        tokens_per_step=tokens,
        time=time,
        tokens_per_second=speed,
        mfu=full * speed / (layout.world_size * device.peak),
    )


def _settings(config: Config) -> dict[str, Any]:
    """Return what the search decides, by key."""
    keys = [f"parallelism.{KEYS[axis]}" for axis in ("dp_replicate", "tp", "cp", "pp")]
    keys += ["parallelism.expert_parallel_degree", "parallelism.expert_tensor_parallel_degree"]
    keys += ["training.local_batch_size", "activation_checkpoint.mode"]
    if config.activation_checkpoint.mode == "selective":
        keys.append("activation_checkpoint.selective_ac_option")
    return {"parallelism.data_parallel_shard_degree": -1} | {key: get(config, key) for key in keys}
