"""`titan generate llm`: prompts in, text out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from titan_core.data.tokenizer import StreamDecoder
from titan_core.generation.decode import decode
from titan_core.generation.sampler import Sampling
from titan_core.jobs.load import Trained, load_language
from titan_core.runtime.errors import UsageError
from titan_core.runtime.events import Listener, Note, Text, silent


@dataclass(frozen=True)
class Generated:
    """One prompt and what followed it."""

    prompt: str | None
    prompt_ids: list[int]
    prompt_log_probs: list[float]
    text: str
    ids: list[int]
    log_probs: list[float]
    ended: bool


@dataclass(frozen=True)
class GenerateResult:
    """What was generated, from which checkpoint, and how fast (tokens of all rows a second; seconds to the first)."""

    checkpoint: str
    step: int
    outputs: list[Generated]
    tokens: int
    tokens_per_second: float
    seconds_to_first_token: float


def run(
    checkpoint: str,
    prompts: Sequence[str],
    *,
    prompt_ids: Sequence[Sequence[int]] = (),
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    log_probs: bool = False,
    device: str | None = None,
    listener: Listener = silent,
) -> GenerateResult:
    """Continue prompts, given as text or as ids. A single prompt is streamed to the listener as it grows."""
    trained = load_language(checkpoint, device=device)
    encoded = [list(ids) for ids in prompt_ids] or [
        trained.tokenizer.encode(text, add_bos=True, add_eos=False) for text in prompts
    ]
    if not encoded:
        raise UsageError("there is no prompt", tip="give --prompt, --prompts or --prompt-ids")
    _check_ids(encoded, trained)
    if max(map(len, encoded)) + max_new_tokens > trained.shared["config"]["training"]["seq_len"]:
        seq_len = trained.shared["config"]["training"]["seq_len"]
        listener(Note(f"the text may grow beyond the {seq_len} tokens that the model was trained on"))
    stream = _Stream(trained, listener) if len(encoded) == 1 else None
    timer = _Timer()

    def on_token(row: int, token: int) -> None:
        timer.tick()
        if stream is not None:
            stream.push(token)

    found = decode(
        trained.model,
        trained.family.attentions(trained.sizes),
        encoded,
        max_new_tokens=max_new_tokens,
        sampling=sampling or Sampling(),
        eos_id=trained.tokenizer.eos_id,
        max_seq_len=trained.sizes.max_seq_len,
        prompt_log_probs=log_probs,
        on_token=on_token,
    )
    if stream is not None:
        stream.finish()
    texts = [None] * len(encoded) if prompt_ids else list(prompts)
    outputs = [
        Generated(text, ids, c.prompt_log_probs, trained.tokenizer.decode(c.ids), c.ids, c.log_probs, c.ended)
        for text, ids, c in zip(texts, encoded, found, strict=True)
    ]
    return GenerateResult(trained.path, trained.shared["step"], outputs, timer.tokens, timer.rate(), timer.first)


class _Timer:
    """Counts tokens; the rate leaves out the first, which waits for the prompt."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.tokens = 0
        self.first = 0.0

    def tick(self) -> None:
        self.tokens += 1
        self._last = time.perf_counter()
        if self.tokens == 1:
            self.first = self._last - self._began

    def rate(self) -> float:
        if self.tokens < 2:
            return 0.0
        return (self.tokens - 1) / (self._last - self._began - self.first)


class _Stream:
    """Passes text on as soon as its characters are whole."""

    def __init__(self, trained: Trained, listener: Listener) -> None:
        self._decoder = StreamDecoder(trained.tokenizer)
        self._listener = listener

    def push(self, token: int) -> None:
        piece = self._decoder.push(token)
        if piece:
            self._listener(Text(piece))

    def finish(self) -> None:
        self._listener(Text(self._decoder.finish() + "\n"))


def _check_ids(encoded: Sequence[Sequence[int]], trained: Trained) -> None:
    vocab = trained.sizes.vocab_size
    for ids in encoded:
        for token in ids:
            if not 0 <= token < vocab:
                raise UsageError(f"token id {token} is not below the vocabulary's {vocab}", where="--prompt-ids")
