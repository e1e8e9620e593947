"""Bytes a rank needs, by kind, from what a family declares and a config says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from titan_core.config.layout import Layout
from titan_core.config.schema import Config
from titan_core.declare.parameters import Attention, Parameter

GIB = 1 << 30
BYTES = {"float32": 4, "bfloat16": 2}
_LOGITS_AT_ONCE = 1 << 25  # titan_core.nn.loss


@dataclass(frozen=True)
class Memory:
    """Bytes a rank: its share of weights, gradients and optimizer state, what FSDP gathers, activations, logits.

    `host` of these lie in host memory instead of the device's (`training.enable_cpu_offload`).
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int
    host: int = 0

    @property
    def total(self) -> int:
        """All together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the kinds by name."""
        return {name: size for name, size in vars(self).items() if name != "host"}


def rank_memory(
    config: Config,
    parameters: Sequence[Parameter],
    attentions: Sequence[Attention],
    vocab_size: int,
    layout: Layout,
    lengths: Mapping[str, int] | None = None,
) -> Memory:
    """Estimate the memory of a rank by plain arithmetic; a dry run counts it instead.

    Tensor and pipeline parallelism divide parameters, FSDP their shares once more; an embedding that is used after the
    blocks too lies in two stages. Activations: with every block
    recomputed its input is kept, and one block's own; without, what `_block_width` says; of all microbatches in flight.
    Attention is taken not to store its scores. FSDP gathers two blocks at once (the next is prefetched), or all where
    it does not free them; and between the microbatches of a step it keeps the gradient of every parameter whole.
    `lengths` are the rows of each kind that a sample has; without them, `training.seq_len` tokens.
    """
    training, num_blocks = config.training, len(attentions)
    own = [p for p in parameters if p.tied_to is None]
    blocks = [p for p in own if p.role not in ("embedding", "output")]
    used_again = {p.tied_to for p in parameters} if layout.pp > 1 else set()
    twice = sum(p.numel for p in own if p.role == "embedding" and p.name in used_again)
    total = -(-(sum(p.numel for p in own) + twice) // (layout.tp * layout.pp))
    num_held = -(-num_blocks // layout.pp)
    block = sum(p.numel for p in blocks) // max(num_blocks, 1) // layout.tp
    rest = max(0, total - block * num_held)
    store, compute = BYTES[training.dtype], BYTES[training.mixed_precision_param]
    offload = training.enable_cpu_offload
    held, whole = store * -(-total // layout.fsdp), 0
    gathered = compute * total if compute != store else 0
    rows, steps = microbatches(config, layout)
    if layout.fsdp > 1 or offload:
        frees = config.parallelism.fsdp_reshard_after_forward != "never" and layout.pp == 1
        mixed = sum(p.numel for p in blocks if p.role == "expert") // max(num_blocks, 1)
        whole_block = block - mixed // layout.tp + mixed // (layout.ep * layout.expert_tp)
        gathered = compute * (rest + (min(2, num_held) if frees else num_held) * whole_block)
        whole = BYTES[training.mixed_precision_reduce] * total if steps > 1 else 0
    lengths = lengths or {"token": training.seq_len}
    stream = sum(count for kind, count in lengths.items() if kind != "sample")
    tokens = rows * stream // layout.cp
    width = next(p.shape[-1 if p.role == "embedding" else 0] for p in own if p.role in ("embedding", "input"))
    met = {p.name: sum(lengths[kind] for kind in p.per) / stream for p in blocks}
    per_block = compute * tokens * _block_width(blocks, attentions, width, met) // max(num_blocks, 1) // layout.tp
    split = layout.tp if config.parallelism.enable_sequence_parallel else 1
    in_flight = (
        1 if layout.pp == 1 else steps if config.parallelism.pipeline_parallel_schedule == "GPipe" else layout.pp
    )
    vocab = vocab_size // layout.tp
    heads = sum(p.role == "output" for p in parameters)  # each use of a head leaves a gradient of it
    return Memory(
        weights=held,
        gradients=held + whole if offload else max(held, whole),
        optimizer=2 * held,
        gathered=gathered,
        activations=min(in_flight, steps)
        * _activations(config, num_held, compute * tokens * width // split, per_block),
        logits=6 * min(_LOGITS_AT_ONCE, tokens * vocab) + 4 * vocab * width * heads,
        host=4 * held if offload else 0,
    )


def microbatches(config: Config, layout: Layout) -> tuple[int, int]:
    """Return the rows of a microbatch, and how many of them a rank computes a step."""
    rows = config.training.local_batch_size
    steps = max(1, config.training.global_batch_size // (rows * layout.dp))
    if layout.pp == 1:
        return rows, steps
    micro = config.parallelism.pipeline_parallel_microbatch_size
    return micro, steps * max(1, rows // micro)


def _block_width(
    blocks: Sequence[Parameter], attentions: Sequence[Attention], width: int, met: Mapping[str, float]
) -> int:
    """Return how many numbers all blocks save for a token: what comes out of the matmuls and the norms, and what goes
    into the matmuls that write to the residual stream. Square ones count as such, on the side of too much; so do rows
    that are brought together for experts, which titan's own kernels gather on the way. Keys of latent attention are put
    together out of what was multiplied. `met` is the share of the tokens that meet a parameter."""
    matrices = [(p.shape[-2], p.shape[-1], _times(p) * met[p.name]) for p in blocks if len(p.shape) > 1]
    heads = {a.qk_dim: (a.num_heads + a.num_kv_heads) / 2 for a in attentions}  # a norm of queries, one of keys
    norms = sum(p.shape[0] * heads.get(p.shape[0], 1) * met[p.name] for p in blocks if p.role == "norm")
    outs = sum(out * times for out, _, times in matrices)
    rows = {p.name.rsplit(".", 2)[0]: width * _times(p) for p in blocks if p.role == "expert"}
    keys = sum(a.num_heads * a.qk_dim for a in attentions if a.cached is not None)
    into_stream = sum(into * times for out, into, times in matrices if out == width)
    return round(outs + norms + into_stream + sum(rows.values()) + keys)


def _times(parameter: Parameter) -> float:
    """Return how many matrices of a stack of experts a token is multiplied with."""
    return parameter.shape[0] * parameter.active if parameter.role == "expert" else 1.0


def _activations(config: Config, num_blocks: int, boundary: int, per_block: int) -> int:
    recompute = config.activation_checkpoint
    if recompute.mode == "full":
        return num_blocks * boundary + per_block
    if recompute.mode == "memory_budget":
        return round(num_blocks * (boundary + recompute.memory_budget * per_block)) + per_block
    if recompute.mode == "selective":
        if recompute.selective_ac_option == "op":
            return num_blocks * (boundary + per_block // 2) + per_block
        every = int(recompute.selective_ac_option)
        return (num_blocks - num_blocks // every) * per_block + num_blocks // every * boundary + per_block
    return num_blocks * per_block
