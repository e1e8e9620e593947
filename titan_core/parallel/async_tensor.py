"""Asynchronous tensor parallelism: gathers and scatters taken apart and overlapped with the matmuls beside them.

The compiler does it (Wang et al. 2022, as torch's micro-pipelining), on GPUs that can read each other's memory. Whether
it found anything to fuse is in the graphs that it makes, so they are counted and reported.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch._inductor.config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.distributed import ProcessGroup
from torch.distributed._symmetric_memory import enable_symm_mem_for_group

from titan_core.runtime.errors import MachineError


class Fusions(CustomGraphPass):
    """Counts, in every graph that is compiled, exchanges that are fused with matmuls and those that are not."""

    def __init__(self) -> None:
        self.fused: Counter[str] = Counter()
        self.left: Counter[str] = Counter()

    def __call__(self, graph: Any) -> None:
        """Look at a graph; it stays as it is."""
        for node in graph.nodes:
            name = str(node.target)
            kind = "reduce-scatter" if "reduce_scatter" in name else "all-gather" if "all_gather" in name else None
            if kind is not None:
                (self.fused if name.startswith("symm_mem.fused") else self.left)[kind] += 1

    def uuid(self) -> Any:
        """Return None: graphs from the compiler's cache would not be counted, so none are taken from it."""
        return None

    def report(self) -> str:
        """Say what was fused in the graphs compiled so far."""
        kinds = ("all-gather", "reduce-scatter")
        said = [f"{self.fused[kind]} of {self.fused[kind] + self.left[kind]} {kind}s" for kind in kinds]
        return f"async tensor parallel: {' and '.join(said)} fused with matmuls, in the graphs that equal blocks share"


def enable(group: ProcessGroup, device_type: str) -> Fusions:
    """Let the compiler fuse exchanges of a group from now on, in the whole process.

    Raises `MachineError` where there are no GPUs, whose memory it takes.
    """
    if device_type != "cuda":
        message = f"async tensor parallelism reads other GPUs' memory, and this run is on the {device_type.upper()}"
        raise MachineError(message, tip="leave parallelism.enable_async_tensor_parallel off")
    enable_symm_mem_for_group(group.group_name)
    return fuse_and_count()


def fuse_and_count() -> Fusions:
    """Switch the compiler's pass on, and return what will know what it did."""
    inductor._micro_pipeline_tp = True
    fusions = Fusions()
    inductor.post_grad_custom_post_pass = fusions
    return fusions
