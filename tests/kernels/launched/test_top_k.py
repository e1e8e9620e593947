"""The kernel that chooses the largest scores, against a stable sort and torch.topk."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from titan_kernels.top_k import reference_top_k, top_k
from torch import Tensor

INF, NAN = float("inf"), float("nan")
SPECIAL = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 2.0**-149, -(2.0**-149), 3.4028234663852886e38, -3.4028234663852886e38]


def check(scores: Tensor, k: int) -> None:
    chosen = top_k(scores, k)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen.cpu(), reference_top_k(scores.cpu(), k))
    values, theirs = scores.gather(-1, chosen), scores.topk(k, -1).values
    torch.testing.assert_close(values, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "k"),
    [
        ((0, 8), 2),
        ((1, 1), 1),
        ((37, 3), 3),
        ((33, 100), 6),
        ((9, 128), 8),
        ((5, 256), 8),
        ((3, 512), 16),
        ((70, 16), 16),
        ((13, 8, 32), 2),
        ((2, 1500), 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["different", "equal", "hidden", "nan"])
def test_the_largest_are_found_and_of_equal_ones_the_first(
    device: torch.device, shape: tuple[int, ...], k: int, kind: str
) -> None:
    scores = torch.randn(shape, device=device)
    if kind == "equal":
        scores = scores.round()
    if kind == "hidden":  # fewer than k are left in some rows
        scores[torch.rand(shape, device=device) < 0.8] = -INF
    if kind == "nan":
        scores[torch.rand(shape, device=device) < 0.5] = NAN
        scores[torch.rand(shape, device=device) < 0.2] *= -1
    check(scores, k)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, int]:
    width = draw(st.integers(1, 20))
    score = st.sampled_from(SPECIAL) | st.floats(width=32)
    drawn = draw(st.lists(st.lists(score, min_size=width, max_size=width), min_size=1, max_size=5))
    return torch.tensor(drawn), draw(st.integers(1, min(16, width)))


@given(rows())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_scores_are(device: torch.device, drawn: tuple[Tensor, int]) -> None:
    check(drawn[0].to(device), drawn[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_many_equal_scores(device: torch.device, dtype: torch.dtype) -> None:
    check(torch.randn(9, 256, device=device).to(dtype), 8)


def test_scores_that_do_not_lie_together(device: torch.device) -> None:
    scores = torch.randn(24, 21, device=device)
    check(scores.T, 4)
    check(scores[:, 3:12], 4)
    check(scores[::3], 4)
    check(scores[:, 0].expand(5, 24), 4)


def test_a_token_chooses_the_same_whatever_others_are_there(device: torch.device) -> None:
    scores = torch.randn(19, 64, device=device).round()
    together = top_k(scores, 8)
    for first, last in ((0, 1), (1, 7), (7, 19)):
        assert torch.equal(top_k(scores[first:last], 8), together[first:last])
