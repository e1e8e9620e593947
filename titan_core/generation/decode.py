"""Decoding token by token over a key/value cache, a batch of prompts of any lengths in step.

All rows stand at the same position. A row whose prompt is longer than the shortest takes its next prompt token where
the others take a drawn one; so there is no padding, and a row's tokens do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from titan_core.declare.parameters import Attention
from titan_core.generation.sampler import Sampling, sample, uniforms
from titan_core.nn import ops
from titan_core.nn.kv_cache import KVCache
from titan_core.runtime.errors import UsageError

_PREFILL = 2048  # prompt tokens at once: bounds the memory of a long prompt


@dataclass
class Continuation:
    """What followed one prompt: ids with their log-probabilities, those of the prompt's tokens from the second on
    if they were asked for, and whether the end token came."""

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    prompt_log_probs: list[float] = field(default_factory=list)
    ended: bool = False


@torch.inference_mode()
def decode(
    model: nn.Module,
    attentions: Sequence[Attention],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | None = None,
    max_seq_len: int | None = None,
    prompt_log_probs: bool = False,
    on_token: Callable[[int, int], None] = lambda row, token: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Continuation]:
    """Continue prompts by up to `max_new_tokens` each, to the end token, or to the model's length.

    `on_token(row, id)` is called as tokens come; `stop()` ends the loop early. Raises `UsageError` for an empty prompt
    or one that fills the model's length.
    """
    lengths = [len(prompt) for prompt in prompts]
    limit = max(lengths) + max_new_tokens
    if min(lengths) == 0:
        raise UsageError("a prompt is empty, and the model has no token to begin with")
    if max_seq_len is not None:
        limit = min(limit, max_seq_len)
        if max(lengths) >= max_seq_len:
            raise UsageError(f"a prompt of {max(lengths)} tokens fills the model's length of {max_seq_len}")
    weight = next(model.parameters())
    cache = _cache(attentions, len(prompts), limit, weight)
    known = _pad(prompts, limit).to(weight.device)
    found = [Continuation() for _ in prompts]
    position = min(lengths)
    logits = _prefill(model, cache, known[:, :position], found if prompt_log_probs else None, lengths)
    random = uniforms(sampling, len(prompts), max_new_tokens)
    while position < limit and not stop():
        drawn_at = torch.tensor([max(0, min(position - n, max_new_tokens - 1)) for n in lengths])
        ids, log_probs = sample(logits, random.gather(1, drawn_at[:, None]).squeeze(1), sampling)
        inside = torch.tensor([position < n for n in lengths], device=ids.device)
        ids = torch.where(inside, known[:, position], ids)
        if prompt_log_probs:
            _note_prompt(found, logits, ids, position, lengths)
        _take(found, ids.tolist(), log_probs.tolist(), position, lengths, max_new_tokens, eos_id, on_token)
        position += 1
        if all(_finished(c, n, position, max_new_tokens) for c, n in zip(found, lengths, strict=True)):
            break
        if position < limit:
            hidden = _hidden(model, ids[:, None], cache)
            logits = _head(model, hidden[:, -1])
    return found


def _finished(continuation: Continuation, length: int, position: int, max_new_tokens: int) -> bool:
    return continuation.ended or position >= length + max_new_tokens


def _take(
    found: list[Continuation],
    ids: list[int],
    log_probs: list[float],
    position: int,
    lengths: list[int],
    max_new_tokens: int,
    eos_id: int | None,
    on_token: Callable[[int, int], None],
) -> None:
    """Give each row its token, if the row is past its prompt and not at its end."""
    for row, continuation in enumerate(found):
        if position < lengths[row] or _finished(continuation, lengths[row], position, max_new_tokens):
            continue
        if ids[row] == eos_id:
            continuation.ended = True
            continue
        continuation.ids.append(ids[row])
        continuation.log_probs.append(log_probs[row])
        on_token(row, ids[row])


def _prefill(
    model: nn.Module, cache: KVCache, tokens_BT: Tensor, found: list[Continuation] | None, lengths: list[int]
) -> Tensor:
    """Run the common part of the prompts in pieces and return the logits (B, V) after it."""
    logits = tokens_BT.new_zeros(0)
    for start in range(0, tokens_BT.shape[1], _PREFILL):
        piece = tokens_BT[:, start : start + _PREFILL]
        hidden = _hidden(model, piece, cache)
        if found is not None:
            for offset in range(piece.shape[1]):
                if start + offset + 1 < tokens_BT.shape[1]:
                    following = tokens_BT[:, start + offset + 1]
                    _note_prompt(found, _head(model, hidden[:, offset]), following, start + offset + 1, lengths)
        logits = _head(model, hidden[:, -1])
    return logits


def _note_prompt(found: list[Continuation], logits: Tensor, ids: Tensor, position: int, lengths: list[int]) -> None:
    """Remember the log-probability of the prompt tokens at a position."""
    log_probs = logits.float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1).tolist()
    for row, continuation in enumerate(found):
        if position < lengths[row]:
            continuation.prompt_log_probs.append(log_probs[row])


def _hidden(model: nn.Module, tokens_BT: Tensor, cache: KVCache) -> Tensor:
    """Run the model on the next tokens of every row."""
    positions = cache.positions(tokens_BT.shape[1], tokens_BT.device)
    hidden = model.hidden(tokens_BT, positions, cache=cache)  # pyright: ignore[reportCallIssue]
    cache.advance(tokens_BT.shape[1])
    return hidden


def _head(model: nn.Module, hidden: Tensor) -> Tensor:
    weight: Tensor = model.head_weight  # pyright: ignore[reportAssignmentType]
    return ops.linear(hidden, weight, hidden.dtype)


def _cache(attentions: Sequence[Attention], rows: int, capacity: int, weight: Tensor) -> KVCache:
    kept = [a.cached or (a.num_kv_heads, a.qk_dim, a.v_dim) for a in attentions]
    return KVCache(kept=kept, batch=rows, capacity=capacity, device=weight.device, dtype=weight.dtype)


def _pad(prompts: Sequence[Sequence[int]], limit: int) -> Tensor:
    known = torch.zeros(len(prompts), limit, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        known[row, : len(prompt)] = torch.tensor(prompt)
    return known
