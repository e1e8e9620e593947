"""What a family says of how its model may be laid out: words for engines that never see the model's code.

Names are globs of modules, `*` standing for one name. What is not named is replicated.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sharding:
    """The places where a model can be split, in the terms of tensor, sequence, context and pipeline parallelism.

    `embeddings` are tables split by vocabulary. `columns` are projections split by output features, `rows` those split
    by input features, whose results are partial sums. A projection is split inside of one of the `regions`: modules
    whose first argument is the residual stream (B, T, D), or a tuple of such streams, needed whole, and whose result is
    added to it. Outside of the regions the stream may be split along T, from the `embeddings` on to `closing`, the last
    norm, or from the `openings`, which map rows of data to a stream, on to the `outputs`, whose results are wanted
    whole. `resuming` modules take what a closing norm gave, and the stream goes on from there. `modulations` map a
    vector (B, V) of each sample to what is applied to its stream: they are split by output features, and what they give
    is needed whole; `conditions` make that vector.
    `experts` are modules that hold the weights of many experts, stacked along dimension 0, and are called with
    tokens (N, D), the numbers of the experts chosen for each (N, K) and their weights (N, K) or None. They lie in
    `mixtures`, which are regions, with `shared` experts beside them; `loads` are the modules there that count what each
    sequence sends to each expert, and return it as (B, E).
    `attentions` are the modules that attend: no weights, called with queries, keys, values (B, T, heads, width) and a
    mask. `first` and `last` are the modules before and after the blocks, where a pipeline begins and ends; what of the
    last ones is a block too, as layers that predict further tokens, works on what was closed already.
    """

    embeddings: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    closing: tuple[str, ...] = ()
    openings: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    resuming: tuple[str, ...] = ()
    modulations: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    mixtures: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    loads: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()

    def split_dim(self, module: str) -> int | None:
        """Return the dimension of a module's weight (..., out, in) that tensor parallelism splits, None for none."""
        if matches(module, (*self.columns, *self.embeddings, *self.modulations)):
            return -2
        return -1 if matches(module, self.rows) else None

    def again(self, pattern: str, other: str) -> Sharding:
        """Return the same places, those below a pattern (`layers.*`) once more below another."""
        start = pattern + "."
        found = {
            name: (*globs, *(other + "." + glob.removeprefix(start) for glob in globs if glob.startswith(start)))
            for name, globs in vars(self).items()
        }
        return Sharding(**found)

    def routed_by_parts(self) -> Sharding:
        """Return the same model with mixtures that work on parts of the stream: only what all tokens share, gathers."""
        regions = tuple(region for region in self.regions if region not in self.mixtures)
        return dataclasses.replace(self, regions=regions + self.shared)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Does a module's name match a glob, `*` standing for one name?"""
    return any(name.count(".") == p.count(".") and fnmatch.fnmatchcase(name, p) for p in patterns)


def within(name: str, patterns: Sequence[str]) -> bool:
    """Is a name that of a module which matches a glob, or of anything inside of one?"""
    parts = name.split(".")
    return any(matches(".".join(parts[: end + 1]), patterns) for end in range(len(parts)))
