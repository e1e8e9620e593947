"""Placement and permutation in plain torch, and as operators that autograd and the compiler know."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from titan_kernels.permutation import Placement, block_experts, permute, place, placement_rows, unpermute


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    num_experts, top_k = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    ids = st.lists(st.integers(-1, num_experts), min_size=top_k, max_size=top_k)
    tokens = draw(st.lists(ids, max_size=12))
    experts = torch.tensor(tokens, dtype=torch.int64).view(-1, top_k)
    return experts, num_experts, draw(st.sampled_from([1, 2, 8, 128]))


def check(placement: Placement, experts_TK: torch.Tensor, num_experts: int, align: int) -> None:
    """What the docstring of `place` promises, assignment by assignment."""
    counts, ends, row, source = (tensor.cpu() for tensor in placement)
    flat = experts_TK.flatten().cpu()
    assert source.shape == (placement_rows(flat.numel(), num_experts, align),)
    assert counts.tolist() == [int((flat == expert).sum()) for expert in range(num_experts)]
    start = 0
    for expert in range(num_experts):
        assigned = (flat == expert).nonzero().flatten()
        assert start % align == 0
        assert source[start : start + len(assigned)].tolist() == assigned.tolist()
        padding = source[start + len(assigned) : int(ends[expert])]
        assert padding.numel() < align
        assert (padding == -1).all()
        start = int(ends[expert])
    assert (source[start:] == -1).all()
    live = (flat >= 0) & (flat < num_experts)
    assert (row.flatten()[~live] == -1).all()
    assert source[row.flatten()[live].long()].tolist() == live.nonzero().flatten().tolist()


@given(routings())
@settings(deadline=None, max_examples=60)
def test_each_assignment_has_one_row_in_its_experts_region(routing: tuple[torch.Tensor, int, int]) -> None:
    check(place(*routing), *routing)


@given(routings(), st.booleans())
@settings(deadline=None, max_examples=30)
def test_unpermute_is_the_adjoint_of_permute(routing: tuple[torch.Tensor, int, int], weighted: bool) -> None:
    placement = place(*routing)
    x = torch.randn(routing[0].shape[0], 3, dtype=torch.float64)
    rows = torch.randn(placement.source_R.shape[0], 3, dtype=torch.float64)
    forward = (permute(x, placement) * rows).sum()
    torch.testing.assert_close(forward, (x * unpermute(rows, placement)).sum())
    if weighted and x.shape[0]:
        weights = torch.rand(routing[0].shape, dtype=torch.float64)
        expected = sum(
            weights.flatten()[assignment] * rows[row]
            for assignment, row in enumerate(placement.row_TK.flatten().tolist())
            if row >= 0 and assignment // routing[0].shape[1] == 0
        )
        torch.testing.assert_close(unpermute(rows, placement, weights)[0], torch.zeros(3).double() + expected)


def test_gradients_by_finite_differences() -> None:
    placement = place(torch.tensor([[0, 2], [2, -1], [1, 2]]), 4, 4)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def through(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return unpermute(permute(x, placement).square(), placement, weights)

    assert torch.autograd.gradcheck(through, (x, weights))
    assert torch.autograd.gradcheck(lambda x: unpermute(permute(x, placement).square(), placement), (x,))


def test_operators_keep_the_rules_of_torch() -> None:
    experts, x = torch.tensor([[0, 2], [2, -1], [1, 2]]), torch.randn(3, 8, requires_grad=True)
    weights = torch.rand(3, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.titan_kernels.place, (experts, 4, 8))
    placement = place(experts, 4, 8)
    torch.library.opcheck(torch.ops.titan_kernels.permute, (x, placement.row_TK, placement.source_R))
    rows = permute(x, placement).detach().requires_grad_()
    torch.library.opcheck(torch.ops.titan_kernels.unpermute, (rows, placement.row_TK, placement.source_R, weights))


def test_blocks_know_their_expert() -> None:
    ends = torch.tensor([0, 128, 128, 384], dtype=torch.int32)
    assert block_experts(ends, 640, 128).tolist() == [1, 3, 3, -1, -1]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: place(torch.zeros(3), 4), r"2-d integer.*float32.*\(3,\)"),
        (lambda: place(torch.zeros(3, 1).long(), 0), "num_experts >= 1.*got 0"),
        (lambda: permute(torch.zeros(2, 8), place(torch.zeros(3, 1).long(), 1)), r"3 tokens.*\(2, 8\)"),
        (lambda: unpermute(torch.zeros(2, 8), place(torch.zeros(3, 1).long(), 1)), r"3 rows.*\(2, 8\)"),
        (
            lambda: unpermute(torch.zeros(3, 8), place(torch.zeros(3, 1).long(), 1), torch.ones(3, 2)),
            r"\(3, 1\).*\(3, 2\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(call: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()  # pyright: ignore[reportCallIssue]
