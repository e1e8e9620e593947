"""`titan train --dry-run`: the whole plan of a run, without weights, ranks or data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from titan_core.config.load import Resolved
from titan_core.estimation.flops import count_parameters, flops_per_token
from titan_core.estimation.memory import GIB
from titan_core.models import resolve
from titan_core.parallel import legal
from titan_core.parallel.mesh import Layout
from titan_core.parallel.parallelize import find
from titan_core.runtime import distributed
from titan_core.runtime.errors import ConfigError, RunFailed
from titan_core.training.simulate import RankPlan, simulate


@dataclass(frozen=True)
class Plan:
    """What a run would be: rows to show, and the numbers behind them."""

    rows: list[tuple[str, str]]
    parameters: int
    flops_per_token: float
    flops_per_token_causal: float
    tokens_per_step: int
    device: str
    ranks: list[dict[str, Any]]


def run(resolved: Resolved, world_size: int, device_type: str | None = None) -> Plan:
    """Plan a run on `world_size` ranks of a type of device (default: this machine's): lay the model out and count."""
    import torch

    config = resolved.config
    training = config.training
    layout = Layout.of(config.parallelism, world_size)
    family, sizes = resolve(config.model)
    with torch.device("meta"):
        model = family.build(sizes)
    declared = [p for p in family.parameters(sizes) if p.tied_to is None and p.trained]
    if [(p.name, p.shape) for p in declared] != [(n, tuple(p.shape)) for n, p in model.named_parameters()]:
        raise RunFailed(f"{family.name} does not declare the parameters that it has")
    blocks = find(model, family.blocks)
    counts, lengths = count_parameters(family.parameters(sizes)), family.lengths(config)
    sample = next(iter(lengths.values()))
    full, causal = (
        flops_per_token(family.parameters(sizes), family.attentions(sizes), lengths, causal=c) for c in (False, True)
    )
    rows_a_step = training.global_batch_size
    if rows_a_step < 0:
        rows_a_step = training.local_batch_size * layout.dp
    tokens = rows_a_step * sample
    wrong = legal.problems(config, layout, family, sizes)
    if wrong:
        raise ConfigError(wrong)
    device = device_type or distributed.default_device_type()
    plans = simulate(config, family, sizes, layout, rows_a_step, device)
    shown = [
        ("run", config.job.dump_folder),
        ("model", f"{family.name} {config.model.flavor}: {counts.total:,} parameters in {len(blocks)} blocks"),
        ("flops", f"{full:.4g} a token with full attention, {causal:.4g} with causal attention counted as it is"),
        ("layout", f"{world_size} ranks: {layout}; planned for {device}"),
        (
            "batch",
            f"{rows_a_step} x {sample} = {tokens:,} tokens a step in "
            f"{rows_a_step // (training.local_batch_size * layout.dp)} microbatches a rank; "
            f"{training.steps:,} steps = {tokens * training.steps:,} tokens, {full * tokens * training.steps:.3g} FLOP",
        ),
        *(row for plan in plans for row in _rows(plan, layout)),
    ]
    return Plan(shown, counts.total, full, causal, tokens, device, [_as_dict(plan) for plan in plans])


def _rows(plan: RankPlan, layout: Layout) -> list[tuple[str, str]]:
    """Say what a rank of one kind holds, at its fullest moment and by kind, and what it sends."""
    where = f"stage {', '.join(map(str, plan.stages))}: " if layout.pp > 1 else ""
    kinds = ("weights", "gradients", "optimizer", "activations", "gathered")
    return [
        ("memory", f"{plan.peak / GIB:.2f} GiB at the peak; {where}{plan.ranks} ranks, {plan.blocks} blocks each"),
        *((f" {kind}", f"{getattr(plan, kind) / GIB:.2f} GiB") for kind in kinds if getattr(plan, kind)),
        *(
            (f" {axis}", f"{name}: {calls:,} calls, {size / GIB:.2f} GiB a step")
            for (name, axis), (calls, size) in sorted(plan.collectives.items())
        ),
    ]


def _as_dict(plan: RankPlan) -> dict[str, Any]:
    collectives = [
        {"collective": name, "axis": axis, "calls": calls, "bytes": size}
        for (name, axis), (calls, size) in sorted(plan.collectives.items())
    ]
    return {**vars(plan), "collectives": collectives}
