"""`titan validate parity`: are two sets of weights the same model, tensor by tensor and, for small ones, in logits?"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from titan_core.interop.boxes import Source, cut
from titan_core.jobs import foreign
from titan_core.jobs.foreign import Opened, open_weights
from titan_core.jobs.load import load_trained
from titan_core.jobs.stages import Report
from titan_core.runtime.errors import CheckpointError
from titan_core.runtime.events import Listener, Progress, silent

_AT_ONCE = 64 << 20
_SMALL = 50_000_000  # parameters up to which logits are compared: two models of that size are 0.4 GB in fp32
_LOGITS_TOLERANCE = 1e-4


@dataclass
class _Found:
    equal: int = 0
    same_numbers: int = 0
    largest: float = 0.0
    where: str = ""


def run(a: str, b: str, *, tolerance: float = 0.0, listener: Listener = silent) -> Report:
    """Compare two checkpoints of any formats. `tolerance` is relative to the largest number of a tensor; with 0 the
    numbers must be equal, in whatever dtype they are stored."""
    report, opened = Report(), []

    def both() -> str:
        opened.extend((open_weights(a), open_weights(b)))
        return " and ".join(f"{foreign.SAYS[one.format]} ({one.family.name if one.family else '?'})" for one in opened)

    if not report.stage("readable", both):
        return report
    first, second = (_comparable(one, opened) for one in opened)
    if report.stage("names and shapes", lambda: _names(first, second)):
        report.stage("numbers", lambda: _numbers(first, second, tolerance, listener))
        _logits(report, opened)
    return report


def _comparable(one: Opened, both: list[Opened]) -> Source:
    """Return weights under titan's names, or, where a family is unknown, under their own."""
    return one.raw if any(other.family is None for other in both) else one.ours


def _names(first: Source, second: Source) -> str:
    lost = [f"only the first has {n}" for n in first.index if n not in second.index]
    lost += [f"only the second has {n}" for n in second.index if n not in first.index]
    lost += [
        f"{name} is {list(shape)} and {list(second.index[name][0])}"
        for name, (shape, _) in first.index.items()
        if name in second.index and second.index[name][0] != shape
    ]
    if lost:
        more = f"; and {len(lost) - 4} more" if len(lost) > 4 else ""
        raise CheckpointError(f"they differ in {len(lost)} tensors: {'; '.join(lost[:4])}{more}")
    return f"{len(first.index)} tensors"


def _numbers(first: Source, second: Source, tolerance: float, listener: Listener) -> str:
    found, problems, done = _Found(), [], 0
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in first.index.values())
    for name, (shape, dtype) in first.index.items():
        worst = 0.0
        same_dtype = dtype == second.index[name][1]
        for slab in cut(name, shape, dtype.itemsize, _AT_ONCE):
            values = [source.read(name, slab.start, slab.size) for source in (first, second)]
            worst = max(worst, _difference(*values))
            done += slab.numel * dtype.itemsize
            listener(Progress("compare", done, total, "bytes"))
        found.equal += worst == 0 and same_dtype
        found.same_numbers += worst == 0 and not same_dtype
        if worst > found.largest:
            found.largest, found.where = worst, name
        if worst > tolerance:
            problems.append(f"{name} by {worst:.2g}")
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        message = f"{len(problems)} of {len(first.index)} tensors differ, relative to their largest number: "
        raise CheckpointError(message + "; ".join(problems[:4]) + more, tip="--tolerance allows for rounding")
    said = f"{found.equal} tensors are bit-identical"
    if found.same_numbers:
        said += f", {found.same_numbers} hold the same numbers in another dtype"
    return said + (f"; the rest differ by at most {found.largest:.2g} ({found.where})" if found.largest else "")


def _difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference over the largest number; 0 only if all are the same, NaN in the same places."""
    if a.dtype == b.dtype and torch.equal(a, b):
        return 0.0
    x, y = a.double(), b.double()
    same = (x == y) | (x.isnan() & y.isnan())
    if bool(same.all()):
        return 0.0
    gap = torch.where(same, 0.0, (x - y).abs())
    scale = max(float(x.abs().nan_to_num().max()), float(y.abs().nan_to_num().max()), 1e-30)
    return float(gap.nan_to_num(nan=torch.inf).max()) / scale


def _logits(report: Report, opened: list[Opened]) -> None:
    """Run small models of which one is a Hugging Face folder: titan's logits against transformers'."""
    hf = next((one for one in opened if one.format == "hf"), None)
    if hf is None or hf.family is None or hf.family.task != "causal_lm":
        report.skipped("logits", "neither is a Hugging Face folder of a language model that titan knows")
        return
    count = sum(p.numel for p in hf.family.parameters(hf.sizes) if p.tied_to is None)
    if count > _SMALL:
        report.skipped("logits", f"{count:,} parameters are more than {_SMALL:,}")
        return
    other = next(one for one in opened if one is not hf)
    if importlib.util.find_spec("transformers") is None:
        report.skipped("logits", "transformers is not installed")
        return
    report.stage("logits", lambda: _compare_logits(hf, other))


def _compare_logits(hf: Opened, other: Opened) -> str:
    from transformers import AutoModelForCausalLM  # 6 s

    tokens = torch.randint(0, hf.sizes.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(Path(hf.path).absolute(), dtype=torch.float32)
        theirs = loaded.eval()(tokens).logits
        ours = load_trained(other.path, device="cpu", dtype=torch.float32).model(tokens)
    gap = float((theirs - ours).abs().max() / theirs.abs().max())
    if not gap <= _LOGITS_TOLERANCE:
        raise CheckpointError(f"titan's logits differ from transformers' by {gap:.2g} of the largest")
    return f"titan's equal transformers' to {gap:.1g} of the largest (64 tokens, fp32)"
