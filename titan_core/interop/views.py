"""Sources made of sources: under the names of the other side, in another dtype, without block scales."""

from __future__ import annotations

import math
from collections.abc import Mapping as AnyMapping

import torch
from torch import Tensor

from titan_core.interop.boxes import Index, Shape, Source, overlap, read_whole
from titan_core.interop.files import Run
from titan_core.interop.mapping import Mapping, Piece
from titan_core.runtime.errors import CheckpointError


class OurView:
    """A foreign checkpoint under our names."""

    def __init__(self, source: Source, mapping: Mapping) -> None:
        self.source = source
        self.mapping = mapping
        self.index: Index = {
            name: (mapping.our_shapes[name], _dtype([source.index[p.theirs][1] for p in pieces]))
            for name, pieces in mapping.ours.items()
        }

    def read(self, name: str, start: Shape, size: Shape) -> Tensor:
        """Return a region of one of our tensors, reading no more than it needs (with rotation: its whole heads)."""
        found = []
        for piece in self.mapping.ours[name]:
            shared = _shared(start, size, piece.start, piece.size)
            if shared is not None:
                found.append((shared[0], _ours_of(self.source, piece, *shared)))
        return _assemble(found, start, size, self.index[name][1])

    def locate(self, name: str, start: Shape, size: Shape) -> Run | None:
        """Return where a region lies: within one piece that is theirs as it is."""
        for piece in self.mapping.ours[name]:
            if _shared(start, size, piece.start, piece.size) == (start, size):
                at = _plainly(start, piece.start, piece.their_start, piece)
                same = self.source.index[piece.theirs][1] == self.index[name][1]
                return self.source.locate(piece.theirs, at, size) if at is not None and same else None
        return None


class TheirView:
    """One of our checkpoints under foreign names."""

    def __init__(self, source: Source, mapping: Mapping) -> None:
        self.source = source
        self.mapping = mapping
        shapes, copies = mapping.their_shapes, mapping.copies
        index = {n: (shapes[n], _dtype([source.index[p.ours][1] for p in ps])) for n, ps in mapping.theirs.items()}
        index.update({copy: index[first] for copy, first in copies.items() if copy not in mapping.optional})
        self.index: Index = index

    def read(self, name: str, start: Shape, size: Shape) -> Tensor:
        """Return a region of one of their tensors."""
        found = []
        for piece in self.mapping.theirs[self.mapping.copies.get(name, name)]:
            shared = _shared(start, size, piece.their_start, piece.their_size)
            if shared is not None:
                found.append((shared[0], _theirs_of(self.source, piece, *shared)))
        return _assemble(found, start, size, self.index[name][1])

    def locate(self, name: str, start: Shape, size: Shape) -> Run | None:
        """Return where a region lies: within one piece that is ours as it is."""
        for piece in self.mapping.theirs[self.mapping.copies.get(name, name)]:
            if _shared(start, size, piece.their_start, piece.their_size) == (start, size):
                at = _plainly(start, piece.their_start, piece.start, piece)
                same = self.source.index[piece.ours][1] == self.index[name][1]
                return self.source.locate(piece.ours, at, size) if at is not None and same else None
        return None


class InsideView:
    """The tensors of a model that lies inside a larger one, under the names that it has alone.

    What has neither `prefix` nor one of the `others` keeps its name, as does what would get the name of another:
    whoever accounts for names will refuse it.
    """

    def __init__(self, source: Source, prefix: str, others: tuple[str, ...]) -> None:
        self.source = source
        kept = [name for name in source.index if not name.startswith(others)]
        self.names = {name if (short := name.removeprefix(prefix)) in source.index else short: name for name in kept}
        self.index: Index = {short: source.index[name] for short, name in self.names.items()}

    def read(self, name: str, start: Shape, size: Shape) -> Tensor:
        """Return a region."""
        return self.source.read(self.names[name], start, size)

    def locate(self, name: str, start: Shape, size: Shape) -> Run | None:
        """Return where a region lies."""
        return self.source.locate(self.names[name], start, size)


def unequal_copies(source: Source, mapping: Mapping) -> list[str]:
    """Return the names of theirs that should repeat another tensor and do not; reads both."""
    return [
        copy
        for copy, first in mapping.copies.items()
        if copy in source.index and not _same(read_whole(source, copy), read_whole(source, first))
    ]


class CastView:
    """A source with its floating-point tensors in another dtype."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source = source
        self.index: Index = {
            name: (shape, dtype if stored.is_floating_point else stored)
            for name, (shape, stored) in source.index.items()
        }

    def read(self, name: str, start: Shape, size: Shape) -> Tensor:
        """Return a region, cast."""
        return self.source.read(name, start, size).to(self.index[name][1])

    def locate(self, name: str, start: Shape, size: Shape) -> Run | None:
        """Return where a region lies that is not cast."""
        same = self.source.index[name][1] == self.index[name][1]
        return self.source.locate(name, start, size) if same else None


def _dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """Return the dtype that holds all of these without loss."""
    first = dtypes[0]
    for dtype in dtypes[1:]:
        first = first if dtype == first else torch.promote_types(first, dtype)
    return first


def _shared(start: Shape, size: Shape, other: Shape, other_size: Shape) -> tuple[Shape, Shape] | None:
    """Return the region that two regions share, None if they share nothing."""
    both = [overlap(*ranges) for ranges in zip(start, size, other, other_size, strict=True)]
    if any(n == 0 for _, n in both) and 0 not in size:
        return None
    return tuple(s for s, _ in both), tuple(n for _, n in both)


def _plainly(start: Shape, base: Shape, other_base: Shape, piece: Piece) -> Shape | None:
    """Return where a place of one side is on the other, None for a piece that is turned or rotated."""
    if piece.rotary or piece.order != tuple(range(len(piece.size))):
        return None
    return tuple(other + at - low for at, low, other in zip(start, base, other_base, strict=True))


def _assemble(found: list[tuple[Shape, Tensor]], start: Shape, size: Shape, dtype: torch.dtype) -> Tensor:
    """Put regions together; a single one that is all is passed on as it is."""
    if len(found) == 1 and tuple(found[0][1].shape) == tuple(size):
        return found[0][1].to(dtype)
    out = torch.empty(size, dtype=dtype)
    for at, tensor in found:
        target = out
        for dim, (place, base) in enumerate(zip(at, start, strict=True)):
            target = target.narrow(dim, place - base, tensor.shape[dim])
        target.copy_(tensor)
    return out


def _ours_of(source: Source, piece: Piece, start: Shape, size: Shape) -> Tensor:
    """Read a region of ours that lies within one piece."""
    inner = [s - base for s, base in zip(start, piece.start, strict=True)]
    extent, skip = list(size), 0
    if piece.rotary:
        inner[0], extent[0], skip = _whole_heads(inner[0], extent[0], piece.rotary)
    their_start = tuple(at + inner[dim] for at, dim in zip(piece.their_start, piece.order, strict=True))
    raw = source.read(piece.theirs, their_start, tuple(extent[dim] for dim in piece.order))
    tensor = _to_our_dims(raw, piece.order, extent)
    if piece.rotary:
        tensor = halves_to_pairs(tensor, piece.rotary).narrow(0, skip, size[0])
    return tensor


def _theirs_of(source: Source, piece: Piece, start: Shape, size: Shape) -> Tensor:
    """Read a region of theirs that lies within one piece."""
    first, extent, skip = list(piece.start), list(piece.size), 0
    for dim, at, base, length in zip(piece.order, start, piece.their_start, size, strict=True):
        first[dim], extent[dim] = piece.start[dim] + at - base, length
    if piece.rotary:
        inner, extent[0], skip = _whole_heads(first[0] - piece.start[0], extent[0], piece.rotary)
        first[0] = piece.start[0] + inner
    tensor = source.read(piece.ours, tuple(first), tuple(extent))
    if piece.rotary:
        place = piece.order.index(0)
        tensor = pairs_to_halves(tensor, piece.rotary).narrow(0, skip, size[place])
        extent[0] = size[place]
    others = tuple(dim for dim in range(len(extent)) if dim not in piece.order)
    return tensor.permute((*piece.order, *others)).reshape([extent[dim] for dim in piece.order])


def _to_our_dims(raw: Tensor, order: tuple[int, ...], extent: list[int]) -> Tensor:
    others = [dim for dim in range(len(extent)) if dim not in order]
    full = raw.reshape((*raw.shape, *(1 for _ in others)))
    places = {dim: i for i, dim in enumerate((*order, *others))}
    return full.permute(tuple(places[dim] for dim in range(len(extent))))


def _whole_heads(start: int, length: int, head: int) -> tuple[int, int, int]:
    """Return start and length of the whole heads around some rows, and how many rows come before them."""
    first = start - start % head
    return first, math.ceil((start + length) / head) * head - first, start - first


def halves_to_pairs(rows: Tensor, head: int) -> Tensor:
    """Reorder the rows of heads that rotate halves into those that rotate neighbours."""
    return _reorder(rows, 2, head // 2)


def pairs_to_halves(rows: Tensor, head: int) -> Tensor:
    """Undo `halves_to_pairs`."""
    return _reorder(rows, head // 2, 2)


def _reorder(rows: Tensor, first: int, second: int) -> Tensor:
    return rows.reshape(-1, first, second, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _same(a: Tensor, b: Tensor) -> bool:
    """Are two tensors the same, bit for bit?"""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ---------------------------------------------------------------------------------------------- block scales

BLOCK = 128
SCALE = "_scale_inv"
_FLOAT8 = torch.float8_e4m3fn


class Dequantised:
    """A source whose float8 weights with a scale for each 128 x 128 block are read as plain numbers.

    `w[i, j] = float32(q[i, j]) * scale[i // 128, j // 128]`, rounded once to `dtype`: the formula of DeepSeek-V3.
    """

    def __init__(self, source: Source, dtype: torch.dtype = torch.bfloat16, block: tuple[int, int] = (BLOCK, BLOCK)):
        self.source = source
        self.dtype = dtype
        self.block = block
        self.scales = {
            n: n + SCALE for n, (_, kind) in source.index.items() if kind == _FLOAT8 and n + SCALE in source.index
        }
        _check_scales(source.index, self.scales, block)
        hidden = set(self.scales.values())
        self.index: Index = {
            name: (shape, dtype if name in self.scales else stored)
            for name, (shape, stored) in source.index.items()
            if name not in hidden
        }

    def read(self, name: str, start: Shape, size: Shape) -> Tensor:
        """Return a region; of the scales only those of its blocks are read."""
        values = self.source.read(name, start, size)
        if name not in self.scales:
            return values
        first = tuple(at // block for at, block in zip(start, self.block, strict=True))
        last = tuple(-(-(at + n) // block) for at, n, block in zip(start, size, self.block, strict=True))
        count = tuple(b - a for a, b in zip(first, last, strict=True))
        scales = self.source.read(self.scales[name], first, count).float()
        out = values.float()
        for i in range(count[0]):  # a row of blocks at a time: no second tensor of the region's size
            top = max((first[0] + i) * self.block[0] - start[0], 0)
            bottom = min((first[0] + i + 1) * self.block[0] - start[0], size[0])
            columns = scales[i].repeat_interleave(self.block[1])[start[1] - first[1] * self.block[1] :][: size[1]]
            out[top:bottom] *= columns
        return out.to(self.dtype)

    def locate(self, name: str, start: Shape, size: Shape) -> Run | None:
        """Return where a region lies of a tensor without scales."""
        return None if name in self.scales else self.source.locate(name, start, size)


class Quantised:
    """A source whose named weights are written as float8 with a scale for each 128 x 128 block.

    The scale is the block's largest magnitude over 448, the largest number of float8 e4m3; 1 for a block of zeros.
    """

    def __init__(self, source: Source, names: AnyMapping[str, object] | set[str]) -> None:
        self.source = source
        self.names = set(names)
        index: dict[str, tuple[Shape, torch.dtype]] = {}
        for name, (shape, dtype) in source.index.items():
            if name not in self.names:
                index[name] = (shape, dtype)
                continue
            if len(shape) != 2:
                raise CheckpointError(f"`{name}` has {len(shape)} dimensions: only matrices have block scales")
            index[name] = (shape, _FLOAT8)
            index[name + SCALE] = (tuple(-(-n // BLOCK) for n in shape), torch.float32)
        self.index: Index = index

    def read(self, name: str, start: Shape, size: Shape) -> Tensor:
        """Return a region of a weight or of its scales, from the whole blocks around it."""
        of = name.removesuffix(SCALE) if name not in self.source.index else name
        if of not in self.names:
            return self.source.read(name, start, size)
        is_scale = of != name
        shape = self.source.index[of][0]
        unit = 1 if is_scale else BLOCK
        first = [at // unit for at in start]
        last = [-(-(at + n) // unit) for at, n in zip(start, size, strict=True)]
        begin = tuple(at * BLOCK for at in first)
        extent = tuple(min(b * BLOCK, n) - a for a, b, n in zip(begin, last, shape, strict=True))
        values = self.source.read(of, begin, extent).float()
        scales = block_scales(values)
        if is_scale:
            return scales
        wide = scales.repeat_interleave(BLOCK, 0)[: extent[0]].repeat_interleave(BLOCK, 1)[:, : extent[1]]
        quantised = (values / wide).to(_FLOAT8)
        for dim in range(2):
            quantised = quantised.narrow(dim, start[dim] - begin[dim], size[dim])
        return quantised.contiguous()

    def locate(self, name: str, start: Shape, size: Shape) -> Run | None:
        """Return where a region lies of a tensor that stays as it is."""
        plain = name in self.source.index and name not in self.names
        return self.source.locate(name, start, size) if plain else None


def block_scales(values: Tensor) -> Tensor:
    """Return the scales (fp32) of the 128 x 128 blocks of a matrix."""
    rows, columns = (-(-n // BLOCK) for n in values.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[: values.shape[0], : values.shape[1]] = values.abs()
    largest = padded.view(rows, BLOCK, columns, BLOCK).amax((1, 3))
    return torch.where(largest == 0, torch.ones(()), largest / torch.finfo(_FLOAT8).max)


def _check_scales(index: Index, scales: dict[str, str], block: tuple[int, int]) -> None:
    """Raise `CheckpointError` for scales that do not fit their weights, and for scales of nothing."""
    for name, scale in scales.items():
        shape, found = index[name][0], index[scale][0]
        wanted = tuple(-(-n // b) for n, b in zip(shape, block, strict=False))
        if len(shape) != 2 or found != wanted:
            message = (
                f"`{scale}` is {list(found)}; a {list(shape)} weight in blocks of {list(block)} has {list(wanted)}"
            )
            raise CheckpointError(message)
    used = set(scales.values())
    lost = [name for name in index if name.endswith(SCALE) and name not in used]
    if lost:
        raise CheckpointError(f"`{lost[0]}` is the scale of no float8 weight")
