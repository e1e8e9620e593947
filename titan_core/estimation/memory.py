"""Bytes a rank needs, by kind, from what a family declares and a config says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from titan_core.config.schema import Config
from titan_core.declare.parameters import Parameter

GIB = 1 << 30
_BYTES = {"float32": 4, "bfloat16": 2}
_LOGITS_AT_ONCE = 1 << 24  # titan_core.nn.loss


@dataclass(frozen=True)
class Memory:
    """Bytes a rank: its share of weights, gradients and optimizer state, what FSDP gathers, activations, logits."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the kinds by name."""
        return dict(vars(self))


def data_parallel_memory(
    config: Config, parameters: Sequence[Parameter], num_blocks: int, vocab_size: int, *, shards: int
) -> Memory:
    """Estimate the memory of a rank whose parameters are split over `shards` ranks.

    Activations: with every block recomputed its input is kept, and one block's own; without, what a pre-norm block with
    SwiGLU saves: the outputs of its matmuls and their inputs. Two blocks are gathered at once (the next is prefetched).
    """
    training = config.training
    own = [p for p in parameters if p.tied_to is None]
    total = sum(p.numel for p in own)
    store, compute = _BYTES[training.dtype], _BYTES[training.mixed_precision_param]
    local = -(-total // shards)
    blocks = [p for p in own if p.role not in ("embedding", "output")]
    block = sum(p.numel for p in blocks) // max(num_blocks, 1)
    rest = total - block * num_blocks
    gathered = compute * (rest + 2 * block) if shards > 1 else (compute * total if compute != store else 0)
    tokens = training.local_batch_size * training.seq_len
    width = next(p.shape[-1] for p in own if p.role == "embedding")
    per_block = compute * tokens * (2 * width + sum(p.shape[0] for p in blocks if len(p.shape) == 2) // num_blocks * 2)
    return Memory(
        weights=store * local,
        gradients=store * local,
        optimizer=2 * store * local,
        gathered=gathered,
        activations=_activations(config, num_blocks, compute * tokens * width, per_block),
        logits=6 * min(_LOGITS_AT_ONCE, tokens * vocab_size) + 4 * vocab_size * width,
    )


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
