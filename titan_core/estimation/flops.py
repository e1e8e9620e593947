"""How many parameters and FLOPs a model has, counted from what its family declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from titan_core.declare.parameters import Attention, Parameter, Role

_MATMUL_ROLES = ("input", "condition", "hidden", "output", "expert", "router")


@dataclass(frozen=True)
class Counts:
    """Parameters: all; those that one token's matmuls use; those of the embedding; all by role."""

    total: int
    active: int
    embedding: int
    by_role: dict[Role, int]


def count_parameters(parameters: Sequence[Parameter]) -> Counts:
    """Count trained parameters; a tied one counts once in the total, and its matmul among the active."""
    parameters = [p for p in parameters if p.trained]
    total = sum(p.numel for p in parameters if p.tied_to is None)
    active = sum(round(p.numel * p.active) for p in parameters if p.role in _MATMUL_ROLES)
    by_role: dict[Role, int] = {}
    for p in parameters:
        if p.tied_to is None:
            by_role[p.role] = by_role.get(p.role, 0) + p.numel
    return Counts(total, active, by_role.get("embedding", 0), by_role)


def flops_per_token(
    parameters: Sequence[Parameter],
    attentions: Sequence[Attention],
    lengths: Mapping[str, int] | int,
    *,
    causal: bool = False,
) -> float:
    """Return the FLOPs of forward and backward for one token of a sample.

    `lengths` are the rows of each kind that a sample has, of which the first kind are the tokens, or just the number of
    tokens. Rows of other kinds are work too: all of a sample's work is shared out among its tokens.

    Six for each weight that is multiplied (two forward, four backward): the output head, also a tied one, but not the
    embedding, which is looked up; norms and biases, which are next to nothing, as 6 (N - N_emb) counts them. For
    attention 6 * keys * heads * (qk width + v width), which is 12 d T where a head is d / H wide. `causal` counts the
    keys that a token sees, (T + 1) / 2 on average; without it all T are counted, the convention of most published MFU
    numbers. Recomputation is not counted.
    """
    if isinstance(lengths, int):
        lengths = {"token": lengths}
    tokens = next(iter(lengths.values()))

    def rows(per: tuple[str, ...]) -> int:
        return sum(lengths[kind] for kind in per)

    counted = [p for p in parameters if p.trained and p.role in (*_MATMUL_ROLES, "norm", "bias")]
    work = sum(6 * p.numel * p.active * rows(p.per) for p in counted)
    for a in attentions:
        work += 6 * rows(a.per) * _keys(a, rows(a.per), causal) * a.num_heads * (a.qk_dim + a.v_dim)
    return work / tokens


def _keys(attention: Attention, seq_len: int, causal: bool) -> float:
    """Return how many keys a query meets, on average."""
    if attention.window is None or attention.window >= seq_len:
        return (seq_len + 1) / 2 if causal and attention.causal else seq_len
    window = attention.window
    if not causal:
        return window
    ramp = window * (window + 1) / 2  # the first tokens see fewer
    return (ramp + (seq_len - window) * window) / seq_len
