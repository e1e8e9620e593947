"""Every kernel compiles for every architecture, fits, and is compiled once for all numbers of tokens."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from titan_kernels.inspection import REGISTER_LIMIT, REGISTERS_PER_MULTIPROCESSOR, SHARED_LIMIT, compiling
from titan_kernels.resources import ARCHITECTURES, CASES, taken

SPILLS = 24  # instructions; what a few addresses take around a loop, nothing like a tile that does not fit
PRODUCTS = (
    "_product",
    "_weight_gradient",
    "_gated_product",
    "_blockwise_product",
    "_rowwise_product",
)
UNITS = {
    (80, "bf16"): ("HMMA", "LDGSTS"),
    (90, "bf16"): ("HGMMA", "UTMALDG"),
    (100, "bf16"): ("UTCHMMA", "UTMALDG"),
    (90, "fp8"): ("QGMMA", "UTMALDG"),
    (100, "fp8"): ("UTCQMMA", "UTMALDG"),
}
# what the copy engine writes, as the matrix units computed it
STORED = {
    "expert_mlp bf16": ("_product", "_weight_gradient"),
    "fp8_grouped_gemm": ("_product", "_rowwise_product", "_weight_gradient"),
}
# Two architectures of the three are compiled in the slow tests only: all take 90 s of a core.
COMPILED = [
    pytest.param(name, launches, arch, id=f"{name} sm_{arch}", marks=[pytest.mark.slow] if arch != 90 else [])
    for name, launches, first in CASES
    for arch in ARCHITECTURES
    if arch >= first
]


@pytest.mark.parametrize(("name", "launches", "arch"), COMPILED)
def test_a_kernel_fits_and_uses_the_matrix_units(name: str, launches: Callable[[], None], arch: int) -> None:
    kernels = taken(launches, arch)
    assert kernels
    for kernel, took in kernels:
        assert took.registers <= REGISTER_LIMIT, kernel
        assert took.registers * took.num_warps * 32 <= REGISTERS_PER_MULTIPROCESSOR, kernel
        assert took.shared_bytes <= SHARED_LIMIT[arch], kernel
        assert took.spills <= SPILLS, kernel
        for unit in UNITS.get((arch, "fp8" if name.startswith("fp8") else name.split()[-1]), ()):
            assert kernel not in PRODUCTS or took.instructions[unit] > 0, (kernel, unit)
        if arch == 90 and kernel in STORED.get(name, ()):
            assert took.instructions["UTMASTG"] > 0, kernel


@pytest.mark.parametrize(("name", "launches"), [case[:2] for case in CASES if "fp32" not in case[0]])
def test_nothing_is_compiled_anew_for_another_number_of_tokens(name: str, launches: Callable[..., None]) -> None:
    kernels = []
    for count in (4096, 4097, 33):
        with compiling(90) as compiled:
            launches(count)
        kernels.append([id(kernel.kernel) for kernel in compiled])
    assert kernels[0] == kernels[1] == kernels[2]


def test_importing_titan_kernels_loads_no_triton() -> None:
    modules = "contiguous, expert_mlp, fp8_grouped_gemm, grouped_gemm, inspection, permutation, quant, resources"
    modules += ", all_to_all, linear_cross_entropy, rms_norm, rotary, top_k"
    code = f"import sys\nfrom titan_kernels import {modules}\nassert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
