"""Saving and loading of a run's checkpoints: atomic, verified, in the background if asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from titan_core.checkpoint.manifest import Manifest, read_checked, read_manifest
from titan_core.checkpoint.reader import quiet_dcp, read_into
from titan_core.checkpoint.retention import to_remove
from titan_core.checkpoint.staging import Stage
from titan_core.checkpoint.storage import MANIFEST, open_storage
from titan_core.checkpoint.writer import Writer
from titan_core.config import schema
from titan_core.runtime.errors import CheckpointError, RunFailed
from titan_core.runtime.events import Listener, Saved, Warned, silent

SHARED = "shared.json"


@dataclass(frozen=True)
class Snapshot:
    """What is saved: tensors by their DCP names; JSON that is the same on every rank; JSON of this rank; and small
    files that belong to the step (name -> content), from the main rank."""

    tensors: dict[str, Tensor]
    shared: dict[str, Any]
    own: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


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
    """The checkpoints of one run, at a folder or a URL. Every rank constructs one and calls the same methods."""

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
        self.rank, self.size = rank, size
        self.listener = listener
        self._group = dist.new_group(backend="gloo") if size > 1 else None
        self._stage = Stage(pinned=config.async_mode == "async_with_pinned_mem")
        self._thread: threading.Thread | None = None
        self._staged = threading.Event()
        self._staged.set()
        self._error: Exception | None = None
        self._protected: int | None = None
        if rank == 0 and not config.load_only:
            self.storage.clean()

    def steps(self) -> list[int]:
        """Return the complete checkpoints, in order."""
        return self.storage.steps()

    def newest(self) -> int | None:
        """Return the newest complete checkpoint."""
        steps = self.steps()
        return steps[-1] if steps else None

    def path(self, step: int) -> str:
        """Return where a checkpoint lies."""
        return f"{self.storage.root}/{self.storage.path(step)}"

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
        self.finish()
        if blocking:
            self._write(step, snapshot, snapshot.tensors, metrics or {}, began, time.perf_counter)
            return
        fence = self._stage.fence()
        self._staged.clear()
        stall = time.perf_counter() - began

        def work() -> None:
            try:
                self._stage.wait(fence)
                try:
                    copies = self._stage.copy(snapshot.tensors)
                finally:
                    self._staged.set()
                self._write(step, snapshot, copies, metrics or {}, began, lambda: began + stall)
            except Exception as error:  # raised in the training thread by the next call
                self._error = error

        self._thread = threading.Thread(target=work, name="titan-save", daemon=False)
        self._thread.start()

    def wait_staged(self) -> None:
        """Wait until a background save has its copy of the tensors: after this they may change."""
        self._staged.wait()

    def finish(self) -> None:
        """Wait for a background save and raise what failed in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def load(self, tensors: dict[str, Tensor], step: int = -1) -> Loaded | None:
        """Fill `tensors` in place from a step, or from the newest complete one (-1); None if there is none at all.

        With -1 a damaged checkpoint is reported and the one before it taken; a step that was asked for must be sound.
        """
        self.finish()
        wanted = self._broadcast(self.steps() if step < 0 else [step])
        if step >= 0 and step not in self._broadcast(self.steps()):
            raise self._no_step(step)
        skipped: list[tuple[int, str]] = []
        for candidate in reversed(wanted):
            try:
                shared, own = self._agreed(lambda c=candidate: self._load_one(c, tensors))
            except CheckpointError as error:
                if step >= 0:
                    raise
                skipped.append((candidate, str(error)))
                if self.rank == 0:
                    self.listener(Warned(f"checkpoint step-{candidate} cannot be read and is passed over: {error}"))
                continue
            self._protected = candidate
            return Loaded(candidate, self.path(candidate), shared, own, skipped)
        if skipped:
            raise CheckpointError(
                f"none of the {len(skipped)} checkpoints can be read; the newest: {skipped[0][1]}",
                where=self.storage.root,
                tip="start afresh with another `--run` folder, or `--resume never`",
            )
        return None

    def peek(self, step: int = -1) -> dict[str, Any] | None:
        """Return the shared state of a step (-1: the newest that can be read) without its tensors."""
        candidates = self._broadcast(self.steps() if step < 0 else [step])
        for candidate in reversed(candidates):
            try:
                return self._agreed(lambda c=candidate: self._read_json(c))[0]
            except CheckpointError:
                if step >= 0:
                    raise
        return None

    # ------------------------------------------------------------------------------------------ one save

    def _write(
        self,
        step: int,
        snapshot: Snapshot,
        tensors: dict[str, Tensor],
        metrics: dict[str, float],
        began: float,
        stalled_until: Callable[[], float],
    ) -> None:
        try:
            folder = self._agreed(lambda: self._begin(step))
            writer = Writer(self.storage, folder, self.rank)
            self._agreed(lambda: self._write_tensors(writer, tensors))
            self._agreed(lambda: self._write_files(writer, snapshot))
            written = self._gather((writer.pieces, writer.files))
            manifest = Manifest(step, self.size, metrics)
            for pieces, files in written:
                manifest.pieces.update(pieces)
                manifest.files.update(files)
            self._agreed(lambda: self._commit(writer, manifest))
        except CheckpointError:
            if self.rank == 0:
                self.storage.abandon(step)
            raise
        self._protected = step
        if self.rank == 0:
            seconds, stall = time.perf_counter() - began, stalled_until() - began
            self.listener(Saved(step, self.path(step), manifest.num_bytes, seconds, stall))
            self._retain()

    def _begin(self, step: int) -> str:
        return self.storage.begin(step) if self.rank == 0 else ""

    def _write_tensors(self, writer: Writer, tensors: dict[str, Tensor]) -> None:
        try:
            with quiet_dcp():
                dcp.save(dict(tensors), storage_writer=writer, process_group=self._group, no_dist=self.size == 1)
        except dcp.api.CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            if isinstance(cause, OSError):
                raise cause from None
            raise CheckpointError(f"saving failed on rank {rank}: {cause}", where=self.storage.root) from error

    def _write_files(self, writer: Writer, snapshot: Snapshot) -> None:
        writer.write_file(f"ranks/{self.rank}.json", json.dumps(snapshot.own).encode())
        if self.rank == 0:
            writer.write_file(SHARED, json.dumps(snapshot.shared).encode())
            for name, content in snapshot.files.items():
                writer.write_file(name, content)

    def _commit(self, writer: Writer, manifest: Manifest) -> None:
        if self.rank == 0:
            with self.storage.open(f"{writer.folder}/{MANIFEST}", "wb") as file:
                file.write(manifest.to_json())
            self.storage.commit(manifest.step)

    def _retain(self) -> None:
        """Remove what the retention rules no longer keep; a failure to remove is only reported."""
        try:
            steps = self.steps()
            metrics = {}
            if self.config.keep_best_k:
                metrics = {s: read_manifest(self.storage, self.storage.path(s)).metrics for s in steps}
            for step in to_remove(steps, metrics, self.config, self._protected):
                self.storage.remove(step)
        except (OSError, CheckpointError) as error:
            self.listener(Warned(f"an old checkpoint could not be removed: {error}"))

    # ------------------------------------------------------------------------------------------ one load

    def _load_one(self, step: int, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], Any]:
        loaded = self._read_json(step)
        read_into(
            self.storage,
            self.storage.path(step),
            tensors,
            check=self.config.verify,
            group=self._group,
        )
        return loaded

    def _read_json(self, step: int) -> tuple[dict[str, Any], Any]:
        path, check = self.storage.path(step), self.config.verify
        manifest = read_manifest(self.storage, path)
        shared = _json(read_checked(self.storage, path, SHARED, manifest, check), self.path(step))
        own = None
        if manifest.world_size == self.size:
            name = f"ranks/{self.rank}.json"
            own = _json(read_checked(self.storage, path, name, manifest, check), self.path(step))
        return shared, own

    def _no_step(self, step: int) -> CheckpointError:
        steps = self.steps()
        have = ", ".join(map(str, steps[-8:])) or "none"
        return CheckpointError(
            f"there is no complete checkpoint of step {step}",
            where=self.storage.root,
            tip=f"complete: {have}",
        )

    # ------------------------------------------------------------------------------------------ agreement

    def _agreed(self, work: Callable[[], Any]) -> Any:
        """Do something on every rank; if it fails on any, raise the same error on all. Rank 0's strings are shared."""
        result, error, bug = None, None, None
        try:
            result = work()
        except CheckpointError as caught:
            error = caught
        except OSError as caught:
            error = _os_error(caught, self.storage.root)
        except Exception as caught:  # a bug here must not leave the other ranks waiting
            bug = caught
            error = RunFailed(f"rank {self.rank} failed: {type(caught).__name__}: {caught}")
        if self.size > 1:
            outcomes = self._gather((error, result if isinstance(result, str) else None))
            error = next((e for e, _ in outcomes if e is not None), None)
            if isinstance(result, str):
                result = outcomes[0][1]
        if bug is not None:
            raise bug
        if error is not None:
            raise error
        return result

    def _gather(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _broadcast(self, value: Any) -> Any:
        return self._gather(value)[0]


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        return json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"not valid JSON: {error}", where=where) from error


def _os_error(error: OSError, where: str) -> CheckpointError:
    tips = {
        28: "free some space, or lower checkpoint.keep_latest_k; the checkpoints before it are whole",
        30: "the file system is read-only: choose another `--run` folder",
        13: "you may not write there: choose another `--run` folder",
    }
    reason = error.strerror or str(error)
    return CheckpointError(
        f"cannot write or read the checkpoint: {reason}",
        where=where,
        tip=tips.get(error.errno or 0),
    )
