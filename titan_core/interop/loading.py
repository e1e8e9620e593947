"""Foreign weights straight into tensors of any layout: each rank reads the bytes of its own shards."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from titan_core.interop.boxes import Slab, Source, cut
from titan_core.runtime.errors import CheckpointError

_AT_ONCE = 64 << 20  # bytes of a region that is read at once


def fill(source: Source, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors (or DTensors of any layout) in place from a source; values are cast to the target's dtype.

    Works without a word between ranks. Raises `CheckpointError` if a tensor is not there or has another shape.
    """
    for name, tensor in tensors.items():
        if name not in source.index:
            raise CheckpointError(f"the weights have no `{name}`")
        if source.index[name][0] != tuple(tensor.shape):
            found, wanted = list(source.index[name][0]), list(tensor.shape)
            raise CheckpointError(
                f"`{name}` is {found}, wanted {wanted}", tip="are they the weights of another flavor?"
            )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            dcp.load(dict(tensors), storage_reader=_Reader(source), no_dist=True)
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise cause if isinstance(cause, CheckpointError) else CheckpointError(f"loading failed: {cause}") from error


class _Reader(StorageReader):
    """Lets DCP's planner work out which regions a layout needs, as if each tensor were stored in one piece."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing to reset."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index in DCP's words."""
        entries, places = {}, {}
        for name, (shape, dtype) in self._source.index.items():
            start = torch.Size([0] * len(shape))
            chunk = ChunkStorageMetadata(start, torch.Size(shape))
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [chunk])
            places[MetadataIndex(name, start)] = None
        return Metadata(entries, storage_data=places)

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Take the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Take the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read each region in slabs and copy it to its place."""
        for item in plan.items:
            name = item.storage_index.fqn
            target = planner.resolve_tensor(item).detach()
            itemsize = self._source.index[name][1].itemsize
            for slab in cut(name, tuple(item.lengths), itemsize, _AT_ONCE):
                place = target
                for dim, (start, size) in enumerate(zip(slab.start, slab.size, strict=True)):
                    place = place.narrow(dim, start, size)
                place.copy_(self._read(slab, tuple(item.storage_offsets)))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Accept everything."""
        return True

    def _read(self, slab: Slab, base: tuple[int, ...]) -> Tensor:
        start = tuple(a + b for a, b in zip(base, slab.start, strict=True))
        return self._source.read(slab.name, start, slab.size)
