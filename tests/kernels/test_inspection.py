"""What `titan_kernels.inspection` reads off a kernel compiled without a GPU."""

import pytest
import torch
import triton
import triton.language as tl
from titan_kernels.inspection import compiling, resources


@triton.jit(do_not_specialize=["num_rows"])
def product(x_ptr, y_ptr, out_ptr, num_rows, size: tl.constexpr):
    row, column = tl.arange(0, size)[:, None], tl.arange(0, size)[None, :]
    x = tl.load(x_ptr + row * size + column, mask=row < num_rows)
    y = tl.load(y_ptr + row * size + column)
    tl.store(out_ptr + row * size + column, tl.dot(x, y).to(out_ptr.dtype.element_ty), mask=row < num_rows)


@pytest.mark.parametrize(("arch", "unit"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_a_product_runs_on_the_matrix_units_of_each_architecture(arch: int, unit: str) -> None:
    x = torch.empty(128, 128, dtype=torch.bfloat16, device="meta")
    with compiling(arch) as compiled:
        for num_rows in (7, 16, 128):
            product[(1,)](x, x, x, num_rows, 128)
    assert [kernel.name for kernel in compiled] == ["product"] * 3
    assert len({id(kernel.kernel) for kernel in compiled}) == 1
    taken = resources(compiled[0])
    assert taken.instructions[unit] > 0
    assert 0 < taken.registers <= 255
    assert taken.num_warps == 4
    assert taken.spills == 0
    assert taken.stack_bytes == 0
    assert taken.shared_bytes >= 2 * 128 * 128
