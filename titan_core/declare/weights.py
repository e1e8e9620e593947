"""How a family's parameters lie in foreign checkpoints: data, read by the one engine in `interop/`, in both directions.

A map is a list of rules. A `Link` follows one of our tensors to theirs, step by step; every step only moves numbers, so
each can be undone, and the engine derives both directions from the one list. Patterns hold `{layer}` and the like: the
numbers come from the family's own parameter names. Every name on both sides must be met by a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Rotary:
    """Rows of each head: ours rotate neighbours (0, 1), (2, 3), ..., theirs halves (0, h/2), (1, h/2 + 1), ..."""

    head_dim: int


@dataclass(frozen=True)
class Transpose:
    """Two dimensions change places."""

    first: int
    second: int


@dataclass(frozen=True)
class Part:
    """Their tensor holds ours at `start` of a dimension that is `of` long: links of other tensors fill the rest."""

    dim: int
    start: int
    of: int


@dataclass(frozen=True)
class Squeeze:
    """A dimension of length 1 is not there on their side."""

    dim: int


@dataclass(frozen=True)
class Stack:
    """They have a tensor for each index of our first dimension: `{index}` in their name, counted from 0."""

    index: str = "expert"


@dataclass(frozen=True)
class Split:
    """They cut a dimension into equal parts, a tensor for each: `{part}` in their name, two digits."""

    dim: int
    parts: int


@dataclass(frozen=True)
class SwapHalves:
    """The two halves of a dimension change places."""

    dim: int


Step = Rotary | Transpose | Part | Squeeze | Stack | Split | SwapHalves


@dataclass(frozen=True)
class Link:
    """One of our tensors and where it lies on their side.

    `copies` are further names under which they keep the same numbers: read, they must be equal; written, they are
    written again. `optional_copies` may be missing, and are not written.
    """

    ours: str
    theirs: str
    steps: tuple[Step, ...] = ()
    copies: tuple[str, ...] = ()
    optional_copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drop:
    """A tensor of theirs that carries nothing that we need."""

    theirs: str
    reason: str


Rule = Link | Drop


@dataclass(frozen=True)
class MetaLayout:
    """How a folder of `consolidated.NN.pth` was written: parts, whether wq, wk and wv are one tensor, and along which
    dimension the embedding is cut."""

    parts: int = 1
    fused_qkv: bool = False
    embedding_dim: int = 0


@dataclass(frozen=True)
class Meta:
    """A family's form in Meta's folders: the map, and sizes from and to `params.json`.

    Their names are `NN/key`: the number of the file, and the key in it.
    """

    rules: Callable[[Any, MetaLayout], Sequence[Rule]]
    read_params: Callable[[Mapping[str, Any]], Any]
    write_params: Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class SingleFile:
    """A family's form in one safetensors file without a config, as its makers publish it.

    `read_shapes(shapes)` returns the sizes that the names and shapes of its tensors say, None if it is of another
    family.
    """

    rules: Callable[[Any], Sequence[Rule]]
    read_shapes: Callable[[Mapping[str, tuple[int, ...]]], Any]


@dataclass(frozen=True)
class Composite:
    """A larger model, of which the family computes a part.

    In its `config.json` the part's lies under `config`, in its tensors' names the part's follow `prefix`. `others` are
    the prefixes of what is left out.
    """

    model_types: tuple[str, ...]
    config: str
    prefix: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class Weights:
    """What a family knows of foreign checkpoints.

    `model_types` are the values of `model_type` (transformers) or `_class_name` (diffusers) in a `config.json` that
    mean this family; `library` is who reads such folders. `read_config(config)` returns
    the sizes, or raises `UsageError` for an architecture that the family does not compute; `write_config(sizes)`
    returns a `config.json` that transformers loads. `held(sizes, names)` returns the sizes without what a folder with
    tensors of these names leaves out, though its config says that it is there. `unscaled` are patterns of projections
    that stay as they are where the others are stored in float8. `composite` are models that have one like it inside.
    """

    model_types: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    rules: Callable[[Any], Sequence[Rule]]
    meta: Meta | None = None
    single: SingleFile | None = None
    library: Literal["transformers", "diffusers"] = "transformers"
    held: Callable[[Any, Collection[str]], Any] = lambda sizes, names: sizes
    unscaled: tuple[str, ...] = ()
    composite: Composite | None = None
