"""One engine that lays any family's model over a mesh: no model is named here.

Order: activation checkpointing, then compilation of each block, then sharding; so that recomputation is compiled, and
FSDP's gathers stay outside of what is compiled.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from titan_core.config.schema import Compile, Config
from titan_core.nn.layers import set_compute_dtype
from titan_core.parallel import activation_checkpoint, data_parallel
from titan_core.parallel.data_parallel import DTYPES, DataParallel
from titan_core.parallel.mesh import Mesh


def parallelize(task: nn.Module, blocks: Sequence[str], mesh: Mesh, config: Config) -> tuple[DataParallel, list[str]]:
    """Lay out a task on the meta device. `blocks` are globs of module names, under `task.model`.

    Returns the laid-out task and one line for each thing that was done.
    """
    model: nn.Module = task.get_submodule("model")
    units = find(model, blocks)
    said = [f"recompute {activation_checkpoint.apply(units, config.activation_checkpoint)}"]
    if config.compile.enable and "model" in config.compile.components:
        _compile(units, config.compile)
        said.append(f"compile {len(units)} blocks ({config.compile.backend})")
    set_compute_dtype(model, DTYPES[config.training.mixed_precision_param])
    return data_parallel.apply(task, units, mesh, config), said


def find(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """Return the modules whose names match a glob, `*` standing for one name, in order."""
    return [
        module
        for name, module in model.named_modules()
        if any(name.count(".") == pattern.count(".") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _compile(units: Sequence[nn.Module], config: Compile) -> None:
    """Compile each block: equal blocks share their compiled code, so the cost does not grow with depth."""
    for unit in units:
        unit.forward = torch.compile(unit.forward, backend=config.backend, fullgraph=True)
