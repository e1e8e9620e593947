"""`titan train --dry-run`: the whole plan of a run, without weights, ranks or data."""

from __future__ import annotations

from dataclasses import dataclass

from titan_core.config.load import Resolved
from titan_core.estimation.flops import count_parameters, flops_per_token
from titan_core.estimation.memory import GIB, Memory, data_parallel_memory
from titan_core.models import resolve
from titan_core.parallel.mesh import Layout
from titan_core.parallel.parallelize import find
from titan_core.runtime.errors import RunFailed


@dataclass(frozen=True)
class Plan:
    """What a run would be: rows to show, and the numbers behind them."""

    rows: list[tuple[str, str]]
    parameters: int
    flops_per_token: float
    flops_per_token_causal: float
    tokens_per_step: int
    memory: Memory


def run(resolved: Resolved, world_size: int) -> Plan:
    """Plan a run on `world_size` ranks: builds the model on the meta device and counts."""
    import torch

    config = resolved.config
    training = config.training
    layout = Layout.of(config.parallelism, world_size)
    family, sizes = resolve(config.model)
    with torch.device("meta"):
        model = family.build(sizes)
    declared = [p for p in family.parameters(sizes) if p.tied_to is None]
    if [(p.name, p.shape) for p in declared] != [(n, tuple(p.shape)) for n, p in model.named_parameters()]:
        raise RunFailed(f"{family.name} does not declare the parameters that it has")
    blocks = find(model, family.blocks)
    counts = count_parameters(family.parameters(sizes))
    full, causal = (
        flops_per_token(family.parameters(sizes), family.attentions(sizes), training.seq_len, causal=c)
        for c in (False, True)
    )
    rows_a_step = training.global_batch_size
    if rows_a_step < 0:
        rows_a_step = training.local_batch_size * layout.dp
    tokens = rows_a_step * training.seq_len
    memory = data_parallel_memory(
        config, family.parameters(sizes), len(blocks), sizes.vocab_size, shards=layout.dp_shard
    )
    on_host = f", {memory.host / GIB:.2f} of them in host memory" if memory.host else ""
    shown = [
        ("run", config.job.dump_folder),
        ("model", f"{family.name} {config.model.flavor}: {counts.total:,} parameters in {len(blocks)} blocks"),
        ("flops", f"{full:.4g} a token with full attention, {causal:.4g} with causal attention counted as it is"),
        ("layout", f"{world_size} ranks: {layout}"),
        (
            "batch",
            f"{rows_a_step} x {training.seq_len} = {tokens:,} tokens a step in "
            f"{rows_a_step // (training.local_batch_size * layout.dp)} microbatches a rank; "
            f"{training.steps:,} steps = {tokens * training.steps:,} tokens, {full * tokens * training.steps:.3g} FLOP",
        ),
        ("memory", f"about {memory.total / GIB:.2f} GiB a rank{on_host}"),
        *((f" {name}", f"{value / GIB:.2f} GiB") for name, value in memory.parts().items()),
    ]
    return Plan(shown, counts.total, full, causal, tokens, memory)
