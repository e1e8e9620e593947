"""Reads DCP's format without running what it reads, and checks the hash of every piece that it uses."""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from titan_core.checkpoint.manifest import Manifest, content_hash, read_checked, read_manifest
from titan_core.checkpoint.storage import Storage, open_storage
from titan_core.checkpoint.writer import METADATA
from titan_core.runtime.errors import CheckpointError

# All that a `.metadata` written by DCP names. Nothing else is imported or called while reading one.
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(
            f"the metadata wants to run `{module}.{name}`, which no checkpoint needs: refused",
            tip="do not trust this checkpoint",
        )


def read_metadata(storage: Storage, step_path: str, manifest: Manifest, check: bool) -> Metadata:
    """Read `.metadata` with an unpickler that knows DCP's own classes only. Raises `CheckpointError`."""
    where = f"{storage.root}/{step_path}/{METADATA}"
    data = read_checked(storage, step_path, METADATA, manifest, check)
    try:
        metadata = _SafeUnpickler(io.BytesIO(data)).load()
    except CheckpointError as error:
        raise CheckpointError(error.message, where=where, tip=error.tip) from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise CheckpointError(f"the metadata is damaged: {error}", where=where) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError("this is not a checkpoint's metadata", where=where)
    return metadata


class Reader(StorageReader):
    """Reads the pieces that a plan asks for."""

    def __init__(self, storage: Storage, step_path: str, *, check: bool) -> None:
        self.storage = storage
        self.step_path = step_path
        self.check = check
        self.manifest = read_manifest(storage, step_path)
        self.metadata = read_metadata(storage, step_path, self.manifest, check)

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to reset: a reader serves one load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata, read already."""
        return self.metadata

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Take the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Take the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read, check and copy piece by piece; a piece that several items need is read once."""
        by_piece: dict[Any, list[Any]] = {}
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                message = f"`{item.storage_index.fqn}` is not a tensor, and is not read"
                raise CheckpointError(message, where=f"{self.storage.root}/{self.step_path}")
            info = self.metadata.storage_data[item.storage_index]
            by_piece.setdefault((info.relative_path, info.offset, info.length), []).append(item)
        for (name, offset, length), items in sorted(by_piece.items(), key=lambda entry: entry[0]):
            stored = self.read_piece(name, offset, length)
            for item in items:
                source = stored
                for dim, (start, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    source = source.narrow(dim, start, size)
                target = planner.resolve_tensor(item).detach()
                target.copy_(source)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Accept everything: the place is given to the constructor."""
        return True

    def read_piece(self, name: str, offset: int, length: int) -> torch.Tensor:
        """Return one stored tensor, checked. Raises `CheckpointError`."""
        where = f"{self.storage.root}/{self.step_path}/{name}"
        try:
            with self.storage.open(f"{self.step_path}/{name}", "rb") as file:
                file.seek(offset)
                data = file.read(length)
        except FileNotFoundError:
            raise CheckpointError("a file of the checkpoint is missing", where=where) from None
        except OSError as error:
            raise CheckpointError(f"cannot read: {error.strerror or error}", where=where) from error
        if len(data) != length:
            raise CheckpointError(f"the file ends before byte {offset + length}: it is truncated", where=where)
        if self.check:
            known = self.manifest.piece(name, offset)
            if known is None or known != (length, content_hash(data)):
                message = f"bytes {offset} to {offset + length} do not have the manifest's hash: damaged"
                raise CheckpointError(message, where=where)
        try:
            stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # damaged archives raise nearly anything
            reason = str(error).split("\n")[0]
            raise CheckpointError(f"cannot read a tensor at byte {offset}: {reason}", where=where) from error
        if not isinstance(stored, torch.Tensor):
            raise CheckpointError(f"what lies at byte {offset} is not a tensor", where=where)
        return stored


def load_tensors(step_path: str, tensors: Mapping[str, torch.Tensor], *, check: bool = True, group: Any = None) -> None:
    """Fill tensors (or DTensors, of any layout) from a step, in place; each rank reads only what it needs.

    Works with and without a process group. Raises `CheckpointError` if a tensor is missing, has another shape, or is
    damaged; tensors of the checkpoint that are not asked for are left alone.
    """
    root, _, folder = step_path.rstrip("/").rpartition("/")
    read_into(open_storage(root or "."), folder, tensors, check=check, group=group)


def read_into(
    storage: Storage,
    step_path: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    check: bool,
    group: Any,
) -> None:
    """Fill tensors from a step of a storage; see `load_tensors`."""
    reader = Reader(storage, step_path, check=check)
    _check_names(reader, tensors)
    alone = not (dist.is_available() and dist.is_initialized())
    try:
        with quiet_dcp():
            dcp.load(dict(tensors), storage_reader=reader, process_group=group, no_dist=alone)
    except dcp.api.CheckpointException as error:
        raise _first_cause(error, f"{storage.root}/{step_path}") from None


@contextlib.contextmanager
def quiet_dcp() -> Iterator[None]:
    """Keep DCP from warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _check_names(reader: Reader, tensors: Mapping[str, torch.Tensor]) -> None:
    known = reader.metadata.state_dict_metadata
    where = f"{reader.storage.root}/{reader.step_path}"
    missing = [name for name in tensors if name not in known]
    if missing:
        names = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        tip = "is it the checkpoint of another model, or of weights only?"
        raise CheckpointError(f"the checkpoint lacks {len(missing)} tensors: {names}", where=where, tip=tip)
    wrong = []
    for name, tensor in tensors.items():
        entry = known[name]
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"`{name}` is not a tensor, and is not read", where=where)
        if tuple(entry.size) != tuple(tensor.shape):
            wrong.append(f"{name} is {tuple(entry.size)}, wanted {tuple(tensor.shape)}")
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors have another shape: " + "; ".join(wrong[:4]),
            where=where,
            tip="is it the checkpoint of another flavor?",
        )


def _first_cause(error: Any, where: str) -> CheckpointError:
    """Return the error of the first rank that failed."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, CheckpointError):
        return CheckpointError(cause.message, where=cause.where, tip=cause.tip)
    return CheckpointError(f"loading failed on rank {rank}: {cause}", where=where)
