"""Reads DCP's format without running what it reads, and checks the hash of every piece that it uses."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from titan_core.checkpoint.agreement import Ranks
from titan_core.checkpoint.manifest import Manifest, new_hash, read_checked, read_manifest, reason
from titan_core.checkpoint.places import split
from titan_core.checkpoint.storage import Storage
from titan_core.checkpoint.writer import METADATA, piece_frame
from titan_core.runtime.errors import CheckpointError
from titan_core.runtime.torch_archive import bytes_view

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

_READ_AT_ONCE = 1 << 20
_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")


class Mismatch(CheckpointError):
    """The checkpoint is whole, but holds other tensors than those asked for."""


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
    try:
        sound = all(map(_is_entry, metadata.storage_data.items())) and all(
            map(_is_description, metadata.state_dict_metadata.items())
        )
    except (AttributeError, TypeError) as error:  # an object that was made without its fields
        raise CheckpointError(f"the metadata is damaged: {error}", where=where) from error
    if not sound:
        message = "the metadata points outside of the checkpoint, or is not of DCP's form: refused"
        raise CheckpointError(message, where=where, tip="do not trust this checkpoint")
    return metadata


def _is_entry(entry: tuple[Any, Any]) -> bool:
    """Does this say where a piece of a tensor lies, in a data file of the step itself?"""
    index, info = entry
    return (
        isinstance(index, MetadataIndex)
        and isinstance(index.fqn, str)
        and isinstance(info, _StorageInfo)
        and _DATA_FILE.fullmatch(info.relative_path) is not None
        and isinstance(info.offset, int)
        and isinstance(info.length, int)
    )


def _is_description(entry: tuple[Any, Any]) -> bool:
    """Does this say what a name stands for? What is no tensor is never read."""
    name, described = entry
    if not isinstance(described, TensorStorageMetadata):
        return isinstance(name, str)
    return (
        isinstance(name, str)
        and isinstance(described.properties.dtype, torch.dtype)
        and all(isinstance(length, int) for length in described.size)
        and all(isinstance(n, int) for chunk in described.chunks for n in (*chunk.offsets, *chunk.sizes))
    )


def _describe(metadata: Metadata) -> dict[tuple[str, int], tuple[tuple[int, ...], torch.dtype]]:
    """Return (data file, offset) -> (shape, dtype) of the pieces that the metadata knows."""
    found = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        for chunk in entry.chunks:
            info = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
            if info is not None:
                found[info.relative_path, info.offset] = (tuple(chunk.sizes), entry.properties.dtype)
    return found


class Reader(StorageReader):
    """Reads the pieces that a plan asks for."""

    def __init__(self, storage: Storage, step_path: str, *, check: bool) -> None:
        self.storage = storage
        self.step_path = step_path
        self.check = check
        self.manifest = read_manifest(storage, step_path)
        self.metadata = read_metadata(storage, step_path, self.manifest, check)
        self._described = _describe(self.metadata)

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
        by_file: dict[str, dict[tuple[int, int], list[ReadItem]]] = {}
        for item in plan.items:
            info = self.metadata.storage_data[item.storage_index]
            pieces = by_file.setdefault(info.relative_path, {})
            pieces.setdefault((info.offset, info.length), []).append(item)
        for name, pieces in sorted(by_file.items()):
            with self.open(name) as file:
                for (offset, length), items in sorted(pieces.items(), key=lambda entry: entry[0]):
                    stored = self.read_piece(file, name, offset, length)
                    for item in items:
                        _fill(planner, item, stored)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Accept everything: the place is given to the constructor."""
        return True

    def open(self, name: str) -> Any:
        """Open a data file. Raises `CheckpointError`."""
        try:
            return self.storage.open(f"{self.step_path}/{name}", "rb")
        except FileNotFoundError:
            raise CheckpointError("a file of the checkpoint is missing", where=self._where(name)) from None
        except self.storage.errors as error:
            raise CheckpointError(f"cannot read: {reason(error)}", where=self._where(name)) from error

    def read_piece(self, file: Any, name: str, offset: int, length: int) -> torch.Tensor:
        """Return one stored tensor of an open data file, checked. Raises `CheckpointError`."""
        where = self._where(name)
        known, digest = self.manifest.pieces.get(name, {}).get(offset, (None, ""))
        message = f"bytes {offset} to {offset + length} do not have the manifest's hash: damaged"
        if self.check and known != length:
            raise CheckpointError(message, where=where)
        try:
            data = torch.empty(length, dtype=torch.uint8)
        except RuntimeError as error:
            raise CheckpointError(f"a tensor claims {length} bytes", where=where) from error
        view = bytes_view(data)
        if self._read_hashed(file, offset, view, where) != digest and self.check:
            raise CheckpointError(message, where=where)
        if (name, offset) in self._described:  # the bytes around it are those that titan writes: no copy is needed
            shape, dtype = self._described[name, offset]
            head, tail = piece_frame(shape, dtype)
            end = length - len(tail)
            if view[: len(head)] == head and view[end:] == tail:
                return data[len(head) : end].view(dtype).reshape(shape)
        try:
            stored = torch.load(io.BytesIO(view), map_location="cpu", weights_only=True)
        except Exception as error:  # damaged archives raise nearly anything
            first_line = str(error).split("\n", 1)[0]
            raise CheckpointError(f"cannot read a tensor at byte {offset}: {first_line}", where=where) from error
        if not isinstance(stored, torch.Tensor):
            raise CheckpointError(f"what lies at byte {offset} is not a tensor", where=where)
        return stored

    def _read_hashed(self, file: Any, offset: int, target: memoryview, where: str) -> str:
        """Fill a buffer, hash it while it is in the processor's cache, and return the hash."""
        digest, done = new_hash(self.manifest.version), 0
        try:
            file.seek(offset)
            while done < len(target):
                count = file.readinto(target[done : done + _READ_AT_ONCE])
                if not count:
                    end = offset + len(target)
                    raise CheckpointError(f"the file ends before byte {end}: it is truncated", where=where)
                digest.update(target[done : done + count])
                done += count
        except self.storage.errors as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"cannot read: {reason(error)}", where=where) from error
        return digest.hexdigest()[:32]

    def _where(self, name: str) -> str:
        return f"{self.storage.root}/{self.step_path}/{name}"


def load_tensors(
    step_path: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    check: bool = True,
    strict: bool = True,
    group: Any = None,
) -> None:
    """Fill tensors (or DTensors, of any layout) from a step, in place; each rank reads only what it needs.

    Works with and without a process group; with one, every rank calls it, and if it fails on one it fails on all.
    Floating-point values are cast to the dtype of the target. Raises `CheckpointError` if a tensor is missing, has
    another shape or kind of number, or is damaged, and, if `strict`, if the step has weights that are not asked for
    (`optimizer.*` is left alone).
    """
    storage, folder = split(step_path)
    ranks = Ranks.present(group)
    ranks.agree(lambda: read_into(storage, folder, tensors, check=check, strict=strict), step_path)


def read_into(
    storage: Storage,
    step_path: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    check: bool,
    strict: bool,
) -> None:
    """Fill tensors from a step of a storage, without a word to other ranks; see `load_tensors`."""
    reader = Reader(storage, step_path, check=check)
    _check_names(reader, tensors, strict)
    try:
        with quiet_dcp():
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, CheckpointError):
            raise cause from None
        where = f"{storage.root}/{step_path}"
        raise CheckpointError(f"loading failed: {type(cause).__name__}: {cause}", where=where) from error


@contextlib.contextmanager
def quiet_dcp() -> Iterator[None]:
    """Keep DCP from warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _fill(planner: LoadPlanner, item: ReadItem, stored: torch.Tensor) -> None:
    """Copy the part of a stored piece that an item asks for into its target."""
    for dim, (start, size) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        stored = stored.narrow(dim, start, size)
    target = planner.resolve_tensor(item).detach()
    target.copy_(stored)
    planner.commit_tensor(item, target)


def _check_names(reader: Reader, tensors: Mapping[str, torch.Tensor], strict: bool) -> None:
    known = reader.metadata.state_dict_metadata
    where = f"{reader.storage.root}/{reader.step_path}"
    missing = [name for name in tensors if name not in known]
    if missing:
        tip = "is it the checkpoint of another model, or of weights only?"
        raise Mismatch(f"the checkpoint lacks {len(missing)} tensors: {_some(missing)}", where=where, tip=tip)
    wrong = [text for name, tensor in tensors.items() if (text := _difference(name, tensor, known[name]))]
    if wrong:
        message = f"{len(wrong)} tensors differ: {_some(wrong, '; ')}"
        raise Mismatch(message, where=where, tip="is it the checkpoint of another flavor?")
    unasked = [name for name in known if name not in tensors and not name.startswith("optimizer.")]
    if strict and unasked:
        message = f"the checkpoint has {len(unasked)} tensors that the model lacks: {_some(unasked)}"
        raise Mismatch(message, where=where, tip="is it the checkpoint of another model?")


def _difference(name: str, tensor: torch.Tensor, entry: Any) -> str | None:
    """Return how a stored entry differs from the tensor that it should fill."""
    if not isinstance(entry, TensorStorageMetadata):
        return f"{name} is not a tensor, and is not read"
    if tuple(entry.size) != tuple(tensor.shape):
        return f"{name} is {tuple(entry.size)}, wanted {tuple(tensor.shape)}"
    stored = entry.properties.dtype
    if stored != tensor.dtype and not (stored.is_floating_point and tensor.dtype.is_floating_point):
        return f"{name} is {stored}, wanted {tensor.dtype}"
    return None


def _some(names: list[str], separator: str = ", ") -> str:
    return separator.join(names[:8]) + (f"{separator}..." if len(names) > 8 else "")
