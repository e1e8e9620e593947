"""The kernels of placement and permutation against plain torch."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from titan_kernels.expert_mlp import expert_mlp, routed_mlp
from titan_kernels.fp8_grouped_gemm import fp8_grouped_linear
from titan_kernels.permutation import (
    Placement,
    permute,
    place,
    reference_permute,
    reference_place,
    reference_unpermute,
    unpermute,
)
from titan_kernels.top_k import top_k

from tests.kernels.routing import EXACT, TOLERANCE, distance
from tests.kernels.test_permutation import check, routings


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "align"),
    [(0, 2, 4, 8), (1, 1, 1, 1), (300, 4, 9, 1), (1100, 2, 64, 16), (40, 8, 200, 128)],
)
def test_placement_is_the_references(
    device: torch.device, num_tokens: int, top_k: int, num_experts: int, align: int
) -> None:
    experts = torch.randint(-1, num_experts + 1, (num_tokens, top_k), device=device)
    placement = place(experts, num_experts, align)
    for actual, expected in zip(placement, reference_place(experts, num_experts, align), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)
    check(placement, experts, num_experts, align)


@given(routings())
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_assignment_has_one_row_in_its_experts_region(
    device: torch.device, routing: tuple[torch.Tensor, int, int]
) -> None:
    experts, *sizes = routing
    check(place(experts.to(device), *sizes), experts, *sizes)


def test_nothing_waits_for_the_device(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("only a GPU can be waited for")
    scores = torch.randn(30, 5, device=device)
    x = torch.randn(30, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(30, 3, device=device, requires_grad=True)
    gate = torch.randn(5, 32, 64, device=device, dtype=x.dtype, requires_grad=True)
    down = torch.randn(5, 64, 32, device=device, dtype=x.dtype, requires_grad=True)

    def layer() -> None:
        placement = place(top_k(scores, 3), 5, 16)
        rows = expert_mlp(permute(x, placement), gate, gate, down, placement.ends_E)
        (unpermute(rows, placement, weights) + routed_mlp(x, placement, weights, gate, gate, down)).sum().backward()
        fp8_grouped_linear(rows.detach(), gate, placement.ends_E)

    layer()  # loading the kernels does wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_go_and_come_back(device: torch.device, dtype: torch.dtype, weighted: bool) -> None:
    placement = place(torch.randint(-1, 6, (30, 3), device=device), 5, 4)
    x = torch.randn(30, 1030, device=device).to(dtype).requires_grad_()
    weights = torch.rand(30, 3, device=device, requires_grad=True) if weighted else None
    rows = permute(x, placement)
    torch.testing.assert_close(rows, reference_permute(x, placement), **EXACT)
    values = rows.detach().mul(2).requires_grad_()
    y = unpermute(values, placement, weights)
    wide = values.detach().double().requires_grad_()
    wide_weights = weights.detach().double().requires_grad_() if weights is not None else None
    expected = reference_unpermute(wide, placement, wide_weights)
    assert distance(y, expected) < TOLERANCE[dtype]
    grad = torch.randn_like(y)
    leaves = [leaf for leaf in (values, weights) if leaf is not None]
    wide_leaves = [leaf for leaf in (wide, wide_weights) if leaf is not None]
    expected_grads = torch.autograd.grad(expected, wide_leaves, grad.double())
    for actual, wanted in zip(torch.autograd.grad(y, leaves, grad), expected_grads, strict=True):
        assert distance(actual, wanted) < TOLERANCE[dtype]
    padding = (placement.source_R < 0).nonzero().flatten()
    assert torch.autograd.grad(unpermute(values, placement, weights), values, grad)[0][padding].count_nonzero() == 0
    (grad_x,) = torch.autograd.grad(rows, x, values.detach())
    torch.testing.assert_close(grad_x, reference_unpermute(values.detach(), placement))


@pytest.fixture
def poisoned():
    """Memory that nobody wrote holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "width", "room"),
    [(0, 2, 5, 99), (9, 1, 1, 99), (21, 8, 33, 150), (7, 10, 1040, 99), (11, 5, 20, 40)],  # the last loses rows
)
def test_every_row_is_written_and_nobodys_counts(
    device: torch.device, poisoned: None, num_tokens: int, top_k: int, width: int, room: int
) -> None:
    experts = torch.randint(-1, 12, (num_tokens, top_k), device=device)
    experts[::4] = -1  # tokens with no row at all
    counts, ends, row, source = place(experts, 11, 4)
    placement = Placement(counts, ends, row.where(row < room, -1), source[:room])
    x = torch.randn(num_tokens, width, device=device, requires_grad=True)
    rows = permute(x, placement)
    assert rows.shape[0] == min(room, source.shape[0])
    torch.testing.assert_close(rows, reference_permute(x, placement), **EXACT)
    values = torch.randn_like(rows)
    values[placement.source_R < 0] = torch.nan  # of nobody
    weights = torch.rand(num_tokens, top_k, device=device)
    weights[placement.row_TK < 0] = torch.nan
    for scale in (None, weights):
        leaves = [values.clone().requires_grad_(), *([] if scale is None else [scale.clone().requires_grad_()])]
        found, expected = (f(leaves[0], placement, *leaves[1:]) for f in (unpermute, reference_unpermute))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(found)
        of_rows, *of_weights = torch.autograd.grad(found, leaves, grad)
        products = reference_permute(grad, placement)
        if scale is not None and num_tokens:
            products = products * scale.flatten()[placement.source_R.clamp_min(0).long()][:, None]
            dots = (grad[:, None] * values[placement.row_TK.clamp_min(0).long()]).sum(-1)
            torch.testing.assert_close(of_weights[0], dots.where(placement.row_TK >= 0, 0), rtol=1e-5, atol=1e-4)
        products = products.masked_fill((placement.source_R < 0)[:, None], 0)
        torch.testing.assert_close(of_rows, products, rtol=1e-6, atol=1e-6)
    (grad_x,) = torch.autograd.grad(rows, x, values)
    torch.testing.assert_close(grad_x, reference_unpermute(values, placement), rtol=1e-5, atol=1e-5)


def test_a_row_that_does_not_exist_is_neither_read_nor_written(device: torch.device) -> None:
    placement = place(torch.randint(3, (6, 2), device=device), 3)
    lost = placement.row_TK.clone()
    lost[1, 0], lost[4, 1] = 1 << 30, -7
    x, rows = torch.randn(6, 40, device=device), torch.randn(12, 40, device=device)
    kept = placement._replace(row_TK=lost.where((lost >= 0) & (lost < 12), -1))
    lying = placement._replace(row_TK=lost)
    written = kept.row_TK[kept.row_TK >= 0].long()
    torch.testing.assert_close(permute(x, lying)[written], reference_permute(x, placement)[written], **EXACT)
    torch.testing.assert_close(unpermute(rows, lying), reference_unpermute(rows, kept), rtol=1e-6, atol=1e-6)
    weights = torch.rand(6, 2, device=device, requires_grad=True)
    (found,) = torch.autograd.grad(unpermute(rows, lying, weights).sum(), weights)
    assert found[1, 0] == found[4, 1] == 0
