"""A ledger of what a computation on fake tensors would do: bytes alive, and every collective with its bytes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch's names of operations, in the field's words
_NAMES = {
    "all_gather_into_tensor": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "allreduce_": "all-reduce",
    "all_to_all_single": "all-to-all",
    "alltoall_base_": "all-to-all",
    "broadcast": "broadcast",
    "broadcast_": "broadcast",
}
Key = tuple[str, str]  # (collective, axis)


class Ledger(TorchDispatchMode):
    """Records what runs inside of it. `axes` names process groups.

    `live` and `peak` are bytes of all storages made inside or put in by `hold`; `peak_resized` the most bytes in those
    that somebody resizes, as FSDP does with the parameters that it gathers. `calls` and `bytes` count collectives, a
    collective's bytes being those of its whole tensor.
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__()
        self.axes = axes
        self.live = self.peak = self.peak_resized = self._resized = 0
        self.calls: Counter[Key] = Counter()
        self.bytes: Counter[Key] = Counter()
        self._sizes: dict[int, int] = {}
        self._resizable: set[int] = set()

    def hold(self, tensors: Any) -> None:
        """Count tensors that are there already."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)

    def sizes(self) -> dict[int, int]:
        """Return the bytes of every storage that is alive, by a number for it."""
        return dict(self._sizes)

    def without_resized(self, sizes: dict[int, int]) -> int:
        """Return the bytes of storages that nobody has resized until now."""
        return sum(size for key, size in sizes.items() if key not in self._resizable)

    def __enter__(self) -> Ledger:
        ledger, original = self, torch.UntypedStorage.resize_
        self._original = original

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            ledger._resize(storage, size)
            return result

        setattr(torch.UntypedStorage, "resize_", resize_)  # noqa: B010 - no operation tells of it
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        setattr(torch.UntypedStorage, "resize_", self._original)  # noqa: B010
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with the local tensors
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func, args, result)
        self.hold(result)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            weakref.finalize(storage, self._forget, key).atexit = False
            self._count(storage.nbytes())

    def _resize(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)
        if key not in self._sizes:
            return
        change = size - self._sizes[key]
        self._resized += change if key in self._resizable else size
        self.peak_resized = max(self.peak_resized, self._resized)
        self._resizable.add(key)
        self._sizes[key] = size
        self._count(change)

    def _forget(self, key: int) -> None:
        size = self._sizes.pop(key, 0)
        if key in self._resizable:
            self._resizable.discard(key)
            self._resized -= size
        self._count(-size)

    def _count(self, change: int) -> None:
        self.live += change
        self.peak = max(self.peak, self.live)

    def _note(self, func: Any, args: Any, result: Any) -> None:
        name = _NAMES.get(func._schema.name.partition("::")[2])
        if name is None:
            return
        key = name, self._axis(args)
        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
        self.calls[key] += 1
        self.bytes[key] += max(x.numel() * x.element_size() for x in tensors)

    def _axis(self, args: Any) -> str:
        """Return the axis whose group a call names."""
        for group in _groups(args):
            if group in self.axes:
                return self.axes[group]
        return "world"


def _groups(args: Any) -> Iterator[str]:
    for arg in args:
        if isinstance(arg, str):
            yield arg
        elif isinstance(arg, torch.ScriptObject):
            yield dist.ProcessGroup.unbox(arg).group_name
