"""float8 quantisation and grouped layers in plain torch: error bounds, layouts, degenerate blocks."""

import pytest
import torch
from titan_kernels.fp8_grouped_gemm import Recipe, fp8_grouped_linear, reference_fp8_grouped_linear
from titan_kernels.grouped_gemm import reference_grouped_linear, reference_input_gradient, reference_weight_gradient
from titan_kernels.quant import (
    dequantize_1x128,
    dequantize_128x1,
    dequantize_128x128,
    quantize_1x128,
    quantize_128x1,
    quantize_128x128,
    quantize_rowwise,
)
from torch import Tensor

from tests.kernels.routing import NAN_ROWS, distance, ends_of, rows_of, weights_of

# Two operands rounded to 4 bits: each relative error is uniform in +-2**-4 at most, 2.6 % in the mean square.
FLOAT8 = 0.045


def within_half_a_step(values: Tensor, x: Tensor, scale: Tensor) -> bool:
    """e4m3 has 3 bits after the leading one, and steps of 2**-9 below 2**-6."""
    return bool(((values - x).abs() <= 1.0001 * torch.maximum(x.abs() * 2**-4, scale * 2**-10)).all())


def wide_range() -> Tensor:
    x = torch.randn(130, 200) * torch.logspace(-6, 4, 130)[:, None]
    x[3], x[:, 128:] = 0, 0
    return x


def test_each_value_is_within_half_a_step() -> None:
    x = wide_range()
    q, scale = quantize_1x128(x)
    assert within_half_a_step(dequantize_1x128(q, scale), x, scale.repeat_interleave(128, 1)[:, :200])
    q, scale = quantize_128x1(x)
    assert within_half_a_step(dequantize_128x1(q, scale)[:130], x, scale.repeat_interleave(128, 0)[:130])
    q, turned, scale = quantize_128x128(x[None])
    spread = scale[0].repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)[:, :200]
    assert within_half_a_step(dequantize_128x128(q, scale)[0], x, spread)
    assert torch.equal(turned.float(), q.float().mT)
    q, scale = quantize_rowwise(x)
    assert within_half_a_step(q.float() * scale[:, None], x, scale[:, None])


def test_layouts_are_what_the_copy_engine_reads() -> None:
    q, scale = quantize_1x128(torch.randn(5, 300))
    assert (scale.shape, scale.stride()) == ((5, 3), (1, 8))
    q, scale = quantize_128x1(torch.randn(130, 40))
    assert (q.shape, q.stride(), scale.shape) == ((40, 256), (256, 1), (2, 40))
    assert q[:, 130:].float().count_nonzero() == 0


def test_zeros_and_nan_divide_by_nothing() -> None:
    x = torch.zeros(4, 128)
    x[1, 0] = torch.nan
    for q, scale in (quantize_1x128(x), quantize_rowwise(x), quantize_128x1(x)):
        assert scale.isfinite().all()
        assert (scale > 0).all()
        assert q.float().isnan().sum() == 1
        assert q.float().nan_to_num(0).count_nonzero() == 0


def test_rows_of_nobody_do_not_count() -> None:
    x = torch.randn(6, 8)
    x[4:] = torch.nan
    q, scale = quantize_128x1(x, torch.tensor([1, 4], dtype=torch.int32))
    assert within_half_a_step(dequantize_128x1(q, scale)[:4], x[:4], scale[0].expand(4, -1))
    assert q[:, 4:128].float().count_nonzero() == 0


def test_experts_have_their_rows_of_the_blocks_that_they_share() -> None:
    x = torch.randn(300, 8)
    q, scale = quantize_128x1(x, torch.tensor([130, 290], dtype=torch.int32))
    assert (q.shape, scale.shape) == ((8, 7 * 128), (7, 8))
    values = dequantize_128x1(q, scale).view(7, 128, 8)
    assert values[:3].flatten(0, 1)[290:].count_nonzero() == 0
    for block, rows in ((4, slice(128, 130)), (5, slice(130, 256)), (6, slice(256, 290))):
        expected = torch.zeros(128, 8)
        expected[rows.start % 128 : (rows.stop - 1) % 128 + 1] = values[:3].flatten(0, 1)[rows]
        torch.testing.assert_close(values[block], expected, rtol=0, atol=0)


@pytest.mark.parametrize("recipe", ["blockwise", "rowwise"])
@pytest.mark.parametrize("sizes", [[0, 1, 127, 128, 129], [0, 30, 128, 0, 70, 1]], ids=str)
def test_a_float8_layer_is_as_near_as_float8_is(sizes: list[int], recipe: Recipe) -> None:
    ends = ends_of(sizes)
    x, weight = rows_of(sizes, 136, torch.bfloat16), weights_of(len(sizes), 144, 136, dtype=torch.bfloat16)
    grad = rows_of(sizes, 144, torch.bfloat16)
    x.requires_grad_()
    weight.requires_grad_()
    y = fp8_grouped_linear(x, weight, ends, recipe)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    wide_x, wide_weight, wide_grad = (tensor.detach().double() for tensor in (x, weight, grad))
    assert distance(y, reference_grouped_linear(wide_x, wide_weight, ends)) < FLOAT8
    assert distance(y, reference_fp8_grouped_linear(x.detach(), weight.detach(), ends, recipe)) < 1e-3
    assert distance(grad_x, reference_input_gradient(wide_grad, wide_weight, ends)) < FLOAT8
    assert distance(grad_weight, reference_weight_gradient(wide_grad, wide_x, ends)) < FLOAT8
    assert y[-NAN_ROWS:].count_nonzero() == 0
    assert grad_x[-NAN_ROWS:].count_nonzero() == 0


def test_operators_keep_the_rules_of_torch() -> None:
    x, weight = torch.randn(6, 24, requires_grad=True), torch.randn(2, 8, 24, requires_grad=True)
    ends = torch.tensor([2, 5], dtype=torch.int32)
    for recipe in ("blockwise", "rowwise"):
        op = getattr(torch.ops.titan_kernels, f"fp8_{recipe}_linear")
        torch.library.opcheck(op, (x, weight, ends, True), test_utils=("test_schema", "test_faketensor"))


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(ValueError, match="blockwise and rowwise; got 'tensorwise'"):
        fp8_grouped_linear(torch.ones(1, 8), torch.ones(1, 8, 8), torch.ones(1).int(), "tensorwise")  # pyright: ignore
