"""The fused linear cross-entropy against torch's cross-entropy over all logits, in fp64."""

import pytest
import torch
from titan_kernels.linear_cross_entropy import cross_entropy_, linear_cross_entropy, reference_linear_cross_entropy

ROWS, WIDTH = 37, 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [500, 17000])  # one tile of the kernel, and two
def test_loss_and_gradients(device: torch.device, vocabulary: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(ROWS, WIDTH, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, WIDTH, device=device) / 4).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (ROWS,), device=device)
    labels[::5] = -100
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = reference_linear_cross_entropy(*exact, labels)
    for rows in (ROWS, 16):  # at once, and in three chunks
        loss = linear_cross_entropy(hidden, weight, labels, chunk_logits=rows * vocabulary)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), truth, rtol=2e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)
        found = torch.autograd.grad(loss / 7, [hidden, weight])
        expected = torch.autograd.grad(truth / 7, exact, retain_graph=True)
        for x, y in zip(found, expected, strict=True):
            off = (x.double() - y).norm() / y.norm()
            assert off < (8e-3 if dtype == torch.bfloat16 else 1e-5)
    scaled = linear_cross_entropy(hidden, weight, labels, scale=torch.tensor(0.125, device=device))
    torch.testing.assert_close(scaled, loss * 0.125, rtol=1e-5, atol=0)
    for x, y in zip(torch.autograd.grad(scaled, [hidden, weight]), expected, strict=True):  # those of loss / 7
        assert (x.double() * 8 / 7 - y).norm() / y.norm() < (8e-3 if dtype == torch.bfloat16 else 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), loss.detach(), rtol=1e-5, atol=0)


def test_ignored_rows_extreme_logits_and_wrong_labels(device: torch.device) -> None:
    logits = torch.randn(5, 100, device=device)
    logits[1] = float("-inf")
    logits[1, 3] = 2.0
    logits[2] = 1e4
    logits[4] = float("nan")
    labels = torch.tensor([7, 3, 50, 100, -100], device=device)
    slope = logits.clone()
    losses = cross_entropy_(slope, labels)
    torch.testing.assert_close(losses[0], torch.nn.functional.cross_entropy(logits[0], labels[0]))
    assert losses[1].item() == pytest.approx(0.0, abs=1e-6)
    assert losses[2].item() == pytest.approx(4.60517, abs=2e-3)  # fp32 at 1e4 knows thousandths
    assert losses[3].isnan()  # label 100 of 100
    assert losses[4].item() == 0.0
    assert torch.equal(slope[4], torch.zeros_like(slope[4]))
    assert torch.isfinite(slope[:4]).all()
    untouched = logits.clone()
    assert torch.equal(cross_entropy_(untouched, labels, slope=False)[:3], losses[:3])
    assert torch.equal(untouched[:4], logits[:4])
