"""What one rank cannot do, no rank does: every step of a save or a load ends with all ranks knowing how it went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from titan_core.runtime.errors import CheckpointError, TitanError

Result = TypeVar("Result")
# A rank may wait for another one's disk for long. `runtime.distributed.set_timeout` leaves groups of this name alone.
_PATIENCE = timedelta(hours=2)
_GROUP_NAME = "checkpoint"

_TIPS = {
    13: "you may not do that there: choose another `--run` folder",
    28: "free some space, or lower checkpoint.keep_latest_k; the checkpoints before it are whole",
    30: "the file system is read-only: choose another `--run` folder",
    122: "your quota is used up: free some space, or lower checkpoint.keep_latest_k",
}


@dataclass(frozen=True)
class Ranks:
    """The ranks that save or load together; without a group there is only this one."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def apart(cls, rank: int, size: int) -> Ranks:
        """Make a group of their own for all ranks, for work beside the training's collectives; every rank calls it."""
        if size == 1:
            return cls()
        group = dist.new_group(backend="gloo", timeout=_PATIENCE, group_desc=_GROUP_NAME)
        return cls(rank, size, group)

    @classmethod
    def present(cls, group: Any = None) -> Ranks:
        """Return the ranks of a group (None: all that there are)."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(group), dist.get_world_size(group), group)

    @property
    def is_main(self) -> bool:
        """Is this the rank that does what only one may do?"""
        return self.rank == 0

    def agree(self, work: Callable[[], Result], where: str, *, share: bool = False) -> Result:
        """Do something on every rank; if it fails on any, all raise the same `CheckpointError` at the same point.

        With `share` the main rank's result is returned on every rank. `work` must not contain a collective that a
        failure on another rank would leave waiting.
        """
        result, error, cause = None, None, None
        try:
            result = work()
        except Exception as caught:
            cause, error = caught, explain(caught, where, self.rank)
        if self.size > 1:
            outcomes = self.gather((error, result if share and self.is_main else None), where)
            error = next((e for e, _ in outcomes if e is not None), None)
            if share:
                result = outcomes[0][1]
        if error is not None:
            raise error from (cause if cause is not error else None)
        return result  # pyright: ignore[reportReturnType]

    def gather(self, value: Any, where: str) -> list[Any]:
        """Return every rank's value on every rank. Raises `CheckpointError` if a rank is gone."""
        values: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        with _Reached(where):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_to_main(self, value: Any, where: str) -> list[Any]:
        """Return every rank's value on the main rank, nothing on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size if self.is_main else []
        with _Reached(where):
            dist.gather_object(value, values if self.is_main else None, group=self.group, group_dst=0)
        return values


class _Reached:
    """Turns a lost connection into a sentence."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            reason = str(error).split("\n")[0][:200]
            message = f"another rank cannot be reached while saving or loading: {reason}"
            tip = "it ended, or its disk hangs; the last complete checkpoint is whole"
            raise CheckpointError(message, where=self._where, tip=tip) from error


def explain(error: Exception, where: str, rank: int = 0) -> TitanError:
    """Return the error that a user sees for what went wrong in a storage."""
    if isinstance(error, TitanError):
        return error
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        place = error.filename if isinstance(error.filename, str) else where
        tip = _TIPS.get(error.errno or 0)
        return CheckpointError(f"cannot write or read the checkpoint: {reason}", where=place, tip=tip)
    tip = "can the store be reached, and are its address and credentials right?" if "://" in where else None
    return CheckpointError(f"rank {rank} failed: {type(error).__name__}: {error}", where=where, tip=tip)
