"""The kernels of float8: quantisation to the byte, products against what the same bytes give in plain torch."""

import pytest
import torch
from titan_kernels import quant
from titan_kernels.fp8_grouped_gemm import (
    Recipe,
    blockwise_weight_gradient,
    fp8_grouped_linear,
    reference_fp8_grouped_linear,
)
from titan_kernels.grouped_gemm import reference_input_gradient, reference_weight_gradient
from torch import Tensor

from tests.kernels.routing import EXACT, NAN_ROWS, distance, ends_of, rows_of, weights_of

FLOAT8 = 0.045  # see tests/kernels/test_quant.py


@pytest.fixture(autouse=True)
def _float8_units(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8 units")


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == quant.E4M3 else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantisation_gives_the_references_bytes(device: torch.device, dtype: torch.dtype) -> None:
    x = (torch.randn(40, 200, device=device) * torch.logspace(-6, 4, 40, device=device)[:, None]).to(dtype)
    x[5], x[:, 130:] = 0, 0
    pairs = [
        (quant.quantize_1x128(x), quant.reference_quantize_1x128(x)),
        (quant.quantize_128x1(x), quant.reference_quantize_128x1(x)),
        (quant.quantize_128x128(x[None]), quant.reference_quantize_128x128(x[None])),
        (quant.quantize_rowwise(x), quant.reference_quantize_rowwise(x)),
    ]
    for actual, expected in pairs:
        for one, other in zip(actual, expected, strict=True):
            assert one.stride() == other.stride()
            torch.testing.assert_close(bytes_of(one), bytes_of(other), **EXACT)


def test_blocks_for_a_weight_gradient_are_the_references(device: torch.device) -> None:
    sizes = [0, 30, 226, 0, 70, 1, 1]
    x, ends = rows_of(sizes, 72, torch.bfloat16, device), ends_of(sizes, device)
    x[3, 5] = torch.nan
    (q, scale), (expected, expected_scale) = quant.quantize_128x1(x, ends), quant.reference_quantize_128x1(x, ends)
    written = [0, 1, 2, 3 + 3, 3 + 4, 3 + 9, 3 + 10, 3 + 12]  # of rows; then, two an expert, those that are shared
    assert q.shape == expected.shape == (72, (3 + 14) * 128)
    blocks, expected_blocks = (bytes_of(tensor).view(72, -1, 128)[:, written] for tensor in (q, expected))
    torch.testing.assert_close(blocks, expected_blocks, **EXACT)
    torch.testing.assert_close(scale[written], expected_scale[written], **EXACT)


@pytest.mark.parametrize("recipe", ["blockwise", "rowwise"])
@pytest.mark.parametrize(
    ("sizes", "width", "out"), [([0, 30, 130, 1], 32, 48), ([128, 0, 128], 160, 144), ([3, 0, 130], 35, 130)], ids=str
)
def test_a_float8_layer_multiplies_the_same_bytes(
    device: torch.device, sizes: list[int], width: int, out: int, recipe: Recipe
) -> None:
    if recipe == "rowwise" and width > 32:
        pytest.skip("a program a row takes long in the interpreter; one shape is enough")
    ends, dtype = ends_of(sizes, device), torch.bfloat16
    x, weight = rows_of(sizes, width, dtype, device), weights_of(len(sizes), out, width, dtype=dtype, device=device)
    weight[0] = 0
    grad = rows_of(sizes, out, dtype, device)
    y = fp8_grouped_linear(x.requires_grad_(), weight.requires_grad_(), ends, recipe)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    x, weight = x.detach(), weight.detach()
    assert distance(y, reference_fp8_grouped_linear(x, weight, ends, recipe)) < 2e-3  # where bfloat16 rounds otherwise
    assert distance(grad_x, reference_input_gradient(grad.double(), weight.double(), ends)) < FLOAT8
    assert distance(grad_weight, reference_weight_gradient(grad.double(), x.double(), ends)) < FLOAT8
    assert y[-NAN_ROWS:].count_nonzero() == 0
    assert grad_x[-NAN_ROWS:].count_nonzero() == 0


def test_blocks_that_experts_share_are_split(device: torch.device) -> None:
    sizes = [0, 30, 128, 0, 70, 1, 1]
    ends = ends_of(sizes, device)
    grad, x = (rows_of(sizes, width, torch.bfloat16, device) for width in (144, 48))
    operands = (*quant.quantize_128x1(grad, ends), *quant.quantize_128x1(x, ends))
    gradient = blockwise_weight_gradient(*operands, ends, torch.float32)
    values = [quant.dequantize_128x1(*operands[at : at + 2]) for at in (0, 2)]
    bits_of_sums = 24 if device.type == "cpu" else 14  # Hopper's float8 units keep about 14
    assert distance(gradient, reference_weight_gradient(*values, ends)) < 16 * 2**-bits_of_sums
