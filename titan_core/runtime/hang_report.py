"""Why a collective did not end: every rank's calls side by side, the first one where not all ranks met, in words.

The ranks of a group count its collectives alike as long as they make the same calls. So the first number that some
member has not reached, or has reached with another call, is where the ranks parted; who is missing there, and where it
is instead, is the answer.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from titan_core.runtime.traces import Call, RankTrace

_SAME_CALLS = "every rank must make the same calls, in the same order, with tensors of the same size and dtype"
_SHOWN = 16  # ranks that get lines of their own in the report


@dataclass(frozen=True)
class Parting:
    """A collective where not all members of a group met: `calls` by rank that entered, `missing` that did not.

    With `differ` they all entered, but not with the same call; `missing` are then those that differ from most.
    """

    key: tuple[str, str]
    members: tuple[int, ...]
    calls: dict[int, Call]
    missing: tuple[int, ...]
    differ: bool = False

    @property
    def waiting(self) -> tuple[int, ...]:
        """The ranks that are where they should be."""
        return tuple(rank for rank in sorted(self.calls) if rank not in self.missing)

    @property
    def call(self) -> Call:
        """The collective as those entered it that wait."""
        return self.calls[self.waiting[0]]


@dataclass(frozen=True)
class Report:
    """`summary` is one sentence, `tip` what to do; `parting` is None where every rank met in every collective."""

    summary: str
    tip: str
    parting: Parting | None
    others: list[Parting] = field(default_factory=list)
    whereabouts: dict[int, str] = field(default_factory=dict)
    text: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it: `collective` is null where the ranks parted nowhere."""
        return {
            "summary": self.summary,
            "tip": self.tip,
            "collective": None if self.parting is None else _as_dict(self.parting),
            "others": [_as_dict(parting) for parting in self.others],
            "ranks": [{"rank": rank, "whereabouts": text} for rank, text in self.whereabouts.items()],
        }


def _as_dict(parting: Parting) -> dict[str, Any]:
    call = parting.call
    return {
        "op": call.op,
        "number": call.number,
        "group": call.group,
        "description": call.description,
        "backend": call.backend,
        "dtypes": call.dtypes,
        "sizes": call.sizes,
        "called_by": call.at,
        "members": parting.members,
        "waiting": parting.waiting,
        "missing": parting.missing,
        "differ": parting.differ,
    }


def explain(ranks: dict[int, RankTrace]) -> Report:
    """Find what the ranks wait for and say it."""
    size = max([trace.world_size or 0 for trace in ranks.values()] + [max(ranks) + 1])
    first, *others = find_partings(ranks, size) or [None]
    where = {rank: whereabouts(rank, ranks.get(rank), first) for rank in range(size)}
    summary, tip = _summary(ranks, first, where)
    lines = [summary, f"tip: {tip}", *_details(ranks, size, first, [p for p in others if p is not None], where)]
    return Report(summary, tip, first, [p for p in others if p is not None], where, "\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------- where the ranks part


def find_partings(ranks: dict[int, RankTrace], size: int) -> list[Parting]:
    """Return the first parting of every group that has one, the most likely cause of the others first.

    Calls that do not match are an error by themselves. Then come those that wait for a rank which waits nowhere: it
    sleeps, computes or is dead. Where ranks wait for each other in a circle, the rank that took a step which it never
    took before is the one that went wrong.
    """
    groups: dict[str, set[int]] = {}
    for trace in ranks.values():
        for name, members in trace.groups.items():
            groups.setdefault(name, set()).update(members)
    keys = dict.fromkeys(call.key for trace in ranks.values() for call in trace.calls if not call.one_to_one)
    found = [_part(key, sorted(groups.get(key[1]) or range(size)), ranks) for key in keys]
    partings = [parting for parting in found if parting is not None]

    def waits_elsewhere(rank: int, here: Parting) -> bool:
        return any(rank in other.waiting for other in partings if other is not here)

    def order(parting: Parting) -> tuple[bool, bool, int, int, int]:
        elsewhere = sum(waits_elsewhere(rank, parting) for rank in parting.missing)
        astray = elsewhere < len(parting.missing)
        usual = sum(_is_usual(ranks[rank], parting.calls[rank]) for rank in parting.waiting)
        return not parting.differ, not astray, elsewhere, -usual, min(c.created for c in parting.calls.values())

    return sorted(partings, key=order)


def _part(key: tuple[str, str], members: list[int], ranks: dict[int, RankTrace]) -> Parting | None:
    """Return where the members of one group part, None if they do not."""
    calls: dict[int, dict[int, Call]] = {}
    for rank in members:
        if rank in ranks:
            mine = [call for call in ranks[rank].calls if call.key == key and not call.one_to_one]
            if mine or not ranks[rank].forgot:  # else nobody knows how far it came
                calls[rank] = {call.number: call for call in reversed(mine)}
    dead = tuple(rank for rank in members if rank not in ranks)
    start = max((min(own) for own in calls.values() if own), default=0)  # older calls have left some rank's buffer
    last = max((max(own) for own in calls.values() if own), default=-1)
    for number in range(start, last + 1):
        entered = {rank: own[number] for rank, own in calls.items() if number in own}
        absent = tuple(rank for rank in calls if rank not in entered)
        if absent:
            return Parting(key, tuple(members), entered, tuple(sorted(absent + dead)))
        odd = _odd_ones(entered, ranks)
        if odd:
            return Parting(key, tuple(members), entered, tuple(sorted(odd + dead)), differ=True)
    inside = {rank: own[last] for rank, own in calls.items() if own and own[last] in ranks[rank].inside}
    return Parting(key, tuple(members), inside, dead) if dead and inside else None


def _odd_ones(entered: dict[int, Call], ranks: dict[int, RankTrace]) -> tuple[int, ...]:
    """Return the ranks whose call is not that of most; where there is no majority, those whose step was unusual."""
    counts = Counter(call.signature for call in entered.values())
    if len(counts) == 1:
        return ()
    usual = Counter(call.signature for rank, call in entered.items() if _is_usual(ranks[rank], call))
    right = max(counts, key=lambda signature: (counts[signature], usual[signature]))  # ties: the lowest rank's
    return tuple(rank for rank, call in entered.items() if call.signature != right)


def _is_usual(trace: RankTrace, call: Call) -> bool:
    """Has this rank gone from the call before to such a call before?"""
    steps = [other for other in trace.calls if other.thread == call.thread and other.created <= call.created]
    names = [(*other.key, other.op, other.at[:1]) for other in steps]
    return len(names) > 1 and (names[-2], names[-1]) in set(itertools.pairwise(names[:-1]))


# ---------------------------------------------------------------------------------------------- in words


def ranks_text(ranks: Iterable[int]) -> str:
    """Return numbers of ranks as people write them: `rank 3`, `ranks 0-2, 5`."""
    numbers = sorted(ranks)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" if b > a + 1 else f"{a}, {b}" for a, b in runs)
    return f"rank{'' if len(numbers) == 1 else 's'} {text or 'none'}"


def whereabouts(rank: int, trace: RankTrace | None, parting: Parting | None) -> str:
    """Say where a rank was when the traces were taken."""
    if trace is None:
        return "left no trace: it died, or is stuck outside of Python"
    if trace.state == "left":
        return f"had failed already: {trace.error}"
    if trace.state == "ended":
        return "was ended by a C++ exception" + _in(trace.calls[-1:], " in ")
    if parting is not None and rank in parting.calls:
        own = parting.calls[rank]
        return f"is in {own} ({own.shape})" + (f", called by {own.at[0]}" if own.at else "")
    last = _in(trace.calls[-1:], "; its last collective was ") or "; it has entered no collective"
    if trace.waits_in is not None:
        return _in([trace.waits_in], "waits in ")
    if trace.stack:
        return f"is in no collective but in {trace.stack[0]}{last}"
    return f"is in no collective{last}"


def _in(calls: list[Call], words: str) -> str:
    return "".join(f"{words}{call}" + (f", called by {call.at[0]}" if call.at else "") for call in calls)


def _summary(ranks: dict[int, RankTrace], parting: Parting | None, where: dict[int, str]) -> tuple[str, str]:
    if not any(trace.calls for trace in ranks.values()):
        return "the traces hold no collective", "comm.trace_buf_size is how many they keep; 0 switches them off"
    if parting is None:
        failed = [f"rank {rank}: {trace.error}" for rank, trace in sorted(ranks.items()) if trace.error]
        said = f"; {failed[0]}" if failed else ""
        return f"every rank met the others in every collective{said}", "the stacks of the ranks say where they were"
    call = parting.call
    away = "; ".join(f"rank {rank} {where[rank]}" for rank in parting.missing[:3])
    waiting = ranks_text(parting.waiting)
    if parting.differ:
        summary = f"the ranks do not match in {call} ({call.shape}): {waiting} entered it, but {away}"
        return summary, _SAME_CALLS
    waits = "waits" if len(parting.waiting) == 1 else "wait"
    missing = f"{ranks_text(parting.missing)} {'is' if len(parting.missing) == 1 else 'are'} missing"
    summary = f"{missing} in {call} ({call.shape}), where {waiting} {waits}: {away}"
    if any(rank not in ranks for rank in parting.missing):
        return summary, "its own output, or `dmesg` on its host, says how it ended"
    if any(ranks[rank].state == "left" for rank in parting.missing):
        return summary, "that error is the cause"
    if all(ranks[rank].waits_in is not None for rank in parting.missing):
        return summary, _SAME_CALLS
    return (
        summary,
        "if it was only slow, raise comm.train_timeout_seconds (before the first step: init_timeout_seconds)",
    )


def _details(
    ranks: dict[int, RankTrace], size: int, parting: Parting | None, others: list[Parting], where: dict[int, str]
) -> list[str]:
    lines = []
    if parting is not None:
        call = parting.call
        lines += ["", f"collective  {call}", f"  tensors   {call.shape}", f"  backend   {call.backend}"]
        lines += [f"  members   {ranks_text(parting.members)}", f"  waiting   {ranks_text(parting.waiting)}"]
        lines += [f"  {'elsewhere' if parting.differ else 'missing  '} {ranks_text(parting.missing)}"]
        lines += [f"  {'called by' if i == 0 else '         '} {frame}" for i, frame in enumerate(call.at)]
        lines += _parted_earlier(ranks, parting)
    for other in others:
        names = f"{ranks_text(other.waiting)}, without {ranks_text(other.missing)}"
        lines += ["", f"also        {other.call} was entered by {names}"]
    missing = list(parting.missing) if parting is not None else []
    shown = [*missing, *(rank for rank in range(size) if rank not in missing)][:_SHOWN]
    for rank in shown:
        lines += ["", f"rank {rank} {where[rank]}"]
        trace = ranks.get(rank)
        if trace is not None and trace.error:
            lines += [f"  error     {trace.error}"]
        if trace is not None:
            lines += [f"  {'stack' if i == 0 else '':<9} {frame}" for i, frame in enumerate(trace.stack[:12])]
            lines += [f"  before    {call}" for call in trace.calls[-3:]]
    if size > len(shown):
        lines += ["", f"and {size - len(shown)} more ranks"]
    return lines


def _parted_earlier(ranks: dict[int, RankTrace], parting: Parting) -> list[str]:
    """Say from where on the ranks met in equal calls of different lines: one that leaves a call out shows so first."""
    lines: dict[int, dict[int, str]] = {}
    for rank in parting.members:
        for call in ranks[rank].calls if rank in ranks else ():
            if call.key == parting.key and not call.one_to_one and call.number < parting.call.number and call.at:
                lines.setdefault(call.number, {})[rank] = call.at[0]
    for number, callers in sorted(lines.items()):
        if len(set(callers.values())) > 1:
            ways = "; ".join(f"rank {rank} by {at}" for rank, at in list(callers.items())[:4])
            return [
                "",
                f"note        #{number} of this group matched, but the ranks came there by different lines: {ways}",
            ]
    return []
