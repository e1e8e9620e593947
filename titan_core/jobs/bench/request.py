"""What is asked of a benchmark, in words, checked before torch is loaded."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from titan_core.runtime.errors import UsageError


@dataclass(frozen=True)
class Grouped:
    """A grouped matrix product: `rows` of width `inner`, divided among `groups` experts, to width `outer`."""

    rows: int
    outer: int
    inner: int
    groups: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.outer}x{self.inner} G={self.groups}"


# Rows that meet the experts of one rank, and both products of an expert: gate and up as one, and down. DeepSeek-V3's
# first two are the shapes that DeepGEMM publishes; the others are one GPU's, or an expert-parallel rank of eight.
PRESETS = {
    "deepseek-v3": (
        Grouped(32768, 4096, 7168, 4),
        Grouped(32768, 7168, 2048, 4),
        Grouped(32768, 4096, 7168, 32),
        Grouped(32768, 7168, 2048, 32),
    ),
    "qwen3-30b": (Grouped(262144, 1536, 2048, 128), Grouped(262144, 2048, 768, 128)),
    "mixtral": (Grouped(16384, 28672, 4096, 8), Grouped(16384, 4096, 14336, 8)),
    "llama4": (Grouped(16384, 16384, 5120, 16), Grouped(16384, 5120, 8192, 16)),
}
PASSES = ("fwd", "dx", "dw")
DTYPES = ("bf16", "fp8")


@dataclass(frozen=True)
class Request:
    """What to measure. `backends` empty means all; `imbalance` 0 shares rows equally, 1 gives all to one expert.

    `reduced` shrinks the shapes to what a CPU does in seconds; `seed` draws the inputs.
    """

    shapes: tuple[Grouped, ...] = PRESETS["deepseek-v3"]
    dtype: str = "bf16"
    backends: tuple[str, ...] = ()
    passes: tuple[str, ...] = PASSES
    imbalance: float = 0.0
    reduced: bool = False
    seed: int = 0


def read_shapes(words: Sequence[str]) -> tuple[Grouped, ...]:
    """Read presets and M,N,K,G."""
    found: list[Grouped] = []
    for word in words:
        if word in PRESETS:
            found += PRESETS[word]
        elif re.fullmatch(r"\d+(,\d+){3}", word):
            numbers = [int(part) for part in word.split(",")]
            if min(numbers) < 1:
                raise UsageError(
                    f"`--shapes {word}`: all four must be at least 1", tip="M,N,K,G: rows, out, in, groups"
                )
            found.append(Grouped(*numbers))
        else:
            near = difflib.get_close_matches(word, PRESETS, n=1)
            tip = f"did you mean `{near[0]}`?" if near else "one of " + ", ".join(PRESETS) + ", or M,N,K,G"
            raise UsageError(f"`--shapes` cannot be `{word}`", tip=tip)
    return tuple(found)


def read_list(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Read words with commas between them, each one of the known."""
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1)
            tip = f"did you mean `{near[0]}`?" if near else "one of " + ", ".join(known)
            raise UsageError(f"`{option}` cannot be `{word}`", tip=tip)
    if not words:
        raise UsageError(f"`{option}` is empty", tip="some of " + ", ".join(known))
    return words
