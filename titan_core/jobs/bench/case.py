"""One thing to compute, everyone who computes it, and the rule: right first, then timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from titan_core.jobs.bench.roofline import Roofline
from titan_core.jobs.bench.timing import Timer

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
    of the measured ceiling, `against_titan` this backend's time over titan's. `peak_bytes` is what one call allocates
    on a GPU at most, its result included; not known on a CPU.
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
    tflops: float | None = None
    gigabytes_per_second: float | None = None
    roofline: float | None = None
    against_titan: float | None = None
    peak_bytes: int | None = None


def run_case(case: Case, timer: Timer, roofline: Roofline, only: Sequence[str]) -> list[Row]:
    """Check and time every backend of a case; `only` names the backends, none means all."""
    inputs = case.inputs()
    truth = case.reference(inputs)
    rows: list[Row] = []
    own: float | None = None
    for name in sorted(case.backends, key=lambda name: name != OWN):  # titan first: the others are compared with it
        if only and name not in only and name != OWN:
            continue
        row = _run_backend(case, name, inputs, truth, timer, roofline, own)
        own = row.seconds if name == OWN else own
        if not only or name in only:
            rows.append(row)
    return rows


def _run_backend(
    case: Case, name: str, inputs: Any, truth: Sequence[Tensor], timer: Timer, roofline: Roofline, own: float | None
) -> Row:
    limit = case.limit or LIMITS[case.dtype]
    about: dict[str, Any] = {
        "operation": case.operation,
        "shape": case.shape,
        "part": case.part,
        "dtype": case.dtype,
        "backend": name,
    }
    try:
        prepared = case.backends[name](inputs)
        prepared = prepared if isinstance(prepared, Prepared) else Prepared(prepared)
        _poison(truth, timer.device)
        found, peak = _peak_of(prepared.call, timer.device)
        found = prepared.result(found)
        found = [found] if isinstance(found, Tensor) else list(found)
        error = max(worst_row(x, y) for x, y in zip(found, truth, strict=True))
        del found
        if not error <= limit:  # NaN is wrong too
            return Row(**about, verdict="wrong", error=error, limit=limit, note="not timed")
        timing = timer.time(prepared.call)
    except Absent as absent:
        return Row(**about, verdict="absent", note=str(absent))
    except Exception as error:  # any way in which someone else's code may fail is that backend's answer
        return Row(**about, verdict="failed", note=f"{type(error).__name__}: {_first_line(error)}")
    floor = roofline.floor_seconds(case.flops, case.moved, case.dtype)
    return Row(
        **about,
        verdict="right",
        error=error,
        limit=limit,
        seconds=timing.seconds,
        spread=timing.spread,
        tflops=case.flops / timing.seconds / 1e12 if case.flops else None,
        gigabytes_per_second=case.moved / timing.seconds / 1e9,
        roofline=None if floor is None else floor / timing.seconds,
        against_titan=timing.seconds / own if own else (1.0 if name == OWN else None),
        peak_bytes=peak,
    )


def _peak_of(call: Call, device: torch.device) -> tuple[Any, int | None]:
    """Return what a call returns, and how many bytes it allocates at most on a GPU."""
    if device.type != "cuda":
        return call(), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found = call()
    return found, torch.cuda.max_memory_allocated(device) - before


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


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
