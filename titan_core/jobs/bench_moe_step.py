"""`titan bench moe-step`: a training step of DeepSeek's debug sizes, beside transformers and a loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_core.data.loader import Batch
from titan_core.jobs.side_by_side import Row, agree, pair, take_turns
from titan_core.models import family
from titan_core.nn.experts import Backend, Experts
from titan_core.quantization.machine import torchao
from titan_core.runtime.errors import missing_extra
from titan_core.runtime.events import Listener, silent
from titan_core.tasks.causal_lm import CausalLM

_ROWS, _LENGTH = 8, 256
_OURS: dict[str, Backend] = {"titan": "titan", "titan, loop": "loop"}
_THEIRS = {"transformers": "grouped_mm", "transformers, eager": "eager"}
_SIZES: dict[str, Any] = {"score": "sigmoid", "score_bias": True, "group_score": "top2", "normalise_scores": True}


def run(
    *, rounds: int = 5, dtype: Literal["float32", "bfloat16"] = "float32", listener: Listener = silent
) -> list[Row]:
    """Measure all; raises `RunFailed` if their first losses differ."""
    deepseek = family("deepseek_v3")
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    ours, theirs = pair(deepseek, deepseek.sizes("debugmodel", **_SIZES), _transformers, kind)
    tokens = torch.randint(2048, (_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))
    task = CausalLM(ours, document_masks=False)
    losses: dict[str, Callable[[], Tensor]] = {}
    for name, backend in _OURS.items():
        losses[name] = partial(_our_loss, task, backend, tokens)
    for name, implementation in _THEIRS.items():
        losses[name] = partial(_their_loss, theirs, implementation, tokens)
    with torch.no_grad():
        agree("losses", {name: loss() for name, loss in losses.items()}, listener)
    steps = {model: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) for model in (ours, theirs)}
    calls = {
        ("training step", name): partial(_train, loss, steps[ours if name in _OURS else theirs])
        for name, loss in losses.items()
    }
    return take_turns(calls, rounds)


def _transformers(config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    try:
        with torchao():  # transformers imports it where it is installed
            import transformers
            from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ImportError:
        raise missing_extra("transformers", "test") from None
    transformers.logging.disable_progress_bar()
    loaded = DeepseekV3ForCausalLM.from_pretrained(None, config=DeepseekV3Config(**config), state_dict=tensors)
    return loaded.train()


def _our_loss(task: CausalLM, backend: Backend, tokens_BT: Tensor) -> Tensor:
    for module in task.modules():
        if isinstance(module, Experts):
            module.backend = backend
    labels = tokens_BT.roll(-1, 1)
    return task(Batch(tokens_BT, labels, torch.zeros_like(tokens_BT))) / labels.numel()


def _their_loss(model: Any, implementation: str, tokens_BT: Tensor) -> Tensor:
    model.set_experts_implementation(implementation)
    logits = model(tokens_BT, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens_BT.roll(-1, 1).flatten())


def _train(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()
