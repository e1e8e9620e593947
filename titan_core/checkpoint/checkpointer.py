"""Saving and loading of a run's checkpoints: atomic, verified, in the background if asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from titan_core.checkpoint.agreement import Ranks, explain
from titan_core.checkpoint.manifest import read_json, read_manifest
from titan_core.checkpoint.places import open_storage
from titan_core.checkpoint.reader import Mismatch, read_into
from titan_core.checkpoint.retention import to_remove
from titan_core.checkpoint.saving import SHARED, Snapshot, rank_file, write_step
from titan_core.checkpoint.staging import Stage
from titan_core.config import schema
from titan_core.runtime.errors import CheckpointError
from titan_core.runtime.events import Listener, Saved, Warned, silent


@dataclass(frozen=True)
class Loaded:
    """What was loaded besides the tensors. `own` is None when the number of ranks has changed; `skipped` names newer
    checkpoints that were damaged, with the reason."""

    step: int
    path: str
    shared: dict[str, Any]
    own: dict[str, Any] | None
    skipped: list[tuple[int, str]]


class Checkpointer:
    """The checkpoints of one run, at a folder or a URL. Every rank constructs one and calls the same methods.

    The listener is called in the caller's thread, on the main rank: what a background save has to say is said by the
    next `save`, `wait_staged` or `finish`.
    """

    def __init__(
        self,
        root: str,
        config: schema.Checkpoint,
        *,
        rank: int = 0,
        size: int = 1,
        listener: Listener = silent,
    ) -> None:
        self.storage = open_storage(root)
        self.config = config
        self.ranks = Ranks.apart(rank, size)
        self.listener = listener
        self._stage = Stage(pinned=config.async_mode == "async_with_pinned_mem")
        self._thread: threading.Thread | None = None
        self._staged = threading.Event()
        self._staged.set()
        self._error: Exception | None = None
        self._stall = 0.0
        self._to_say: list[Callable[[], Saved | Warned]] = []
        self._aside = ThreadPoolExecutor(1, "titan-remove")
        self._removals: list[Future[None]] = []
        self._protected: int | None = None
        self._metrics: dict[int, dict[str, float]] = {}
        if self.ranks.is_main and not config.load_only:
            self._or_warn(self.storage.clean)
            self._say()

    def steps(self) -> list[int]:
        """Return the complete checkpoints, in order, as the main rank sees them; every rank calls it.

        Waits for a save that is under way, and raises what failed in it, or that the place cannot be read, as
        `CheckpointError`.
        """
        self._join()
        return self.ranks.agree(self.storage.steps, self.storage.root, share=True)

    def newest(self) -> int | None:
        """Return the newest complete checkpoint, None if there is none; see `steps`."""
        steps = self.steps()
        return steps[-1] if steps else None

    def path(self, step: int) -> str:
        """Return where a checkpoint lies."""
        return f"{self.storage.root}/{self.storage.path(step)}"

    # ------------------------------------------------------------------------------------------ saving

    def save(
        self,
        step: int,
        snapshot: Snapshot,
        *,
        blocking: bool,
        metrics: dict[str, float] | None = None,
    ) -> None:
        """Save; without `blocking` it returns at once, and `wait_staged` must be called before the tensors change.

        A save that is still under way is waited for, and what failed in it is raised here as `CheckpointError`.
        """
        began = time.perf_counter()
        self._join()
        texts = snapshot.texts(self.ranks.rank)  # now: the trainer goes on to change what they are made of
        if blocking:
            self._write(step, snapshot.tensors, texts, metrics or {}, began)
            self._stall = time.perf_counter() - began
            self._say()
            return
        fence = self._stage.fence(snapshot.tensors)
        self._staged.clear()

        def work() -> None:
            try:
                copies = self.ranks.agree(lambda: self._copy(snapshot.tensors, fence), self.storage.root)
                self._write(step, copies, texts, metrics or {}, began)
            except Exception as error:  # raised in the training thread by the next call
                self._error = error

        self._thread = threading.Thread(target=work, name="titan-save", daemon=False)
        self._thread.start()
        self._stall = time.perf_counter() - began

    def wait_staged(self) -> None:
        """Wait until a background save has its copy of the tensors: after this they may change."""
        if not self._staged.is_set():
            began = time.perf_counter()
            self._staged.wait()
            self._stall += time.perf_counter() - began
        self._say()

    def finish(self) -> None:
        """Wait for a background save and for removals, and raise what failed in the save."""
        self._join()
        for removal in self._removals:
            removal.result()
        self._removals.clear()
        self._say()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._say()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _copy(self, tensors: dict[str, Tensor], fence: Any) -> dict[str, Tensor]:
        try:
            return self._stage.copy(tensors, fence)
        finally:
            self._staged.set()

    def _write(
        self, step: int, tensors: dict[str, Tensor], texts: dict[str, bytes], metrics: dict[str, float], began: float
    ) -> None:
        manifest = write_step(self.storage, self.ranks, step, tensors, texts, metrics)
        self._protected = step
        if self.ranks.is_main:
            seconds, num_bytes = time.perf_counter() - began, sum(manifest.sizes().values())
            self._to_say.append(lambda: Saved(step, self.path(step), num_bytes, seconds, self._stall))
            self._metrics[step] = manifest.metrics
            self._retain()

    def _say(self) -> None:
        """Tell the listener, in the caller's thread, what a background save has left to say."""
        while self._to_say:
            self.listener(self._to_say.pop(0)())

    # ------------------------------------------------------------------------------------------ retention

    def _retain(self) -> None:
        """Hide what the retention rules no longer keep, and remove it aside; a failure is only reported."""
        self._or_warn(self._hide_what_may_go)
        sweep = self._aside.submit(self._or_warn, self.storage.sweep)
        self._removals = [r for r in self._removals if not r.done()] + [sweep]

    def _hide_what_may_go(self) -> None:
        steps = self.storage.steps()
        for step in to_remove(steps, self._scores(steps), self.config, self._protected):
            self.storage.hide(step)

    def _scores(self, steps: list[int]) -> dict[int, dict[str, float]]:
        """Return the metrics of every step, read once; a step whose manifest is damaged has none."""
        for step in steps if self.config.keep_best_k else []:
            if step not in self._metrics:
                try:
                    self._metrics[step] = read_manifest(self.storage, self.storage.path(step)).metrics
                except CheckpointError:
                    self._metrics[step] = {}
        return self._metrics

    def _or_warn(self, work: Callable[[], None]) -> None:
        """Do what may fail without harm to the run."""
        try:
            work()
        except self.storage.errors as error:
            text = f"an old checkpoint could not be removed: {explain(error, self.storage.root)}"
            self._to_say.append(lambda: Warned(text))

    # ------------------------------------------------------------------------------------------ loading

    def load(self, tensors: dict[str, Tensor], step: int = -1) -> Loaded | None:
        """Fill `tensors` in place from a step, or from the newest complete one (-1); None if there is none at all.

        With -1 a damaged checkpoint is reported and the one before it taken, by all ranks alike; a step that was asked
        for must be sound. Tensors of another shape or name are an error in either case.
        """
        skipped: list[tuple[int, str]] = []
        for candidate in reversed(self._candidates(step)):
            try:
                shared, own = self._load_one(candidate, tensors)
            except Mismatch:
                raise
            except CheckpointError as error:
                if step >= 0:
                    raise
                skipped.append((candidate, str(error)))
                if self.ranks.is_main:
                    self.listener(Warned(f"checkpoint step-{candidate} cannot be read and is passed over: {error}"))
                continue
            self._protected = candidate
            if step >= 0:
                self._warn_of_newer(step)
            return Loaded(candidate, self.path(candidate), shared, own, skipped)
        if skipped:
            raise CheckpointError(
                f"none of the {len(skipped)} checkpoints can be read; the newest: {skipped[0][1]}",
                where=self.storage.root,
                tip="start afresh with another `--run` folder",
            )
        return None

    def peek(self, step: int = -1) -> dict[str, Any] | None:
        """Return the shared state of a step (-1: the newest that can be read) without its tensors."""
        for candidate in reversed(self._candidates(step)):
            try:
                return self.ranks.agree(lambda c=candidate: self._read_json(c)[0], self.storage.root)
            except CheckpointError:
                if step >= 0:
                    raise
        return None

    def _candidates(self, step: int) -> list[int]:
        """Return the steps to try, the newest last."""
        steps = self.steps()
        if step < 0:
            return steps
        if step not in steps:
            have = ", ".join(map(str, steps[-8:])) or "none"
            message = f"there is no complete checkpoint of step {step}"
            raise CheckpointError(message, where=self.storage.root, tip=f"complete: {have}")
        return [step]

    def _load_one(self, step: int, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        root, path, check = self.storage.root, self.storage.path(step), self.config.verify
        loaded = self.ranks.agree(lambda: self._read_json(step), root)
        self.ranks.agree(lambda: read_into(self.storage, path, tensors, check=check, strict=False), root)
        return loaded

    def _read_json(self, step: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
        path, check = self.storage.path(step), self.config.verify
        manifest = read_manifest(self.storage, path)
        if manifest.step != step:  # resumed from it, the run would save below it and then start here again
            raise CheckpointError(
                f"this is the checkpoint of step {manifest.step} under another name",
                where=self.path(step),
                tip=f"rename the folder to step-{manifest.step}",
            )
        shared = read_json(self.storage, path, SHARED, manifest, check)
        if manifest.world_size != self.ranks.size:
            return shared, None
        return shared, read_json(self.storage, path, rank_file(self.ranks.rank), manifest, check)

    def _warn_of_newer(self, step: int) -> None:
        """Say that a run that goes on from an older step does not own the newer ones."""
        newer = [other for other in self.steps() if other > step]
        if newer and self.ranks.is_main and not self.config.load_only:
            text = f"step {step} is loaded, but newer checkpoints are there, up to step {newer[-1]}: until this run is "
            text += "past it, `--resume auto` takes that one and not this run's; move them away to go on from here"
            self.listener(Warned(text))
