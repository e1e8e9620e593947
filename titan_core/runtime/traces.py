"""What the ranks of a job left behind when a collective failed: torch's flight-recorder traces, and notes beside them.

A rank R leaves up to three files: `<prefix>R`, the trace of its device's collectives as torch dumps it (a pickle; on a
timeout NCCL writes that file itself); `<prefix>R.host`, the trace of the collectives on the CPU, where the device is
another; and `<prefix>R.json`, what the rank knows of itself. Any may be missing. No torch is needed to read them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from titan_core.runtime.errors import RunFailed

REPORT = "report.txt"
State = Literal["failed", "asked", "left", "ended", "unknown"]
_KEPT = 1000  # calls of a group that are looked at
_PLUMBING = ("/torch/", "/typing_extensions.py", "/contextlib.py")  # frames that say nothing about who called
_DTYPES: dict[str, str] = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
}  # fmt: skip
# Ranks may enter these with tensors of different sizes.
_UNEVEN = re.compile(r"(all_?to_?all|gather|scatter)\b")


@dataclass(frozen=True)
class Call:
    """One collective that a rank entered.

    `number` counts the calls of a group on one backend, the same on every rank that makes the same calls; `at` holds
    the frames that called it, the innermost first, torch's own left out. `finished` is what torch knows: a call that
    timed out is finished, too.
    """

    backend: str
    group: str
    description: str
    number: int
    op: str
    dtypes: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    output_sizes: tuple[tuple[int, ...], ...]
    created: int
    finished: bool
    thread: str
    at: tuple[str, ...]
    one_to_one: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What numbers are counted by: backend and group."""
        return self.backend, self.group

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be the same on every rank that meets here."""
        uneven = _UNEVEN.match(self.op) is not None
        return (self.op, self.dtypes) if uneven else (self.op, self.dtypes, self.sizes, self.output_sizes)

    @property
    def shape(self) -> str:
        """What goes in, in words: `float32 [4, 8], float32 [2]`."""
        dtypes = self.dtypes * (len(self.sizes) if len(self.dtypes) == 1 else 1)
        shown = [f"{dtype} {list(size)}" for dtype, size in zip(dtypes, self.sizes, strict=False)]
        return ", ".join(shown[:3] + ["..."] * (len(shown) > 3)) or "no tensor"

    def __str__(self) -> str:
        return f"{self.op} #{self.number} of group `{self.description or self.group}`"


@dataclass
class RankTrace:
    """What one rank left.

    `state`: its collective failed; it was asked because another's did; it left with an error of its own; C++ ended it;
    or not known, where only torch's trace is there. `stack` is where its main thread was, innermost first.
    `groups` maps the names of the groups that it was in to their ranks. `forgot`: its oldest calls left the buffer.
    """

    rank: int
    state: State = "unknown"
    world_size: int | None = None
    error: str | None = None
    stack: list[str] = field(default_factory=list)
    groups: dict[str, list[int]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    forgot: bool = False

    @property
    def inside(self) -> list[Call]:
        """The calls that it had not left; the last one is among them if a collective failed here."""
        open_calls = [call for call in self.calls if not call.finished]
        if self.state == "failed" and self.calls and self.calls[-1].finished:
            open_calls.append(self.calls[-1])  # torch marks it when it fails, sometimes before we see the trace
        return open_calls

    @property
    def waits_in(self) -> Call | None:
        """The call that holds it up: NCCL's run in the order of their start, on the CPU only the last one blocks."""
        return None if not self.inside else self.inside[0 if self.inside[0].backend == "nccl" else -1]


def find_folder(folder: str | Path) -> Path:
    """Return the folder of traces that is meant: this one, or the one up to two levels below with the newest report."""
    place = Path(folder)
    if (place / REPORT).is_file():
        return place
    reports = [path for depth in ("*", "*/*") for path in place.glob(f"{depth}/{REPORT}")]
    return max(reports, key=lambda path: path.stat().st_mtime).parent if reports else place


def read_folder(folder: str | Path, prefix: str = "") -> dict[int, RankTrace]:
    """Read every rank's files in a folder, by default those of any prefix that ends in no digit.

    Raises `RunFailed` if there are none or one cannot be read.
    """
    place = Path(folder)
    pattern = re.compile((re.escape(prefix) or r"(|.*\D)") + r"(?P<rank>\d+)(?P<kind>\.host|\.json)?")
    try:
        names = sorted(os.listdir(place))
    except OSError as error:
        raise RunFailed(f"cannot read the traces: {error.strerror}", where=str(place)) from error
    ranks: dict[int, RankTrace] = {}
    for name in names:
        found = pattern.fullmatch(name)
        if found is None or not (place / name).is_file():
            continue
        trace = ranks.setdefault(int(found["rank"]), RankTrace(int(found["rank"])))
        if found["kind"] == ".json":
            _take_notes(trace, place / name)
        else:
            _take_trace(trace, place / name)
    if not ranks:
        tip = "they lie in comm.save_traces_folder of a run whose collectives failed"
        raise RunFailed("no flight-recorder traces here", where=str(place), tip=tip)
    for trace in ranks.values():
        trace.calls.sort(key=lambda call: call.created)
    return ranks


def load_trace(data: bytes) -> dict[str, Any]:
    """Return a trace that torch dumped, pickle or JSON; raises ValueError for anything else.

    The pickle may hold plain values only: it names no class, so reading it runs no code.
    """
    if data[:1] == b"{":
        return json.loads(data)
    try:
        found = _Plain(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, IndexError, KeyError, AttributeError, MemoryError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if not isinstance(found, dict):
        raise ValueError("no table of entries")
    return found


class _Plain(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, and a trace holds plain values only")


def _take_notes(trace: RankTrace, path: Path) -> None:
    try:
        notes = json.loads(path.read_bytes())
        trace.state, trace.world_size, trace.error = notes["state"], notes["world_size"], notes["error"]
        trace.stack = notes["stack"]
        trace.groups |= notes["groups"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def _take_trace(trace: RankTrace, path: Path) -> None:
    try:
        found = load_trace(path.read_bytes())
        entries = found.get("entries", [])
        trace.forgot = trace.forgot or any(entry.get("record_id", 0) for entry in entries[:1])
        trace.calls += [_call(entry) for entry in _newest(entries)]
        for group in found.get("pg_config", {}).values():  # gloo leaves names and ranks out
            ranks = json.loads(group["ranks"]) if isinstance(group["ranks"], str) else list(group["ranks"])
            if group["name"] and ranks:
                trace.groups.setdefault(group["name"], ranks)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def _newest(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the last entries of each group: ranks are never a thousand calls apart, and a buffer may hold 20,000."""
    kept: dict[Any, deque[dict[str, Any]]] = {}
    for entry in entries:
        kept.setdefault((entry["profiling_name"][:4], entry["process_group"][0]), deque(maxlen=_KEPT)).append(entry)
    return [entry for group in kept.values() for entry in group]


def _unreadable(path: Path, error: Exception) -> RunFailed:
    tip = "take the file away to see what the others say"
    return RunFailed(f"this is no trace of a rank: {type(error).__name__}: {error}", where=str(path), tip=tip)


def _call(entry: Mapping[str, Any]) -> Call:
    backend, _, op = entry["profiling_name"].rpartition(":")
    name, description = entry["process_group"]
    one_to_one = bool(entry["is_p2p"])
    return Call(
        backend=backend,
        group=str(name),
        description="" if description == "undefined" else description,
        number=entry["p2p_seq_id"] if one_to_one else entry["collective_seq_id"],
        op=op,
        dtypes=tuple(_DTYPES.get(str(name), str(name)) for name in entry["input_dtypes"]),
        sizes=tuple(tuple(size) for size in entry["input_sizes"]),
        output_sizes=tuple(tuple(size) for size in entry["output_sizes"]),
        created=entry["time_created_ns"],
        finished=bool(entry["retired"]) or entry["state"] == "completed",
        thread=str(entry.get("thread_id", "")),
        at=_callers(entry.get("frames", ())),
        one_to_one=one_to_one,
    )


def _callers(frames: Any) -> tuple[str, ...]:
    """Return up to four frames outside of torch, the innermost first, as `name (file:line)`."""
    ours = (frame for frame in frames if not any(part in frame["filename"] for part in _PLUMBING))
    return tuple(frame_text(f["name"], f["filename"], f["line"]) for f, _ in zip(ours, range(4), strict=False))


def frame_text(name: str, filename: str, line: int | None) -> str:
    """Return a frame in words, its path from the package on or the last two parts."""
    parts = Path(filename).parts
    packages = [i for i, part in enumerate(parts) if part in ("titan_core", "titan_cli", "site-packages")]
    short = parts[packages[-1] + (parts[packages[-1]] == "site-packages") :] if packages else parts[-2:]
    return f"{name} ({'/'.join(short)}:{line})"
