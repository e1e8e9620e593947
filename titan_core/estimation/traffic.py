"""Bytes that a rank exchanges in a step, by axis, from what a family declares and a config says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from titan_core.config.layout import Layout
from titan_core.config.schema import Config
from titan_core.declare.parameters import Attention, Parameter
from titan_core.estimation.memory import BYTES, microbatches

_NOT_SPLIT = ("norm", "router", "bias")  # roles that tensor parallelism leaves whole on each rank


@dataclass(frozen=True)
class Traffic:
    """Bytes of a rank and step, as results of collectives count them: of the gathered, reduced or exchanged whole.

    `fsdp` and `replicate` are weights and gradients, which travel while others compute; the rest are activations, for
    which the next product waits.
    """

    fsdp: float = 0.0
    expert_fsdp: float = 0.0
    replicate: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    pipeline: float = 0.0


def traffic(
    config: Config,
    parameters: Sequence[Parameter],
    attentions: Sequence[Attention],
    layout: Layout,
    lengths: Mapping[str, int],
) -> Traffic:
    """Count what the middle of a pipeline exchanges; a dry run counts each rank's own.

    FSDP gathers each block for the forward and for the backward of a microbatch (once where the forward does not free
    it, once a step in a pipeline) and reduces its gradient once. Sequence parallelism gathers and reduces the stream on
    both sides of attention and feed-forward layer, again for the gradients, and again where a block is recomputed; by
    operation, what was reduced is kept. Context parallelism gathers keys and values, again for a recomputation, and
    reduces their gradients.
    Experts take and return rows, and take and return gradients.
    """
    parallel, training = config.parallelism, config.training
    rows, count = microbatches(config, layout)
    compute, reduce = BYTES[training.mixed_precision_param], BYTES[training.mixed_precision_reduce]
    own = [p for p in parameters if p.tied_to is None and p.trained]
    experts = sum(p.numel for p in own if p.role == "expert")
    small = sum(p.numel for p in own if p.role in _NOT_SPLIT)
    weights = ((sum(p.numel for p in own) - experts - small) / layout.tp + small) / layout.pp
    held = experts / (layout.ep * layout.expert_tp * layout.pp) if layout.ep > 1 else 0.0
    if layout.ep == 1:
        weights += experts / (layout.tp * layout.pp)
    gathers = 1 if layout.pp > 1 else count if parallel.fsdp_reshard_after_forward == "never" else 2 * count
    stream = sum(n for kind, n in lengths.items() if kind != "sample")
    tokens = rows * stream / layout.cp
    width = next(p.shape[-1 if p.role == "embedding" else 0] for p in own if p.role in ("embedding", "input"))
    again, kept = _recomputed(config)
    whole = compute * tokens * width  # the stream of a microbatch
    pairs = sum(a.num_kv_heads * (a.qk_dim + a.v_dim) for a in attentions) / layout.pp / layout.tp
    visits = _visits(own)
    sides = 2 * len(attentions) - (len(visits) if layout.routed_by_parts else 0)  # of blocks, where the stream is split
    return Traffic(
        fsdp=weights * (gathers * compute + reduce) if layout.fsdp > 1 else 0.0,
        expert_fsdp=held * (gathers * compute + reduce) if layout.expert_fsdp > 1 else 0.0,
        replicate=reduce * (weights / layout.fsdp + held / layout.expert_fsdp) if layout.dp_replicate > 1 else 0.0,
        tensor=count * whole * sides / layout.pp * (4 + again * (2 - kept)) if layout.tp > 1 else 0.0,
        context=count * compute * rows * stream * pairs * (2 + again) if layout.cp > 1 else 0.0,
        expert=count * 4 * compute * tokens / _parts(layout) * width * sum(visits) / layout.pp
        if layout.ep > 1
        else 0.0,
        pipeline=count * 2 * whole / (layout.tp if parallel.enable_sequence_parallel else 1) if layout.pp > 1 else 0.0,
    )


def _parts(layout: Layout) -> int:
    """Return over how many ranks the tokens that are routed together are split."""
    return layout.tp if layout.routed_by_parts else 1


def _recomputed(config: Config) -> tuple[float, int]:
    """Return the share of blocks that are computed again, and 1 if what collectives reduced is kept for it, else 0."""
    recompute = config.activation_checkpoint
    if recompute.mode == "selective" and recompute.selective_ac_option != "op":
        return 1 / int(recompute.selective_ac_option), 0
    if recompute.mode == "memory_budget":
        return 1 - recompute.memory_budget, 0
    return float(recompute.mode != "none"), int(recompute.mode == "selective")


def _visits(parameters: Sequence[Parameter]) -> list[float]:
    """Return how many experts a token visits, for each block that has some."""
    experts = {p.name.rsplit(".", 2)[0]: p.shape[0] * p.active for p in parameters if p.role == "expert"}
    return list(experts.values())
