"""Grouped layers on the CPU: values against a loop, gradients by finite differences, the rules of operators."""

import pytest
import torch
from titan_kernels.contiguous import contiguous_grouped_linear
from titan_kernels.expert_mlp import expert_mlp, reference_routed_mlp, routed_mlp
from titan_kernels.grouped_gemm import grouped_linear
from titan_kernels.permutation import permute, place, unpermute
from torch import Tensor

from tests.kernels.routing import NAN_ROWS, RAGGED, TOLERANCE, distance, ends_of, rows_of, weights_of

NAMES = torch.ops.titan_kernels


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("sizes", RAGGED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_group_meets_its_weight(sizes: list[int], dtype: torch.dtype) -> None:
    x, weight = rows_of(sizes, 24, dtype), weights_of(len(sizes), 10, 24, dtype=dtype)
    x.requires_grad_()
    weight.requires_grad_()
    y = grouped_linear(x, weight, ends_of(sizes))
    grad = rows_of(sizes, 10, dtype)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        start += size
        a, w, g = x[rows].double(), weight[expert].double(), grad[rows].double()
        if size == 0:
            assert grad_weight[expert].count_nonzero() == 0
            continue
        assert distance(y[rows], a @ w.T) < TOLERANCE[dtype]
        assert distance(grad_x[rows], g @ w) < TOLERANCE[dtype]
        assert distance(grad_weight[expert], g.T @ a) < TOLERANCE[dtype]
    for nobodys in (y[start:], grad_x[start:]):
        assert nobodys.shape[0] == NAN_ROWS
        assert nobodys.count_nonzero() == 0


def test_gradients_by_finite_differences() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    x, w1, w3, w2 = double(6, 4), double(3, 5, 4), double(3, 5, 4), double(3, 4, 5)
    assert torch.autograd.gradcheck(lambda *given: grouped_linear(*given, ends), (x, w1))
    assert torch.autograd.gradcheck(lambda *given: expert_mlp(*given, ends), (x, w1, w3, w2))
    blocks = torch.tensor([2, -1, 0, 2], dtype=torch.int32)
    x = double(64, 3)
    assert torch.autograd.gradcheck(
        lambda *given: contiguous_grouped_linear(*given, blocks, 16), (x, double(3, 2, 3)), fast_mode=True
    )


def test_the_routed_layer_is_the_sum_of_its_parts() -> None:
    placement = place(torch.tensor([[0, 2], [2, -1], [1, 2]]), 3, 4)
    given = (double(3, 4), torch.rand(3, 2, dtype=torch.float64).requires_grad_(), double(3, 5, 4), double(3, 5, 4))
    given = (*given, double(3, 4, 5))

    def routed(x: Tensor, weights: Tensor, *experts: Tensor) -> Tensor:
        return routed_mlp(x, placement, weights, *experts)

    assert torch.autograd.gradcheck(routed, given)
    x, weights, *experts = given
    rows = expert_mlp(permute(x, placement), *experts, placement.ends_E)
    torch.testing.assert_close(routed(*given), unpermute(rows, placement, weights))
    torch.testing.assert_close(routed(*given), reference_routed_mlp(x, placement, weights, *experts))


def test_operators_keep_the_rules_of_torch() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    x, w1, w2 = torch.randn(6, 4), torch.randn(3, 5, 4), torch.randn(3, 4, 5)
    for tensor in (x, w1, w2):
        tensor.requires_grad_()
    torch.library.opcheck(NAMES.grouped_linear, (x, w1, ends))
    torch.library.opcheck(NAMES.expert_mlp, (x, w1, w1, w2, ends, True))
    blocks = torch.tensor([2, -1], dtype=torch.int32)
    torch.library.opcheck(NAMES.contiguous_linear, (torch.randn(32, 4, requires_grad=True), w1, blocks, 16))
    placement = place(torch.tensor([[0, 2], [2, -1], [1, 2]]), 3)
    tokens, weights = torch.randn(3, 4, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    torch.library.opcheck(NAMES.routed_mlp, (tokens, weights, w1, w1, w2, *placement[1:], True))


def test_a_layer_of_experts_compiles_into_one_graph() -> None:
    def layer(x: Tensor, experts: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        placement = place(experts, 3, 2)
        rows = expert_mlp(permute(x, placement), w1, w1, w2, placement.ends_E)
        return unpermute(rows, placement, weights).square().sum()

    given = (torch.randn(5, 4, requires_grad=True), torch.randint(0, 3, (5, 2)), torch.rand(5, 2))
    given = (*given, torch.randn(3, 6, 4, requires_grad=True), torch.randn(3, 4, 6, requires_grad=True))
    leaves = [tensor for tensor in given if tensor.requires_grad]
    expected = torch.autograd.grad(layer(*given), leaves)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*given), leaves), expected)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x, w, e: grouped_linear(x[:, 1:], w, e), r"\(6, 3\) and \(3, 5, 4\)"),
        (lambda x, w, e: grouped_linear(x.double(), w, e), "float64 and torch.float32"),
        (lambda x, w, e: grouped_linear(x, w, e.long()), "int32 end an expert.*int64"),
        (lambda x, w, e: expert_mlp(x, w, w, w, e), r"w2 \(experts, width, hidden\)"),
        (lambda x, w, e: contiguous_grouped_linear(x, w, e, 16), "6 rows, 3 experts and block_rows=16"),
        (lambda x, w, e: routed_mlp(x[:2], place(e[:, None], 3), x[:3, :1], w, w, w.mT), "3 tokens"),
    ],
)
def test_what_does_not_fit_is_named(call: object, says: str) -> None:
    given = torch.randn(6, 4), torch.randn(3, 5, 4), torch.tensor([2, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=says):
        call(*given)  # pyright: ignore[reportCallIssue]
