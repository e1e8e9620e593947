"""What a family says of its parameters, once: name, shape, role, initial distribution.

One table a family, plain Python. Initialisation, optimizer groups, muP, quantization, the weight maps' shape checks and
the counts of parameters, FLOPs and bytes all read it; a test holds it against the module that it describes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["embedding", "input", "condition", "hidden", "output", "norm", "bias", "expert", "router"]


@dataclass(frozen=True)
class Normal:
    """Normal distribution with mean 0, cut at `cut` standard deviations when that is given."""

    std: float
    cut: float | None = None


@dataclass(frozen=True)
class Constant:
    """Every element is `value`."""

    value: float


Init = Normal | Constant


@dataclass(frozen=True)
class Parameter:
    """One parameter: fully qualified name, shape in (out, in) order, role, and initial distribution.

    `active` is the share of the parameter's matmul that one token uses (k / E for routed experts). `tied_to` names
    the parameter that stands in for this one: its matmul counts, but the module has no parameter of this name. Where
    the two would lie in different stages of a pipeline, each stage has the one that there is. What is not `trained` is
    a buffer of the module: stored and loaded, but no gradient reaches it. `per` names the kinds of rows that meet the
    parameter, where not every token does: a family's `lengths` says how many there are.

    An `input` is a matmul from data to the model's width, a `condition` one whose rows are whole samples.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    init: Init
    active: float = 1.0
    tied_to: str | None = None
    trained: bool = True
    per: tuple[str, ...] = ("token",)

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Attention:
    """One attention layer, as FLOP and memory counts need it; tokens of all kinds in `per` meet each other.

    `cached` is what a cache keeps of a token: heads and two widths; without it, that of keys and values.
    """

    num_heads: int
    num_kv_heads: int
    qk_dim: int
    v_dim: int
    window: int | None = None
    cached: tuple[int, int, int] | None = None
    causal: bool = True
    per: tuple[str, ...] = ("token",)
