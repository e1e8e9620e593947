"""The choice of the largest scores as a torch operation: on a CPU, on no device, under autograd and the compiler."""

import pytest
import torch
from titan_kernels.top_k import top_k

from tests.ranks import apart


def test_operator_keeps_the_rules_of_torch() -> None:
    for scores, k in ((torch.randn(5, 6), 3), (torch.randn(0, 6), 6)):
        found = apart(torch.library.opcheck, torch.ops.titan_kernels.top_k, (scores, k))
        assert set(found.values()) == {"SUCCESS"}


def test_on_a_cpu_of_equal_scores_the_first() -> None:
    assert top_k(torch.tensor([[1.0, 2.0, 2.0, -0.0, 0.0, float("nan")]]), 5).tolist() == [[5, 1, 2, 0, 3]]
    assert top_k(torch.zeros(2, 200), 3).tolist() == [[0, 1, 2]] * 2


def test_without_data_it_has_a_shape() -> None:
    chosen = top_k(torch.empty(7, 4, 12, device="meta"), 3)
    assert (chosen.shape, chosen.dtype, chosen.device.type) == ((7, 4, 3), torch.int64, "meta")


def test_traced_as_a_whole_it_is_the_same_and_scores_at_it_have_gradients() -> None:
    torch.manual_seed(0)
    scores = torch.randn(6, 3, 9, requires_grad=True)

    def with_gradient(choose) -> list[torch.Tensor]:
        out = scores.gather(-1, choose(scores, 4)).square()
        return [out.detach(), *torch.autograd.grad(out.sum(), scores)]

    traced = apart(lambda: with_gradient(torch.compile(top_k, fullgraph=True, backend="aot_eager")))
    wanted = with_gradient(lambda scores, k: scores.topk(k, -1).indices)
    for found in (traced, with_gradient(top_k)):
        torch.testing.assert_close(found, wanted)
    assert not top_k(scores, 4).requires_grad


@pytest.mark.parametrize(
    ("scores", "k", "says"),
    [
        (torch.randn(3, 4), 5, "k = 5 and 4 scores"),
        (torch.randn(3, 4), 0, "k = 0 and 4 scores"),
        (torch.randn(3, 0), 1, "k = 1 and 0 scores"),
        (torch.randn(1, 32769), 1, "at most 32768 scores.*32769 scores"),
        (torch.randn(3, 4).double(), 1, "float64 of shape \\(3, 4\\)"),
        (torch.arange(3), 1, "int64 of shape"),
        (torch.tensor(1.0), 1, "one or more dimensions"),
    ],
)
def test_what_cannot_be_chosen_is_named(scores: torch.Tensor, k: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        top_k(scores, k)
