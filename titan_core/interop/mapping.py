"""A family's rules, worked out: which region of which of our tensors is which region of which of theirs.

Both directions, the expected shapes and the accounting for every name are read off the one list of pieces.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from titan_core.declare.parameters import Parameter
from titan_core.declare.weights import (
    Drop,
    Link,
    Part,
    Rotary,
    Rule,
    Split,
    Squeeze,
    Stack,
    Step,
    SwapHalves,
    Transpose,
)
from titan_core.interop.boxes import Index, Shape
from titan_core.interop.safetensors import some
from titan_core.runtime.errors import CheckpointError

_PLACEHOLDER = re.compile(r"\\\{(\w+)\\\}")


@dataclass(frozen=True)
class Piece:
    """A region of ours that is a region of theirs.

    Dimension i of theirs is our dimension `order[i]`; our dimensions that are not in `order` have length 1 there.
    `rotary` is the length of heads whose rows (our dimension 0) are in the other order.
    """

    ours: str
    start: Shape
    size: Shape
    theirs: str
    their_start: Shape
    order: tuple[int, ...]
    rotary: int | None = None

    @property
    def their_size(self) -> Shape:
        """Size of the region on their side."""
        return tuple(self.size[dim] for dim in self.order)


@dataclass
class Mapping:
    """All pieces, by our names and by theirs, with the shapes that each side must have.

    `copies` maps a further name of theirs to the one that it repeats; `optional` are those that may be missing.
    """

    ours: dict[str, list[Piece]] = field(default_factory=dict)
    theirs: dict[str, list[Piece]] = field(default_factory=dict)
    our_shapes: dict[str, Shape] = field(default_factory=dict)
    their_shapes: dict[str, Shape] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    optional: set[str] = field(default_factory=set)
    drops: list[tuple[re.Pattern[str], str]] = field(default_factory=list)

    def dropped(self, name: str) -> str | None:
        """Return why a tensor of theirs is left out, None if it is not."""
        return next((reason for pattern, reason in self.drops if pattern.fullmatch(name)), None)

    def check_theirs(self, index: Index, where: str) -> None:
        """Raise `CheckpointError` unless a foreign checkpoint has exactly the tensors of the map, in their shapes."""
        wanted = {**self.their_shapes, **{copy: self.their_shapes[first] for copy, first in self.copies.items()}}
        unknown = [name for name in index if name not in wanted and self.dropped(name) is None]
        missing = [name for name in wanted if name not in index and name not in self.optional]
        _account(index, wanted, unknown, missing, where)

    def check_ours(self, index: Index, where: str) -> None:
        """Raise `CheckpointError` unless one of our checkpoints has exactly the tensors of the map, in their shapes."""
        unknown = [name for name in index if name not in self.our_shapes]
        missing = [name for name in self.our_shapes if name not in index]
        _account(index, self.our_shapes, unknown, missing, where)


def work_out(rules: Sequence[Rule], parameters: Iterable[Parameter]) -> Mapping:
    """Apply rules to the parameters of a model; every parameter must be met by exactly one link."""
    found = Mapping()
    shapes = {p.name: p.shape for p in parameters if p.tied_to is None}
    links = [(_pattern(rule.ours), rule) for rule in rules if isinstance(rule, Link)]
    plain = {rule.ours: rule for _, rule in links if "{" not in rule.ours}
    patterns = [(pattern, rule) for pattern, rule in links if "{" in rule.ours]
    found.drops = [(_pattern(rule.theirs), rule.reason) for rule in rules if isinstance(rule, Drop)]
    met: set[int] = set()
    for name, shape in shapes.items():
        rule, numbers = plain.get(name), {}
        if rule is None:
            matches = ((pattern.fullmatch(name), one) for pattern, one in patterns)
            match, rule = next(((m, one) for m, one in matches if m), (None, None))
            assert rule is not None, f"no rule for `{name}`"
            assert match is not None
            numbers = match.groupdict()
        met.add(id(rule))
        _follow(found, name, shape, rule, numbers)
    idle = [rule.ours for _, rule in links if id(rule) not in met]
    assert not idle, f"rules that no parameter meets: {idle}"
    _tile(found)
    return found


def _follow(found: Mapping, name: str, shape: Shape, rule: Link, numbers: dict[str, str]) -> None:
    """Walk one of our tensors through the steps of its link."""
    whole = tuple(range(len(shape)))
    states = [_State(Piece(name, (0,) * len(shape), shape, "", (0,) * len(shape), whole), dict(numbers))]
    length: dict[int, int] = {}  # of their dimensions, where it is not the size of the piece
    for step in rule.steps:
        states = [moved for state in states for moved in _apply(step, state, length)]
    found.our_shapes[name] = shape
    found.ours[name] = []
    for state in states:
        theirs = _fill(rule.theirs, state.numbers)
        piece = replace(state.piece, theirs=theirs)
        found.ours[name].append(piece)
        found.theirs.setdefault(theirs, []).append(piece)
        for copy in (*rule.copies, *rule.optional_copies):
            found.copies[_fill(copy, state.numbers)] = theirs
            if copy in rule.optional_copies:
                found.optional.add(_fill(copy, state.numbers))
        if length:
            ends = [s + n for s, n in zip(piece.their_start, piece.their_size, strict=True)]
            found.their_shapes[theirs] = tuple(length.get(i, end) for i, end in enumerate(ends))


@dataclass(frozen=True)
class _State:
    piece: Piece
    numbers: dict[str, str]


def _apply(step: Step, state: _State, length: dict[int, int]) -> list[_State]:
    """Return what a step makes of a piece. `their_start` is in the coordinates of the tensor that it lies in by now."""
    piece, numbers = state.piece, state.numbers
    if isinstance(step, Rotary):
        assert piece.size[0] % step.head_dim == 0, f"{piece.ours}: heads do not fit"
        assert piece.order[0] == 0, f"{piece.ours}: the rotary step comes first"
        return [_State(replace(piece, rotary=step.head_dim), numbers)]
    if isinstance(step, Transpose):
        order = _swapped(piece.order, step.first, step.second)
        start = _swapped(piece.their_start, step.first, step.second)
        if step.first in length or step.second in length:
            one, other = length.pop(step.first, None), length.pop(step.second, None)
            length.update({d: n for d, n in ((step.second, one), (step.first, other)) if n is not None})
        return [_State(replace(piece, order=order, their_start=start), numbers)]
    if isinstance(step, Part):
        length[step.dim] = step.of
        return [_State(_moved(piece, step.dim, piece.their_start[step.dim] + step.start), numbers)]
    if isinstance(step, Squeeze):
        order, start = (_without(values, step.dim) for values in (piece.order, piece.their_start))
        assert not any(dim >= step.dim for dim in length), f"{piece.ours}: squeeze before parts are placed"
        return [_State(replace(piece, order=order, their_start=start), numbers)]
    if isinstance(step, Stack):
        return [
            _State(
                replace(part, order=_without(part.order, 0), their_start=_without(part.their_start, 0)),
                {**numbers, step.index: str(i)},
            )
            for i, part in enumerate(_cut(piece, 0, piece.size[piece.order[0]]))
        ]
    parts = _cut(piece, step.dim, 2 if isinstance(step, SwapHalves) else step.parts)
    if isinstance(step, Split):
        return [
            _State(_moved(part, step.dim, piece.their_start[step.dim]), {**numbers, "part": f"{i:02d}"})
            for i, part in enumerate(parts)
        ]
    first, second = parts
    starts = second.their_start[step.dim], first.their_start[step.dim]
    return [_State(_moved(half, step.dim, at), numbers) for half, at in zip(parts, starts, strict=True)]


def _cut(piece: Piece, dim: int, parts: int) -> list[Piece]:
    """Cut a piece along a dimension of theirs into equal parts."""
    ours = piece.order[dim]
    if piece.size[ours] % parts:
        raise CheckpointError(f"`{piece.ours}` has {piece.size[ours]} rows, which do not divide into {parts} parts")
    each = piece.size[ours] // parts
    assert not (piece.rotary and ours == 0 and each % piece.rotary), f"{piece.ours}: heads are cut"
    found = []
    for i in range(parts):
        start, size = list(piece.start), list(piece.size)
        start[ours] += i * each
        size[ours] = each
        part = replace(piece, start=tuple(start), size=tuple(size))
        found.append(_moved(part, dim, piece.their_start[dim] + i * each))
    return found


def _moved(piece: Piece, dim: int, start: int) -> Piece:
    at = list(piece.their_start)
    at[dim] = start
    return replace(piece, their_start=tuple(at))


def _without(values: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return values[:dim] + values[dim + 1 :]


def _swapped(values: tuple[int, ...], first: int, second: int) -> tuple[int, ...]:
    swapped = list(values)
    swapped[first], swapped[second] = values[second], values[first]
    return tuple(swapped)


def _tile(found: Mapping) -> None:
    """Work out the shapes on their side, and look that the pieces fill both sides without a gap or an overlap."""
    for name, pieces in found.theirs.items():
        ends = [[s + n for s, n in zip(p.their_start, p.their_size, strict=True)] for p in pieces]
        shape = found.their_shapes.setdefault(name, tuple(map(max, zip(*ends, strict=True))) if ends[0] else ())
        assert sum(math.prod(p.their_size) for p in pieces) == math.prod(shape), f"`{name}` is not filled once"
    for name, pieces in found.ours.items():
        assert sum(math.prod(p.size) for p in pieces) == math.prod(found.our_shapes[name]), f"`{name}` is not filled"


def _account(index: Index, wanted: dict[str, Shape], unknown: list[str], missing: list[str], where: str) -> None:
    """Raise one error that names everything that does not fit."""
    shapes = [
        f"{name} is {list(index[name][0])}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in index and index[name][0] != shape
    ]
    said = [f"{len(missing)} tensors are missing: {some(missing)}"] if missing else []
    said += [f"{len(unknown)} tensors are unknown: {some(unknown)}"] if unknown else []
    said += [f"{len(shapes)} tensors have another shape: {some(shapes, '; ')}"] if shapes else []
    if said:
        tip = "is this the family and flavor of these weights? nothing was written"
        raise CheckpointError(". ".join(said), where=where, tip=tip)


def _pattern(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a pattern: `{layer}` is a number."""
    seen: set[str] = set()

    def group(match: re.Match[str]) -> str:
        name = match.group(1)
        again = name in seen
        seen.add(name)
        return f"(?P={name})" if again else f"(?P<{name}>\\d+)"

    return re.compile(_PLACEHOLDER.sub(group, re.escape(pattern)))


def _fill(pattern: str, numbers: dict[str, str]) -> str:
    for name, number in numbers.items():
        pattern = pattern.replace(f"{{{name}}}", number)
    return pattern
