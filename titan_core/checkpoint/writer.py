"""Writes tensors in DCP's format, and hashes each piece on its way to the file."""

from __future__ import annotations

import pickle
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from titan_core.checkpoint.manifest import content_hash, new_hash
from titan_core.checkpoint.storage import Storage
from titan_core.runtime.disk import WRITE_AT_ONCE
from titan_core.runtime.torch_archive import Archive, bytes_view

METADATA = ".metadata"


class Writer(StorageWriter):
    """One rank's writer: all its pieces go into one file, one after the other.

    After a save `pieces` and `files` hold what this rank wrote, with hashes, for the manifest.
    """

    def __init__(self, storage: Storage, folder: str, rank: int) -> None:
        self.storage = storage
        self.folder = folder
        self.file_name = f"__{rank}_0.distcp"
        self.pieces: dict[str, dict[int, tuple[int, str]]] = {}
        self.files: dict[str, tuple[int, str]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to reset: a writer serves one save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the folder is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Take the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Take the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces."""
        results = []
        if plan.items:
            with self.storage.open(f"{self.folder}/{self.file_name}", "wb") as file:
                hashed = _HashingFile(file)
                for item in plan.items:
                    if item.type == WriteItemType.BYTE_IO:
                        raise AssertionError(f"`{item.index.fqn}` is not a tensor")
                    data = planner.resolve_data(item)
                    assert isinstance(data, torch.Tensor)
                    results.append(self._write(hashed, item.index, data))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def write_file(self, name: str, data: bytes) -> None:
        """Write a whole file of the step and remember its hash."""
        with self.storage.open(f"{self.folder}/{name}", "wb") as file:
            file.write(data)
        self.files[name] = (len(data), content_hash(data))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write `.metadata`: where every piece lies (on the coordinating rank)."""
        metadata.storage_data = {r.index: r.storage_data for rank in results for r in rank}
        metadata.storage_meta = StorageMeta(checkpoint_id=None)
        self.write_file(METADATA, pickle.dumps(metadata))

    def storage_meta(self) -> StorageMeta | None:
        """Return nothing: a checkpoint can be moved."""
        return None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Accept everything: the place is given to the constructor."""
        return True

    def _write(self, file: _HashingFile, index: MetadataIndex, tensor: torch.Tensor) -> WriteResult:
        tensor = tensor.detach().cpu().contiguous()
        head, tail = piece_frame(tuple(tensor.shape), tensor.dtype)
        file.start_piece()
        for part in (head, bytes_view(tensor), tail):
            file.write(part)
        offset, length, digest = file.end_piece()
        self.pieces.setdefault(self.file_name, {})[offset] = (length, digest)
        return WriteResult(
            index=index,
            size_in_bytes=length,
            storage_data=_StorageInfo(self.file_name, offset, length),
        )


def piece_frame(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Return what stands before and after the bytes of a tensor in a data file: DCP's pieces are files of torch.save.

    They carry no CRC of their own: torch.load asks for none, and the manifest has a better hash.
    """
    (_, head), (_, tail) = Archive({"": (shape, dtype)}, bare=True).frame({})
    return head, tail


class _HashingFile:
    """A write-only file that counts and hashes what passes through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = 0
        self.start_piece()

    def start_piece(self) -> None:
        self._start = self._position
        self._hash = new_hash()

    def end_piece(self) -> tuple[int, int, str]:
        return self._start, self._position - self._start, self._hash.hexdigest()[:32]

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), WRITE_AT_ONCE):
            part = view[start : start + WRITE_AT_ONCE]
            self._hash.update(part)
            self._file.write(part)
        self._position += len(view)
