"""The fused kernels compile for GPUs that are not here, without spills, and within the registers of their occupancy."""

import pytest
import torch
from titan_kernels import linear_cross_entropy_kernels, rms_norm_kernels, rotary_kernels, swiglu_kernels
from titan_kernels.inspection import REGISTERS_PER_MULTIPROCESSOR, compiling, resources

META = {"dtype": torch.bfloat16, "device": "meta"}


def launch_all(width: int) -> None:
    x, weight = torch.empty(4096, width, **META), torch.empty(width, **META)
    inverse = torch.empty(4096, device="meta")
    rms_norm_kernels.forward(x, weight, 1e-6)
    rms_norm_kernels.backward(x, x, weight, inverse)
    table = torch.empty(1, 2048, 64, device="meta")
    rotary_kernels.rotate(torch.empty(2, 2048, 32, 128, **META), table, table, False)
    swiglu_kernels.forward(x, x)
    swiglu_kernels.backward(x, x, x)
    logits, labels = torch.empty(256, 128256, **META), torch.empty(256, dtype=torch.int64, device="meta")
    linear_cross_entropy_kernels.cross_entropy_(logits, labels, torch.empty((), device="meta"), True)
    linear_cross_entropy_kernels.scale_(weight, torch.empty((), device="meta"))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile(arch: int) -> None:
    with compiling(arch) as compiled:
        launch_all(4096)
    assert len(compiled) == 7
    for kernel in compiled:
        taken = resources(kernel)
        assert taken.spills == 0, kernel.name
        resident = REGISTERS_PER_MULTIPROCESSOR // (taken.registers * 32 * taken.num_warps)
        assert resident * taken.num_warps >= 16, (kernel.name, taken)  # a quarter of the warps: loads to hide latency


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_wide_norm_compiles_without_spills(arch: int) -> None:
    x, weight = torch.empty(64, 16384, **META), torch.empty(16384, **META)
    with compiling(arch) as compiled:
        rms_norm_kernels.forward(x, weight, 1e-6)
    assert [resources(kernel).spills for kernel in compiled] == [0]
