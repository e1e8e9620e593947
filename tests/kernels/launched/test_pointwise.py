"""RMSNorm and rotary embedding: the kernels, forward and backward, against fp64 references."""

import pytest
import torch
from titan_kernels.rms_norm import reference_rms_norm, rms_norm
from titan_kernels.rotary import reference_rotate_pairs, rotate_pairs
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]


def check(function, reference, tensors: list[Tensor], fixed: list, dtype: torch.dtype) -> None:
    """Compare result and gradients with those of the reference on the same numbers in fp64."""
    given = [x.to(dtype).requires_grad_() for x in tensors]
    exact = [x.detach().double().requires_grad_() for x in given]
    out, truth = function(*given, *fixed), reference(*exact, *[_wide(x) for x in fixed])
    assert out.dtype == dtype
    close = {"rtol": 2**-7, "atol": 2**-8} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.double(), truth, **close)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, given, grad)
    expected = torch.autograd.grad(truth, exact, grad.double())
    for x, y in zip(found, expected, strict=True):
        scale = y.abs().max().item()
        torch.testing.assert_close(x.double() / scale, y / scale, **close)


def _wide(x):
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 96), (2, 5, 257), (3, 5000)], ids=str)
def test_rms_norm(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape, device=device), torch.randn(shape[-1], device=device)]
    check(rms_norm, reference_rms_norm, tensors, [1e-6], dtype)


def test_rms_norm_of_nothing_and_of_zeros(device: torch.device) -> None:
    weight = torch.ones(8, device=device, requires_grad=True)
    x = torch.zeros(0, 8, device=device, requires_grad=True)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert torch.equal(rms_norm(torch.zeros(3, 8, device=device), weight, 1e-6), torch.zeros(3, 8, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(5, 24), (2, 64)])
@pytest.mark.parametrize("per_row", [False, True])
def test_rotary(device: torch.device, heads: int, width: int, per_row: bool, dtype: torch.dtype) -> None:
    angles = torch.randn(*((2,) if per_row else ()), 7, width // 2, device=device) * 10
    x = torch.randn(2, 7, heads, width, device=device)
    check(rotate_pairs, reference_rotate_pairs, [x], [angles.cos(), angles.sin()], dtype)


def test_rotary_reads_a_part_of_a_fused_product(device: torch.device) -> None:
    fused = torch.randn(2, 6, 12 * 32, device=device)
    q, _, _ = fused.split([8 * 32, 2 * 32, 2 * 32], -1)
    angles = torch.randn(6, 16, device=device)
    q = q.unflatten(-1, (8, 32))
    assert not q.is_contiguous()
    found, truth = (f(q, angles.cos(), angles.sin()) for f in (rotate_pairs, reference_rotate_pairs))
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)
