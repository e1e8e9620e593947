"""One thing to compute, everyone who computes it, and the rule: right first, then timed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from titan_core.jobs.bench.roofline import Roofline
from titan_core.jobs.bench.timing import Timer, Timing

# Largest relative error of a row, by what the results are rounded to: bf16 rounds by 2^-9 at most, 1.7e-3 rms, and what
# is rounded twice on the way by some more. float8 inputs are given as they are to everyone: only the result is rounded.
LIMITS = {"fp32": 1e-4, "fp16": 4e-3, "bf16": 1.5e-2, "fp8": 1.5e-2}
OWN = "titan"

Call = Callable[[], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Prepared:
    """A call to time, and how the result that is checked is read out of what it returns."""

    call: Call
    result: Callable[[Any], Tensor | Sequence[Tensor]] = lambda found: found


class Absent(Exception):
    """A backend cannot take part here: what is missing."""


@dataclass(frozen=True)
class Case:
    """One operation at one shape: the work that it is, its inputs, the truth, and who computes it.

    `flops` and `moved` are the FLOPs that must be done and the fewest bytes that must be read and written. `inputs`
    draws fresh random ones. `reference` computes from them in fp64. A backend takes the inputs and returns the call to
    time, or raises `Absent`; what it does before it returns is not timed.
    """

    operation: str
    shape: str
    part: str
    dtype: str
    flops: float
    moved: float
    inputs: Callable[[], Any]
    reference: Callable[[Any], Sequence[Tensor]]
    backends: Mapping[str, Callable[[Any], Call | Prepared]]
    limit: float | None = None


@dataclass(frozen=True)
class Row:
    """What one backend did with one case.

    `error` is the largest relative error of a row of the result. Only what is right has a time; `roofline` is the share
    of the measured ceiling, `against_titan` this backend's time over titan's, `against_saved` over its own in a file.
    On a GPU `host_seconds` is what the host takes to launch a call, and `peak_bytes` what one call allocates at most,
    its result included.
    """

    operation: str
    shape: str
    part: str
    dtype: str
    backend: str
    verdict: Literal["right", "wrong", "absent", "failed"]
    note: str = ""
    error: float | None = None
    limit: float | None = None
    seconds: float | None = None
    spread: float | None = None
    host_seconds: float | None = None
    tflops: float | None = None
    gigabytes_per_second: float | None = None
    roofline: float | None = None
    against_titan: float | None = None
    against_saved: float | None = None
    peak_bytes: int | None = None


def run_case(case: Case, timer: Timer, roofline: Roofline, only: Sequence[str]) -> list[Row]:
    """Check every backend of a case, and time those that are right, in turns; `only` names them, none means all."""
    inputs = case.inputs()
    truth = case.reference(inputs)
    names = sorted(case.backends, key=lambda name: name != OWN)  # titan first: the others are compared with it
    checked = {
        name: _check(case, name, inputs, truth, timer.device) for name in names if not only or name in (OWN, *only)
    }
    right = {name: call for name, (_, call) in checked.items() if call is not None}
    timings = dict(zip(right, timer.race(list(right.values())), strict=True))
    own = timings.get(OWN)
    rows: list[Row] = []
    for name, (row, _) in checked.items():
        if only and name not in only:
            continue
        timing = timings.get(name)
        if isinstance(timing, Exception):
            row = dataclasses.replace(row, verdict="failed", note=_in_a_line(timing))
        elif timing is not None:
            row = _timed(row, case, timing, roofline, own.seconds if isinstance(own, Timing) else None)
        rows.append(row)
    return rows


def _check(
    case: Case, name: str, inputs: Any, truth: Sequence[Tensor], device: torch.device
) -> tuple[Row, Call | None]:
    """Return what is known before timing, and the call to time, or none."""
    limit = case.limit or LIMITS[case.dtype]
    row = Row(case.operation, case.shape, case.part, case.dtype, name, "wrong", limit=limit)
    try:
        prepared = case.backends[name](inputs)
        prepared = prepared if isinstance(prepared, Prepared) else Prepared(prepared)
        _poison(truth, device)
        found, peak = _peak_of(prepared.call, device)
        found = prepared.result(found)
        found = [found] if isinstance(found, Tensor) else list(found)
        error = max(worst_row(x, y) for x, y in zip(found, truth, strict=True))
    except Absent as absent:
        return dataclasses.replace(row, verdict="absent", note=str(absent), limit=None), None
    except Exception as error:  # any way in which someone else's code may fail is that backend's answer
        return dataclasses.replace(row, verdict="failed", note=_in_a_line(error), limit=None), None
    if not error <= limit:  # NaN is wrong too
        return dataclasses.replace(row, error=error, note="not timed"), None
    return dataclasses.replace(row, verdict="right", error=error, peak_bytes=peak), prepared.call


def _timed(row: Row, case: Case, timing: Timing, roofline: Roofline, own: float | None) -> Row:
    floor = roofline.floor_seconds(case.flops, case.moved, case.dtype)
    return dataclasses.replace(
        row,
        seconds=timing.seconds,
        spread=timing.spread,
        host_seconds=timing.host,
        tflops=case.flops / timing.seconds / 1e12 if case.flops else None,
        gigabytes_per_second=case.moved / timing.seconds / 1e9,
        roofline=None if floor is None else floor / timing.seconds,
        against_titan=timing.seconds / own if own else None,
    )


def _peak_of(call: Call, device: torch.device) -> tuple[Any, int | None]:
    """Return what a call returns, and how many bytes it allocates at most on a GPU."""
    if device.type != "cuda":
        return call(), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found = call()
    return found, torch.cuda.max_memory_allocated(device) - before


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


def worst_row(found: Tensor, truth: Tensor) -> float:
    """Return the largest relative error of a row, ||found - truth|| / ||truth||, infinite for another shape.

    One wrong tile of a large result hides in the norm of the whole, not in that of its rows. A row that is smaller than
    a quarter of their mean square is measured by that quarter: in gradients, small rows are differences of large ones.
    """
    if found.shape != truth.shape:
        return math.inf
    if truth.numel() == 0:
        return 0.0
    if truth.dim() == 0:
        found, truth = found[None], truth[None]
    worst, least = 0.0, 0.25 * _rms_of_rows(truth)
    for some, true in zip(_pieces(found), _pieces(truth), strict=True):
        off = torch.linalg.vector_norm(some.double() - true, dim=-1)
        relative = off / torch.linalg.vector_norm(true, dim=-1).clamp_min(max(least, 1e-300))
        worst = max(worst, relative.max().item())
        if not bool(torch.isfinite(relative).all()):
            return math.nan
    return worst


def _rms_of_rows(x: Tensor) -> float:
    rows = max(1, x.numel() // x.shape[-1])
    return float(torch.linalg.vector_norm(x)) / math.sqrt(rows)


def _pieces(x: Tensor) -> Sequence[Tensor]:
    """Return a tensor as matrices of at most 2^26 numbers: their fp64 differences must fit beside everything else."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.split(max(1, (1 << 26) // x.shape[-1]))


def _poison(truth: Sequence[Tensor], device: torch.device) -> None:
    """Leave NaN in the memory that a GPU's next results will be written to: what is not written then shows."""
    if device.type != "cuda":
        return
    for x in truth:
        torch.full_like(x, math.nan, dtype=torch.bfloat16)
        torch.full_like(x, math.nan, dtype=torch.float32)
