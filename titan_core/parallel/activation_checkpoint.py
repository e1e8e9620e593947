"""Activation checkpointing: recompute in the backward instead of storing.

A block's `forward` is replaced, not the block: names of parameters and modules stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._higher_order_ops.flex_attention import flex_attention
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from titan_core.config.schema import ActivationCheckpoint
from titan_core.nn.layers import Linear

_aten = torch.ops.aten
# What is worth storing: every kind of attention, reductions across ranks, and (every second) matmul.
SAVED_OPS = {
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_attention_math.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
    flex_attention,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    _aten.max.default,
}
_MARKS = (
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
)
MATMUL_OPS = {_aten.mm.default, _aten.linear.default}


def apply(blocks: Sequence[nn.Module], config: ActivationCheckpoint, forced: set[torch.Size]) -> str:
    """Make blocks recompute as configured, and return a few words that say what was done.

    `forced` is what `forced_shapes` gave before parameters were sharded by views.
    """
    if config.mode == "none":
        return "none"
    if config.mode == "memory_budget":
        import torch._functorch.config as functorch_config

        functorch_config.activation_memory_budget = config.memory_budget
        functorch_config.visualize_memory_budget_pareto = config.visualize_memory_budget_pareto
        return f"compiler's choice at budget {config.memory_budget}"
    if config.mode == "full":
        chosen, context = list(blocks), None
        said = "every block"
    elif config.selective_ac_option == "op":
        chosen = list(blocks)
        said = "by operation"
        context = partial(_contexts, forced)
    else:
        every = int(config.selective_ac_option)
        chosen, context = list(blocks[every - 1 :: every]), None
        said = f"every block, n = {every}" if every == 1 else f"one block in {every}"
    for block in chosen:
        _wrap(block, context, config.early_stop)
    return said


def _wrap(block: nn.Module, context: Any, early_stop: bool) -> None:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if context is not None:
        options["context_fn"] = context
    options["early_stop"] = early_stop
    block.forward = partial(checkpoint, block.forward, **options)


def forced_shapes(blocks: Sequence[nn.Module], config: ActivationCheckpoint) -> set[torch.Size]:
    """Return the (in, out) shapes of the linear layers that are recomputed in spite of the policy."""
    patterns = config.per_op_sac_force_recompute_mm_shapes_by_fqns
    shapes = set()
    for block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, Linear) and any(p in name for p in patterns):
                shapes.add(torch.Size(reversed(module.weight.shape)))
    return shapes


def _contexts(forced: set[torch.Size]) -> Any:
    """Store costly operations and every second matmul, recompute the rest (torchtitan's balance)."""
    counts = {"forward": 0, "recompute": 0}
    # torch 2.14 wants every operation of the forward again, and FSDP of experts marks its work otherwise then
    SAC_IGNORED_OPS.update(_MARKS)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in MATMUL_OPS:
            weight: Any = args[1]
            right = weight.shape if op is _aten.mm.default else torch.Size(reversed(weight.shape))
            if right in forced:
                return CheckpointPolicy.PREFER_RECOMPUTE
            phase = "recompute" if ctx.is_recompute else "forward"
            counts[phase] += 1
            return _keep(counts[phase] % 2 == 1)
        return _keep(op in SAVED_OPS)

    return create_selective_checkpoint_contexts(policy)


def _keep(keep: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
