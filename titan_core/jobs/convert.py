"""`titan convert`: weights from one format to another, streamed, on any number of ranks, resumable and verified."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from titan_core.checkpoint.agreement import Ranks
from titan_core.checkpoint.local import LocalStorage
from titan_core.checkpoint.streaming import StepSink
from titan_core.declare.weights import MetaLayout
from titan_core.interop import stream
from titan_core.interop.boxes import Index, Source
from titan_core.interop.mapping import work_out
from titan_core.interop.pth_sink import PthSink
from titan_core.interop.safetensors_writer import SafetensorsSink
from titan_core.interop.views import CastView, Quantised, TheirView
from titan_core.jobs import foreign
from titan_core.jobs.export_files import hf_files, meta_files
from titan_core.jobs.foreign import Opened, open_weights
from titan_core.jobs.partial import Partial
from titan_core.runtime.disk import WriteBehind
from titan_core.runtime.errors import CheckpointError, MachineError, UsageError
from titan_core.runtime.events import Listener, Note, Planned, Progress, Warned, silent
from titan_core.runtime.host_memory import peak_resident_bytes

Route = Literal[
    "hf-to-dcp", "dcp-to-hf", "meta-to-dcp", "dcp-to-meta", "bfl-to-dcp", "dcp-to-bfl", "dcp-to-torch", "hf-to-hf"
]
ROUTES: tuple[Route, ...] = get_args(Route)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = "fp8-block"
# What the folders of a route's source hold, where it is not a step.
_HOLDS = {
    "hf": "config.json and *.safetensors; `titan download REPO` fetches one",
    "meta": "params.json and consolidated.00.pth",
}
_STEP = 0  # a conversion's result is a run's state before its first step


@dataclass(frozen=True)
class Options:
    """How to convert.

    Sizes are in bytes; `dtype` None keeps what is stored; `parts` is for Meta's format; `dry_run` plans and checks,
    from headers only.
    """

    dtype: str | None = None
    max_shard: int = 5_000_000_000
    memory: int = 1 << 30
    verify: bool = True
    family: str | None = None
    flavor: str | None = None
    parts: int = 1
    fused_qkv: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Converted:
    """What was made. `resumed_bytes` were there from a call that was killed; `peak_rss` is this process's, in bytes.

    `verified`: all that was written was read again, from the disk where its file system can, and has the same hashes.
    """

    path: str
    tensors: int
    bytes: int
    seconds: float
    verified: bool
    resumed_bytes: int
    peak_rss: int
    dry_run: bool = False


def run(
    route: Route,
    source: str,
    target: str,
    options: Options | None = None,
    *,
    ranks: Ranks | None = None,
    listener: Listener = silent,
) -> Converted:
    """Convert `source` into `target`, which must not be there yet; every rank calls it.

    An error leaves nothing behind; a killed call is gone on with by the next one with the same words.
    """
    ranks, options = ranks or Ranks.present(), options or Options()
    began = time.perf_counter()
    opened = ranks.agree(lambda: _open(route, source, options), source)
    view = ranks.agree(lambda: _view(route, opened, options), source)
    partial, sink = ranks.agree(lambda: _sink(route, opened, view, target, options), target)
    total = sum(job.num_bytes for job in sink.jobs)
    if ranks.is_main and opened.left_out:
        listener(Note(f"{opened.left_out} tensors are of parts that {opened.known_family().name} has not: left out"))
    if ranks.is_main:
        listener(Planned(_plan(opened, view, sink, total, target)))
    say = listener if options.dry_run else None
    ranks.agree(lambda: _check_space(partial.folder, total, say) if ranks.is_main else None, target)
    if options.dry_run:
        return Converted(
            target, len(view.index), total, time.perf_counter() - began, False, 0, peak_resident_bytes(), dry_run=True
        )
    kept = _make(view, sink, partial, ranks, options.verify, listener)
    seconds = time.perf_counter() - began
    return Converted(target, len(view.index), total, seconds, options.verify, kept, peak_resident_bytes())


def _make(view: Source, sink: Any, partial: Partial, ranks: Ranks, verify: bool, listener: Listener) -> int:
    """Write, verify and commit; returns the bytes that a killed call had done."""
    target = str(partial.target)
    resumed = ranks.agree(lambda: partial.begin() if ranks.is_main else False, target, share=True)
    try:
        ours = stream.share(sink.jobs, ranks.rank, ranks.size)
        known = ranks.agree(lambda: _sound(sink, ours, partial) if resumed else {}, target)
        ranks.agree(lambda: sink.prepare() if ranks.is_main else None, target)
        kept = sum(ranks.gather(sum(job.num_bytes for job in ours if job.number in known), target))
        if kept and ranks.is_main:
            listener(Note(f"going on: {kept:,} bytes are there"))
        todo = [job for job in ours if job.number not in known]
        with WriteBehind() as behind:
            known |= ranks.agree(lambda: _work(view, sink, todo, verify, partial, behind, ranks, listener), target)
        known = {number: record for found in ranks.gather(known, target) for number, record in found.items()}
        ranks.agree(lambda: _finish(sink, known, partial) if ranks.is_main else None, target)
    except Exception:
        if ranks.is_main:
            partial.abandon()
        raise
    except BaseException:  # a signal: the next call goes on
        partial.release()
        raise
    return kept


def _open(route: Route, source: str, options: Options) -> Opened:
    """Open the source, and look that it has the format that the route says."""
    wanted = route.partition("-to-")[0]
    if wanted in _HOLDS and "://" in source:
        raise UsageError(f"`{source}` is not a local folder", tip="copy it to one first")
    if wanted in _HOLDS and not Path(source).exists():
        raise UsageError(f"there is nothing at `{source}`", tip=f"{route} reads a folder with {_HOLDS[wanted]}")
    kind = foreign.kind_of(source)
    if kind != wanted:
        fitting = [name for name in ROUTES if name.startswith(f"{kind}-to-")]
        tip = f"`titan convert {fitting[0]}` reads that" if fitting else None
        raise UsageError(f"`{source}` is {foreign.SAYS[kind]}, not {foreign.SAYS[wanted]}", tip=tip)
    opened = open_weights(source, family_name=options.family, flavor=options.flavor)
    if opened.left_out and route == "hf-to-hf":
        return foreign.open_hf(source)  # nothing has to fit titan's model: all of it is kept
    foreign.check_copies(opened)
    return opened


def _view(route: Route, opened: Opened, options: Options) -> Source:
    """Return the source under the names and in the dtypes of the target."""
    if route.endswith("-to-dcp") or route == "dcp-to-torch":
        view = opened.ours
    elif route == "hf-to-hf":
        view = opened.raw
    else:
        view = TheirView(opened.ours, _target_map(route, opened, options))
    if options.dtype == FP8:
        if not route.endswith("-to-hf"):
            raise UsageError(f"`--dtype {FP8}` is for Hugging Face folders")
        return Quantised(view, _scaled(opened, view))
    if options.dtype is None:
        return view
    return CastView(view, DTYPES[options.dtype])


def _target_map(route: Route, opened: Opened, options: Options) -> Any:
    chosen = opened.family
    assert chosen is not None
    weights = foreign.weights_of(chosen)
    if route == "dcp-to-hf":
        rules = weights.rules(opened.sizes)
    elif route == "dcp-to-bfl":
        rules = foreign.single_of(chosen).rules(opened.sizes)
    elif weights.meta is None:
        raise UsageError(f"titan knows no Meta form of {chosen.name}")
    else:
        rules = weights.meta.rules(opened.sizes, MetaLayout(options.parts, options.fused_qkv))
    return work_out(rules, chosen.parameters(opened.sizes))


def _scaled(opened: Opened, view: Source) -> set[str]:
    """Return the weights that get block scales: those that had them, else the projections."""
    if opened.scaled:
        return set(opened.scaled)
    if opened.family is None:
        raise UsageError("the family is not known, so neither is which weights are projections", where=opened.path)
    weights = foreign.weights_of(opened.family)
    mapping = work_out(weights.rules(opened.sizes), opened.family.parameters(opened.sizes))
    roles = {p.name: p.role for p in opened.family.parameters(opened.sizes)}
    return {
        name
        for name, pieces in mapping.theirs.items()
        if all(roles[piece.ours] in ("hidden", "expert") for piece in pieces)
        and len(view.index[name][0]) == 2
        and not any(fnmatchcase(name, pattern) for pattern in weights.unscaled)
    }


# ---------------------------------------------------------------------------------------------- the target


def _sink(route: Route, opened: Opened, view: Source, target: str, options: Options) -> tuple[Partial, Any]:
    """Return the sink and the folder that it writes into."""
    if "://" in target:
        raise UsageError(f"`{target}` is not a local folder", tip="convert to a folder and copy it")
    slab = stream.slab_limit(options.memory)
    place = Path(target).absolute()
    to = route.partition("-to-")[2]
    if to == "dcp":
        storage = LocalStorage(str(place))
        final, folder = place / storage.path(_STEP), place / storage.pending(_STEP)
        if place.is_file():
            raise UsageError(f"`{target}` is a file")
        jobs = _step_jobs(view.index, slab)
        sink: Any = StepSink(storage, _STEP, view.index, jobs, foreign.step_files(opened))
        return Partial(final, folder, _fingerprint(route, opened, view.index, jobs)), sink
    folder = place.parent / f".{place.name}.partial"
    if to == "hf":
        files = hf_files(opened, view.index, options.dtype)
        stem = "model"
        if opened.family is not None and foreign.weights_of(opened.family).library == "diffusers":
            stem = "diffusion_pytorch_model"
        sink = SafetensorsSink(folder, view.index, slab=slab, max_shard=options.max_shard, files=files, stem=stem)
    elif to == "bfl":
        if place.suffix != ".safetensors":
            raise UsageError(f"`{target}` does not end in .safetensors", tip="such a checkpoint is one file")
        sink = SafetensorsSink(folder, view.index, slab=slab, max_shard=None, files={}, stem=place.stem)
        return _SingleFile(place, folder, _fingerprint(route, opened, view.index, sink.jobs)), sink
    elif to == "meta":
        contents: dict[str, list[str]] = {}
        for name in view.index:
            contents.setdefault(f"consolidated.{name.partition('/')[0]}.pth", []).append(name)
        prefixes = {file: file.split(".")[1] + "/" for file in contents}
        files = meta_files(opened)
        sink = PthSink(folder, view.index, dict(sorted(contents.items())), slab=slab, prefixes=prefixes, files=files)
    else:
        sink = PthSink(folder, view.index, {place.name: list(view.index)}, slab=slab, prefixes={}, files={})
        return _SingleFile(place, folder, _fingerprint(route, opened, view.index, sink.jobs)), sink
    return Partial(place, folder, _fingerprint(route, opened, view.index, sink.jobs)), sink


class _SingleFile(Partial):
    """A target that is one file: it is written in a hidden folder beside."""

    def commit(self) -> None:
        """Move the file and remove the folder."""
        self.sync()
        (self.folder / self.target.name).rename(self.target)
        self.abandon()


def _step_jobs(index: Index, slab: int) -> list[stream.Job]:
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in index.values())
    cuts = stream.divide(list(index), index, slab, stream.job_limit(total))
    return [stream.Job(number, f"__{number}_0.distcp", *cut) for number, cut in enumerate(cuts)]


def _fingerprint(route: Route, opened: Opened, index: Index, jobs: Any) -> str:
    """Return a hash of what is made of what: a job that was killed is gone on with only if it is the same."""
    place = Path(opened.path)
    names = sorted(place.iterdir()) if place.is_dir() else [place]
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in names if path.is_file()]
    said = json.dumps([route, str(place.absolute()), files, sorted(opened.assets)])
    shapes = "".join(f"{name}{shape}{dtype}" for name, (shape, dtype) in index.items())
    cuts = "".join(f"{job.file}{job.slabs}" for job in jobs)
    return hashlib.sha256((said + shapes + cuts).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- the work


def _sound(sink: Any, jobs: list[stream.Job], partial: Partial) -> dict[int, dict[str, Any]]:
    """Return the records of the jobs that a killed call did, and whose bytes are there as it wrote them."""
    found = partial.done()
    sound: dict[int, dict[str, Any]] = {}
    for job in jobs:
        with contextlib.suppress(CheckpointError, OSError, KeyError, ValueError):
            if job.number in found and not sink.check(job, found[job.number]):
                sound[job.number] = found[job.number]
    return sound


def _work(
    view: Source,
    sink: Any,
    todo: list[stream.Job],
    verify: bool,
    partial: Partial,
    behind: WriteBehind,
    ranks: Ranks,
    listener: Listener,
) -> dict[int, dict[str, Any]]:
    """Do this rank's jobs, read each again if asked, and note it in the journal."""
    records: dict[int, dict[str, Any]] = {}

    def done(job: stream.Job, record: dict[str, Any]) -> None:
        partial.record(ranks.rank, job.number, record)
        behind.start(sink.path(job))
        records[job.number] = record

    stream.run(view, sink, todo, verify=verify, done=done, progress=_counter(todo, ranks, listener))
    return records


def _counter(jobs: list[stream.Job], ranks: Ranks, listener: Listener) -> Callable[[int], None]:
    """Return what is told of each slab's bytes: the main rank shows its own share."""
    total, state = sum(job.num_bytes for job in jobs), [0, 0.0]
    named = "convert" if ranks.size == 1 else f"convert 1/{ranks.size}"

    def count(num_bytes: int) -> None:
        state[0] += num_bytes
        if ranks.is_main and (time.monotonic() - state[1] > 0.1 or state[0] >= total):
            state[1] = time.monotonic()
            listener(Progress(named, state[0], total, "bytes"))

    return count


def _finish(sink: Any, records: dict[int, dict[str, Any]], partial: Partial) -> None:
    if isinstance(sink, StepSink):
        partial.drop_journal()
        partial.sync()
        sink.finish(records)  # which commits
        partial.release()
        return
    sink.finish(records)
    partial.drop_journal()
    partial.commit()


def _check_space(folder: Path, total: int, only_say: Listener | None) -> None:
    """Refuse, or only say, that the disk is too small; what a killed call left there is already paid for."""
    if folder.exists():
        return
    place = folder
    while not place.exists():
        place = place.parent
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize
    if free >= total:
        return
    message = f"{total / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB are free"
    if only_say is None:
        raise MachineError(message, where=str(folder.parent), tip="choose a place with more room, or a smaller --dtype")
    only_say(Warned(message))


def _plan(opened: Opened, view: Source, sink: Any, total: int, target: str) -> list[tuple[str, str]]:
    model = "of an unknown family" if opened.family is None else opened.family.name
    files = len({job.file for job in sink.jobs})
    dtypes = sorted({str(dtype).removeprefix("torch.") for _, dtype in view.index.values()})
    return [
        ("from", f"{opened.path}, {foreign.SAYS[opened.format]}, {model}"),
        ("to", f"{target}, {len(view.index)} tensors, {total / 1e9:.2f} GB, {', '.join(dtypes)}, {files} files"),
    ]
