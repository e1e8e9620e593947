"""Bytes a rank needs, by kind, from what a family declares and a config says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from titan_core.config.schema import Config
from titan_core.declare.parameters import Parameter

GIB = 1 << 30
_BYTES = {"float32": 4, "bfloat16": 2}
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


def data_parallel_memory(
    config: Config, parameters: Sequence[Parameter], num_blocks: int, vocab_size: int, *, shards: int
) -> Memory:
    """Estimate the memory of a rank whose parameters are split over `shards` ranks.

    Activations: with every block recomputed its input is kept, and one block's own; without, what `_block_width` says.
    Attention is taken not to store its scores. FSDP gathers two blocks at once (the next is prefetched), or all where
    it does not free them; and between the microbatches of a step it keeps the gradient of every parameter whole.
    """
    training = config.training
    own = [p for p in parameters if p.tied_to is None]
    total = sum(p.numel for p in own)
    store, compute = _BYTES[training.dtype], _BYTES[training.mixed_precision_param]
    local = -(-total // shards)
    blocks = [p for p in own if p.role not in ("embedding", "output")]
    block = sum(p.numel for p in blocks) // max(num_blocks, 1)
    rest = total - block * num_blocks
    offload = training.enable_cpu_offload
    share, whole = store * local, 0
    gathered = compute * total if compute != store else 0
    if shards > 1 or offload:
        kept = num_blocks if config.parallelism.fsdp_reshard_after_forward == "never" else min(2, num_blocks)
        gathered = compute * (rest + kept * block)
        whole = _BYTES[training.mixed_precision_reduce] * total if _microbatches(config, shards) > 1 else 0
    tokens = training.local_batch_size * training.seq_len
    width = next(p.shape[-1] for p in own if p.role == "embedding")
    per_block = compute * tokens * _block_width(blocks, width) // max(num_blocks, 1)
    return Memory(
        weights=share,
        gradients=share + whole if offload else max(share, whole),
        optimizer=2 * share,
        gathered=gathered,
        activations=_activations(config, num_blocks, compute * tokens * width, per_block),
        logits=6 * min(_LOGITS_AT_ONCE, tokens * vocab_size) + 4 * vocab_size * width,
        host=4 * share if offload else 0,
    )


def _microbatches(config: Config, shards: int) -> int:
    ranks = shards * config.parallelism.data_parallel_replicate_degree
    return max(1, config.training.global_batch_size // (config.training.local_batch_size * ranks))


def _block_width(blocks: Sequence[Parameter], width: int) -> int:
    """Return how many numbers all blocks save for a token: what comes out of the matmuls and the norms, and what goes
    into the matmuls that write to the residual stream. Square ones count as such, on the side of too much."""
    matrices = [p.shape for p in blocks if len(p.shape) == 2]
    norms = [p.shape[0] for p in blocks if p.role == "norm"]
    return sum(out for out, _ in matrices) + sum(norms) + sum(into for out, into in matrices if out == width <= into)


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
