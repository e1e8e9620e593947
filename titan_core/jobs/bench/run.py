"""The benchmarks by name, and one run of some of them."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from titan_core.jobs.bench.case import OWN, Case, Row, run_case
from titan_core.jobs.bench.inputs import Draw
from titan_core.jobs.bench.record import Key, Record, check, key, of_this_device, read
from titan_core.jobs.bench.request import Request
from titan_core.jobs.bench.roofline import Roofline, measure
from titan_core.jobs.bench.timing import Timer
from titan_core.runtime.errors import UsageError
from titan_core.runtime.events import Listener, Note, silent

# name -> module with `cases(request, draw)`
OPERATIONS = {
    "moe-gemm": "moe_gemm",
    "moe-layer": "moe_layer",
    "permute": "permute",
    "quant": "quant",
    "fused-ce": "fused_ce",
    "pointwise": "pointwise",
    "attention": "attention",
}


@dataclass(frozen=True)
class Report:
    """Rows, and what they were measured on. `reduced` says that the shapes are a CPU's, not those asked for;
    `interrupted`, that some cases were not reached."""

    device: str
    torch: str
    triton: str | None
    reduced: bool
    seed: int
    roofline: Roofline
    rows: list[Row]
    interrupted: bool = False

    @property
    def failures(self) -> list[Row]:
        """Return where titan itself was wrong, or failed."""
        return [row for row in self.rows if row.backend == OWN and row.verdict in ("wrong", "failed")]

    def slower(self, percent: float) -> list[Row]:
        """Return where titan takes that much longer than what it is compared with."""
        own = [row for row in self.rows if row.backend == OWN and row.against_saved is not None]
        return [row for row in own if (row.against_saved or 0) > 1 + percent / 100]


def run(
    names: Sequence[str],
    request: Request,
    *,
    budget: float | None = None,
    save: str | None = None,
    compare: str | None = None,
    listener: Listener = silent,
) -> Report:
    """Check and time the named operations on this machine's GPU, or, where there is none, on its CPU at reduced shapes.

    `budget` is how many seconds the timed calls of one backend and case may take. What is measured is appended to the
    file `save` as it comes, and set beside what the file `compare` has of this device. An interrupt ends the measuring,
    and what was measured is returned.
    """
    saved = None if compare is None else read(compare)  # first: it may be the same file
    if save is not None:
        check(save)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    request = request if gpu else replace(request, reduced=True)
    draw = Draw(device, request.seed)
    cases = [case for name in names for case in _cases(name)(request, draw)]  # their inputs are drawn one by one
    known = sorted({backend for case in cases for backend in case.backends})
    for backend in request.backends:
        if backend not in known:
            raise UsageError(f"no backend `{backend}` here", tip="one of " + ", ".join(known))
    timer = Timer(device, budget if budget is not None else 0.3 if gpu else 0.2)
    listener(Note("measuring what this device can do"))
    roofline = measure(timer, {"bf16", request.dtype})
    report = Report(roofline.device, torch.__version__, _version("triton"), request.reduced, request.seed, roofline, [])
    earlier = {} if saved is None else of_this_device(saved, report.device, report.reduced)
    with Record(save) as record:
        record.add(report)
        try:
            for case in cases:
                listener(Note(f"{case.operation} {case.shape} {case.part} {case.dtype}"))
                rows = [_compared(row, earlier) for row in run_case(case, timer, roofline, request.backends)]
                record.add(*rows)
                report.rows.extend(rows)
        except KeyboardInterrupt:
            return replace(report, interrupted=True)
    return report


def _compared(row: Row, earlier: Mapping[Key, float]) -> Row:
    before = earlier.get(key(row))
    return row if before is None or row.seconds is None else replace(row, against_saved=row.seconds / before)


def _cases(name: str) -> Callable[[Request, Draw], Iterator[Case]]:
    return importlib.import_module(f"titan_core.jobs.bench.{OPERATIONS[name]}").cases


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
