"""What the compiler fuses of tensor parallelism; its fallbacks of the fused operations stand in for GPUs' memory."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests.parity import layouts
from tests.parity.test_layouts import alone, settings_of
from tests.ranks import run_ranks
from tests.runs import tiny
from titan_core.config.checks import check
from titan_core.config.load import Resolved
from titan_core.parallel import async_tensor
from titan_core.runtime.errors import MachineError


def fused(resolved: Resolved) -> tuple[layouts.Seen, dict[str, int], dict[str, int], str]:
    import torch
    import torch.distributed._symmetric_memory as memory

    library = torch.library.Library("symm_mem", "IMPL", "CPU")
    library.impl("fused_all_gather_matmul", memory._fused_all_gather_matmul_fallback)
    library.impl("fused_matmul_reduce_scatter", memory._fused_matmul_reduce_scatter_fallback)
    fusions = async_tensor.fuse_and_count()
    with memory._test_mode():
        seen = layouts._run(resolved)
    return seen, dict(fusions.fused), dict(fusions.left), fusions.report()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_every_gather_and_every_forward_scatter_is_fused_and_nothing_changes(tmp_path) -> None:
    resolved = tiny(tmp_path, **settings_of({"tp": 2}, {"compile__enable": True}))
    for seen, together, left, report in run_ranks(fused, 2, resolved, timeout=280):
        layouts.assert_same(seen, alone("gqa"))
        # two regions of a block, which is compiled once for all 4, gather and scatter, forward and backward; the
        # gradient of a region's input is a sum over its projections, which no matmul ends in
        assert together == {"all-gather": 4, "reduce-scatter": 2}
        assert left == {"reduce-scatter": 2}
        assert "4 of 4 all-gathers and 2 of 4 reduce-scatters" in report


def without_gpus(resolved: Resolved) -> Any:
    with pytest.raises(MachineError, match="other GPUs' memory") as caught:
        layouts._run(resolved)
    return caught.value.exit_code


def test_it_is_refused_where_there_are_no_gpus(tmp_path) -> None:
    asked = {"parallelism__enable_async_tensor_parallel": True, "compile__enable": True}
    assert run_ranks(without_gpus, 2, tiny(tmp_path, **settings_of({"tp": 2}, asked))) == [3, 3]


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, "parallelism.tensor_parallel_degree above 1"),
        ({"parallelism__tensor_parallel_degree": 2}, "compile.enable"),
        ({"parallelism__tensor_parallel_degree": 2, "parallelism__enable_sequence_parallel": False}, "sequence"),
    ],
)
def test_it_says_what_it_needs(changes: dict[str, Any], missing: str, tmp_path) -> None:
    (problem,) = check(tiny(tmp_path, parallelism__enable_async_tensor_parallel=True, **changes))
    assert missing in problem.message
