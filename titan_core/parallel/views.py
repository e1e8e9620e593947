"""Parameters that a module sees through a function.

Engines store parameters split over ranks; a module wants plain tensors. A view stands between them: the module reads
`self.weight` and gets what the view makes of the parameter (a local part, a gathered whole), differentiably, while the
parameter itself keeps its name, its place in the state dict and its gradient. So models need no word of any layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

View = Callable[[Tensor], Tensor]


def add_view(module: nn.Module, name: str, view: View) -> None:
    """Show parameter `name` of a module through `view` from now on; a second view looks at what the first one shows."""
    views: dict[str, View] = module.__dict__.setdefault("_titan_views", {})
    inner = views.get(name)
    views[name] = view if inner is None else lambda parameter: view(inner(parameter))
    if inner is None:
        module.__class__ = _class_with_view(type(module), name)


@cache
def _class_with_view(cls: type[nn.Module], name: str) -> type[nn.Module]:
    """Return a class whose attribute `name` is what a view makes of the parameter.

    One for all modules of a class: to the compiler, a block with modules of other classes is another block. It would
    compile each anew, and give up at the ninth.
    """
    return type(cls.__name__, (cls,), {name: property(_reader(name)), "__module__": cls.__module__})


def _reader(name: str) -> Callable[[Any], Tensor]:
    def read(module: Any) -> Tensor:
        return module._titan_views[name](module._parameters[name])

    return read


def split(
    module: nn.Module, name: str, mesh: DeviceMesh, dims: Sequence[int | None], view: View = lambda local: local
) -> None:
    """Store a parameter as a DTensor, split along one dimension for each axis of a mesh (None: replicated), and show
    the module what a view makes of its local part. What is split already stays as it is."""
    parameter = module._parameters[name]
    if parameter is None or isinstance(parameter, DTensor):
        return
    placements = [Replicate() if dim is None else Shard(dim % parameter.dim()) for dim in dims]
    stored = distribute_tensor(parameter.data, mesh, placements, src_data_rank=None)
    module._parameters[name] = nn.Parameter(stored, requires_grad=parameter.requires_grad)

    def local(stored: Any) -> Tensor:
        # what FSDP has sharded further is on its mesh; only FSDP looks at it then, and nobody computes with it
        return view(stored.to_local()) if stored.device_mesh == mesh else stored

    add_view(module, name, local)


class Passage(nn.Module):
    """Stands where a model has a module that is on another rank."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream as it came."""
        return x


def wrap_forward(module: nn.Module, around: Callable[..., Any]) -> None:
    """Replace `module.forward(...)` by `around(forward, ...)`; the module keeps its names and its class."""
    forward = module.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(forward, *args, **kwargs)

    module.forward = wrapped
