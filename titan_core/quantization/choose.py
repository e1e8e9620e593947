"""Which linear layers are quantized, and a sentence about those that are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from titan_core.config.quantize import AUTO_FILTER
from titan_core.declare.parameters import Parameter
from titan_core.declare.sharding import Sharding
from titan_core.nn.layers import Linear

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]


@dataclass(frozen=True)
class Rules:
    """What keeps a layer in high precision.

    `filters` are parts of layer names. Both sides of a weight must be multiples of `multiple`, the granule of the
    hardware's matmul (16 bytes) or of the scales (32 numbers). `recipe` is set where small layers are left out.
    """

    filters: tuple[str, ...]
    multiple: int
    recipe: Recipe | None

    @staticmethod
    def of(filter_fqns: Sequence[str], multiple: int, recipe: Recipe | None = None) -> Rules:
        """Read the filters of a config, among which may be the word that leaves small layers out."""
        filters = tuple(pattern for pattern in filter_fqns if pattern != AUTO_FILTER)
        return Rules(filters, multiple, recipe if AUTO_FILTER in filter_fqns else None)


@dataclass(frozen=True)
class Choice:
    """Layers by name, in the model's order: those to convert, and (name, reason) of those left as they are.

    `unused` are the filters that match no parameter.
    """

    chosen: dict[str, Linear]
    left: list[tuple[str, str]]
    unused: list[str]

    def reasons(self) -> str:
        """Say which layers stay in high precision and why, alike layers as one pattern."""
        reasons: dict[str, dict[str, int]] = {}
        for name, reason in self.left:
            patterns = reasons.setdefault(reason, {})
            pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
            patterns[pattern] = patterns.get(pattern, 0) + 1
        said = [f"{sum(patterns.values())} {why}: {', '.join(patterns)}" for why, patterns in sorted(reasons.items())]
        return "; ".join(said)


def choose(model: nn.Module, declared: Sequence[Parameter], rules: Rules, sharding: Sharding, tp: int) -> Choice:
    """Look at every linear layer of a model; the declared role of its weight says what it is for.

    What counts is the matmul of one rank: its part of a weight that tensor parallelism splits over `tp` ranks.
    """
    roles = {parameter.name: parameter.role for parameter in declared}
    chosen: dict[str, Linear] = {}
    left: list[tuple[str, str]] = []
    for name, layer in _linears(model):
        rows, columns = layer.weight.shape
        dim = sharding.split_dim(name)
        mine = (rows // tp if dim == -2 else rows, columns // tp if dim == -1 else columns)
        reason = _reason(name, mine, roles[f"{name}.weight"], rules)
        if reason is None:
            chosen[name] = layer
        else:
            left.append((name, reason))
    unused = [pattern for pattern in rules.filters if not any(pattern in name for name in roles)]
    return Choice(chosen, left, unused)


def _linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            yield name, module


def _reason(name: str, shape: tuple[int, int], role: str, rules: Rules) -> str | None:
    """Say why a layer stays in high precision, or None."""
    rows, columns = shape
    if role != "hidden":  # heads and routers decide by small differences; the loss also uses a head's weight directly
        return f"of role `{role}`"
    if any(pattern in name for pattern in rules.filters):
        return "by filter_fqns"
    if rows % rules.multiple or columns % rules.multiple:
        return f"of {rows} x {columns}, no multiples of {rules.multiple}"
    if rules.recipe is not None and not pays(rows, columns, rules.recipe):
        return f"of {rows} x {columns}, too small to pay"
    return None


def pays(rows: int, columns: int, recipe: Recipe) -> bool:
    """Is a (rows, columns) weight large enough for float8 to beat bf16?

    Thresholds measured on H100s by torchao (docs of torchao.float8, "performance"). Below them the casts cost more than
    the matmul gains. There are none for `rowwise_with_gw_hp`, which the config's checks refuse.
    """
    if recipe == "tensorwise":
        return rows > 1024 or columns > 4096
    return rows > 2048 and columns > 1024 and (rows > 4096 or columns > 2048)
