"""What the repaired interpreter (and a GPU) computes is what torch computes."""

import pytest
import torch
import triton
import triton.language as tl
from titan_kernels.launch import interpreting


@triton.jit
def arithmetic(x_ptr, y_ptr, product_ptr, rounded_ptr, sums_ptr, size: tl.constexpr):
    row = tl.arange(0, size)
    at = row[:, None] * size + row[None, :]
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    tl.store(product_ptr + at, tl.dot(x, y, input_precision="ieee").to(product_ptr.dtype.element_ty))
    tl.store(rounded_ptr + at, tl.where(x > y, x * y + x, -y).to(tl.float32).to(rounded_ptr.dtype.element_ty))
    tl.store(sums_ptr + row, tl.sum(x.to(tl.float32), 1).to(sums_ptr.dtype.element_ty))


@pytest.mark.parametrize("rounded_to", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_bfloat16_arithmetic_is_torchs(device: torch.device, rounded_to: torch.dtype) -> None:
    x, y = (torch.randn(32, 32, device=device).bfloat16() for _ in range(2))
    product, sums = torch.empty_like(x), x.new_empty(32)
    rounded = torch.empty(32, 32, dtype=rounded_to, device=device)
    arithmetic[(1,)](x, y, product, rounded, sums, 32)
    torch.testing.assert_close(product.float(), x.float() @ y.float(), rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(sums.float(), x.float().sum(1), rtol=2**-8, atol=1e-5)
    expected = torch.where(x > y, x * y + x, -y)
    close = {torch.bfloat16: 2**-7, torch.float8_e4m3fn: 2**-3, torch.float8_e5m2: 2**-2}[rounded_to]  # fused or not
    atol = 2**-9 if interpreting() else 2**-5  # a GPU rounds x * y + x once
    torch.testing.assert_close(rounded.float(), expected.to(rounded_to).float(), rtol=close, atol=atol)
