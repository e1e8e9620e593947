"""The kernels of grouped layers against double precision, on ragged groups and rows that hold NaN."""

from dataclasses import replace

import pytest
import torch
from titan_kernels import grouped_gemm_kernels as kernels
from titan_kernels.contiguous import contiguous_grouped_linear, reference_contiguous_grouped_linear
from titan_kernels.expert_mlp import expert_mlp, reference_expert_mlp, reference_routed_mlp, routed_mlp
from titan_kernels.gemm_configs import config_for
from titan_kernels.grouped_gemm import (
    grouped_linear,
    reference_grouped_linear,
    reference_input_gradient,
    reference_weight_gradient,
)
from titan_kernels.permutation import place

from tests.kernels.routing import NAN_ROWS, RAGGED, TOLERANCE, distance, ends_of, rows_of, weights_of


@pytest.mark.parametrize("sizes", RAGGED, ids=str)
@pytest.mark.parametrize(
    ("dtype", "width", "out"), [(torch.bfloat16, 72, 40), (torch.bfloat16, 35, 130), (torch.float32, 40, 24)]
)
def test_a_grouped_layer_is_exact(
    device: torch.device, sizes: list[int], dtype: torch.dtype, width: int, out: int
) -> None:
    if len(sizes) == 64 and width != 72:
        pytest.skip("many groups take long in the interpreter; one shape of them is enough")
    ends = ends_of(sizes, device)
    x, weight = rows_of(sizes, width, dtype, device), weights_of(len(sizes), out, width, dtype=dtype, device=device)
    grad = rows_of(sizes, out, dtype, device)
    y = grouped_linear(x.requires_grad_(), weight.requires_grad_(), ends)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    x, weight, grad = x.detach().double(), weight.detach().double(), grad.double()
    assert distance(y, reference_grouped_linear(x, weight, ends)) < TOLERANCE[dtype]
    assert distance(grad_x, reference_input_gradient(grad, weight, ends)) < TOLERANCE[dtype]
    assert distance(grad_weight, reference_weight_gradient(grad, x, ends)) < TOLERANCE[dtype]
    for nobodys in (y[-NAN_ROWS:], grad_x[-NAN_ROWS:], grad_weight[[size == 0 for size in sizes]]):
        assert nobodys.count_nonzero() == 0


@pytest.mark.parametrize("tensor_map", [False, True])
def test_pointers_and_the_copy_engine_agree(device: torch.device, tensor_map: bool) -> None:
    sizes, dtype = [70, 0, 130], torch.float16
    ends = ends_of(sizes, device)
    x, weight = rows_of(sizes, 96, dtype, device), weights_of(3, 72, 96, dtype=dtype, device=device)
    grad = rows_of(sizes, 72, dtype, device)
    config = replace(config_for("product", x, 72), tensor_map=tensor_map, group_m=2, block_m=64)
    y = kernels.forward(x, weight, ends, config)
    assert distance(y, reference_grouped_linear(x.double(), weight.double(), ends)) < TOLERANCE[dtype]
    grad_x = kernels.input_gradient(grad, weight, ends, config)
    assert distance(grad_x, reference_input_gradient(grad.double(), weight.double(), ends)) < TOLERANCE[dtype]
    gradient = kernels.weight_gradient(grad, x, ends, config)
    assert distance(gradient, reference_weight_gradient(grad.double(), x.double(), ends)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("experts", "block_rows"), [([0, 3, 1, 0, -1, 3], 128), ([2, 2, 7, 0], 48), ([1], 256)], ids=str
)
def test_a_layer_over_blocks_is_exact(device: torch.device, experts: list[int], block_rows: int) -> None:
    blocks = torch.tensor(experts, dtype=torch.int32, device=device)
    x = torch.randn(len(experts) * block_rows, 40, device=device).bfloat16()
    x.view(len(experts), block_rows, -1)[[not 0 <= expert < 4 for expert in experts]] = torch.nan
    weight = weights_of(4, 72, 40, dtype=torch.bfloat16, device=device)
    grad = torch.randn(x.shape[0], 72, device=device).bfloat16()
    y = contiguous_grouped_linear(x.requires_grad_(), weight.requires_grad_(), blocks, block_rows)
    grads = torch.autograd.grad(y, (x, weight), grad)
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = reference_contiguous_grouped_linear(*wide, blocks, block_rows)
    assert distance(y, expected) < TOLERANCE[torch.bfloat16]
    for actual, wanted in zip(grads, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert distance(actual, wanted) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feed_forward_layer_of_experts_is_exact(device: torch.device, dtype: torch.dtype) -> None:
    sizes, width, hidden = [0, 1, 130, 60], 40, 72
    ends = ends_of(sizes, device)
    given = [rows_of(sizes, width, dtype, device)]
    given += [
        weights_of(4, *shape, dtype=dtype, device=device)
        for shape in ((hidden, width), (hidden, width), (width, hidden))
    ]
    grad = rows_of(sizes, width, dtype, device)
    check_layer(lambda *given: expert_mlp(*given, ends), given, grad, ends)


def check_layer(layer, given: list[torch.Tensor], grad: torch.Tensor, ends: torch.Tensor) -> None:
    y = layer(*(tensor.requires_grad_() for tensor in given))
    grads = torch.autograd.grad(y, given, grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = reference_expert_mlp(*wide, ends)
    tolerance = 2 * TOLERANCE[given[0].dtype]  # gate, up and hidden are rounded on the way
    assert distance(y, expected) < tolerance
    for actual, wanted in zip(grads, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert distance(actual, wanted) < tolerance
    assert y[-NAN_ROWS:].count_nonzero() == 0
    assert grads[0][-NAN_ROWS:].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("align", [1, 16])
def test_the_routed_layer_gathers_and_weighs(device: torch.device, dtype: torch.dtype, align: int) -> None:
    placement = place(torch.randint(-1, 5, (50, 3), device=device), 5, align)
    x, weights = torch.randn(50, 40, device=device).to(dtype), torch.rand(50, 3, device=device)
    given = [
        x,
        weights,
        *(weights_of(5, *shape, dtype=dtype, device=device) for shape in ((72, 40), (72, 40), (40, 72))),
    ]
    y = routed_mlp(given[0].requires_grad_(), placement, *(tensor.requires_grad_() for tensor in given[1:]))
    grad = torch.randn(50, 40, device=device).to(dtype)
    grads = torch.autograd.grad(y, given, grad)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = reference_routed_mlp(wide[0], placement, *wide[1:])
    assert distance(y, expected) < 2 * TOLERANCE[dtype]
    for actual, wanted in zip(grads, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert distance(actual, wanted) < 2 * TOLERANCE[dtype]
