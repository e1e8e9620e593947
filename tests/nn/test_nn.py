"""Building blocks against plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from titan_core.declare.rope import RopeScaling
from titan_core.nn import ops, rope
from titan_core.nn.attention import CAUSAL, Mask, attention, document_mask
from titan_core.nn.loss import linear_cross_entropy, loss_and_slope
from titan_core.nn.random import fill_normal

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# ------------------------------------------------------------------------------------------------ random numbers


def filled(shape, offset=(0, 0), full=(300, 40), **options) -> torch.Tensor:
    out = torch.empty(shape)
    fill_normal(out, seed=1, name="w", full_shape=full, offset=offset, std=options.pop("std", 1.0), **options)
    return out


@pytest.mark.parametrize(
    ("rows", "columns"), [((0, 300), (0, 40)), ((7, 9), (0, 40)), ((0, 300), (13, 14)), ((250, 300), (1, 39))]
)
def test_any_block_equals_the_block_of_the_whole(rows, columns) -> None:
    whole = filled((300, 40))
    block = filled((rows[1] - rows[0], columns[1] - columns[0]), (rows[0], columns[0]))
    assert torch.equal(block, whole[rows[0] : rows[1], columns[0] : columns[1]])


def test_three_dimensions_and_vectors() -> None:
    whole = filled((4, 5, 6), (0, 0, 0), (4, 5, 6))
    assert torch.equal(filled((2, 2, 3), (1, 2, 3), (4, 5, 6)), whole[1:3, 2:4, 3:])
    vector = filled((100,), (0,), (100,))
    assert torch.equal(filled((30,), (50,), (100,)), vector[50:80])


def test_moments_are_those_of_the_normal_distribution() -> None:
    sample = filled((2000, 500), full=(2000, 500), std=2.0) / 2
    n = sample.numel()
    assert abs(sample.mean().item()) < 4 / math.sqrt(n)
    assert sample.var().item() == pytest.approx(1, abs=4 * math.sqrt(2 / n))
    assert (sample**4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96 / n))
    neighbours = (sample[:, 1:] * sample[:, :-1]).mean().item()
    assert abs(neighbours) < 4 / math.sqrt(n)
    below = (sample[..., None] < torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])).double().mean((0, 1))
    expected = torch.special.ndtr(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).double())
    assert torch.allclose(below, expected, atol=3e-3)


def test_cut_and_seed() -> None:
    assert filled((1000, 40), full=(1000, 40), cut=2.0).abs().max() <= 2.0
    other = torch.empty(300, 40)
    fill_normal(other, seed=2, name="w", full_shape=(300, 40), offset=(0, 0), std=1.0)
    assert not torch.equal(other, filled((300, 40)))


# ------------------------------------------------------------------------------------------------ rotary positions


def test_rotation_is_the_complex_product() -> None:
    x = random(2, 10, 3, 8)
    freqs = rope.frequencies(8, 10000.0, None, torch.device("cpu"))
    cos, sin = rope.table(torch.arange(10), freqs)
    turned = torch.polar(torch.ones(10, 4), torch.arange(10)[:, None] * freqs)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turned[:, None]).flatten(-2)
    assert close(ops.rotate_pairs(x, cos, sin), expected, torch.float32)


def test_scores_depend_on_distance_only() -> None:
    q, k = random(1, 1, 1, 16), random(1, 1, 1, 16, seed=1)
    freqs = rope.frequencies(16, 500000.0, RopeScaling(), torch.device("cpu"))

    def score(i: int, j: int) -> float:
        turned = [ops.rotate_pairs(x, *rope.table(torch.tensor([p]), freqs)) for x, p in ((q, i), (k, j))]
        return (turned[0] * turned[1]).sum().item()

    assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-3)


# ------------------------------------------------------------------------------------------------ norms and activations


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rms_norm_and_its_gradients(dtype: torch.dtype) -> None:
    x, w = random(3, 5, 16, dtype=dtype).requires_grad_(), (random(16, seed=1) + 1).requires_grad_()
    rx, rw = x.detach().float().requires_grad_(), w.detach().clone().requires_grad_()
    found = ops.rms_norm(x, w, 1e-5)
    expected = rx * torch.rsqrt(rx.pow(2).mean(-1, keepdim=True) + 1e-5) * rw
    assert found.dtype == dtype
    assert close(found, expected, dtype)
    g = random(3, 5, 16, seed=2)
    found.backward(g.to(dtype))
    expected.backward(g)
    assert close(x.grad, rx.grad, dtype)
    assert close(w.grad, rw.grad, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu_and_its_gradients(dtype: torch.dtype) -> None:
    a, b = (random(4, 33, seed=s, dtype=dtype).requires_grad_() for s in (0, 1))
    ra, rb = (t.detach().float().requires_grad_() for t in (a, b))
    found, expected = ops.swiglu(a, b), F.silu(ra) * rb
    assert close(found, expected, dtype)
    g = random(4, 33, seed=2)
    found.backward(g.to(dtype))
    expected.backward(g)
    assert close(a.grad, ra.grad, dtype)
    assert close(b.grad, rb.grad, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rotation_gradient(dtype: torch.dtype) -> None:
    cos, sin = rope.table(torch.arange(6), rope.frequencies(8, 100.0, None, torch.device("cpu")))
    x = random(2, 6, 3, 8, dtype=dtype).requires_grad_()
    g = random(2, 6, 3, 8, seed=1, dtype=dtype)
    ops.rotate_pairs(x, cos, sin).backward(g)
    assert close(x.grad, ops.rotate_pairs(g, cos, -sin), dtype)


@pytest.mark.parametrize("bf16", [False, True])
def test_linear_and_its_gradients(bf16: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    x, w = random(2, 7, 16, dtype=dtype).requires_grad_(), random(9, 16, seed=1).requires_grad_()
    rx, rw = x.detach().float().requires_grad_(), w.detach().clone().requires_grad_()
    found, expected = ops.linear(x, w, dtype if bf16 else None), rx @ rw.T
    g = random(2, 7, 9, seed=2)
    found.backward(g.to(dtype))
    expected.backward(g)
    assert w.grad.dtype == torch.float32
    scale = 10 if bf16 else 1
    assert close(found / scale, expected / scale, dtype)
    assert close(x.grad / scale, rx.grad / scale, dtype)
    assert close(w.grad / scale, rw.grad / scale, dtype)


# ------------------------------------------------------------------------------------------------ attention


def slow_attention(q, k, v, visible) -> torch.Tensor:
    heads = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(heads, 2) for x in (k, v))
    scores = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhts,bshc->bthc", weights, v)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [1, 17, 130, 300])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_causal_attention_and_its_gradients(heads, length: int, dtype: torch.dtype) -> None:
    shapes = [(2, length, h, 16) for h in (heads[0], heads[1], heads[1])]
    q, k, v = (random(*s, seed=i, dtype=dtype).requires_grad_() for i, s in enumerate(shapes))
    rq, rk, rv = (t.detach().float().requires_grad_() for t in (q, k, v))
    found = attention(q, k, v, CAUSAL)
    expected = slow_attention(rq, rk, rv, torch.ones(length, length, dtype=torch.bool).tril())
    assert close(found, expected, dtype)
    g = random(*expected.shape, seed=5)
    found.backward(g.to(dtype))
    expected.backward(g)
    for ours, theirs in ((q, rq), (k, rk), (v, rv)):
        assert close(ours.grad, theirs.grad, dtype)


def test_document_masks_hide_other_documents() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, -1, -1]])
    q, k, v = (random(2, 8, h, 8, seed=h) for h in (4, 2, 2))
    visible = (documents[:, :, None] == documents[:, None, :]) & torch.ones(8, 8, dtype=torch.bool).tril()
    found = attention(q, k, v, document_mask(documents, torch.arange(documents.shape[1])))
    assert close(found, slow_attention(q, k, v, visible[:, None]), torch.float32)
    alone = attention(q[:1, 3:5], k[:1, 3:5], v[:1, 3:5], CAUSAL)
    assert close(found[:1, 3:5], alone, torch.float32)


def test_queries_at_the_end_see_all_before_them() -> None:
    q, k, v = (random(1, 12, h, 8, seed=h) for h in (4, 2, 2))
    whole = attention(q, k, v, CAUSAL)
    assert close(attention(q[:, 7:], k, v, CAUSAL), whole[:, 7:], torch.float32)
    assert close(attention(q[:, 11:], k, v, Mask()), whole[:, 11:], torch.float32)


# ------------------------------------------------------------------------------------------------ loss


@pytest.mark.parametrize("ignored", [0, 5, 23])
@pytest.mark.parametrize("budget", [1, 7 * 50, 1 << 25])
@pytest.mark.parametrize("inner", [None, loss_and_slope])
def test_loss_equals_cross_entropy_of_the_logits(ignored: int, budget: int, inner, monkeypatch) -> None:
    monkeypatch.setattr("titan_core.nn.loss._CHUNK", budget)
    hidden, weight = random(23, 16).requires_grad_(), random(50, 16, seed=1).requires_grad_()
    labels = torch.randint(50, (23,), generator=torch.Generator().manual_seed(0))
    labels[:ignored] = -100
    rh, rw = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    found = linear_cross_entropy(hidden, weight, labels, inner)
    expected = F.cross_entropy(rh @ rw.T, labels, ignore_index=-100, reduction="sum")
    assert found.item() == pytest.approx(expected.item() if ignored < 23 else 0.0, rel=1e-5)
    (found * 0.37).backward()
    (expected * 0.37).backward()
    assert close(hidden.grad, rh.grad, torch.float32)
    assert close(weight.grad, rw.grad, torch.float32)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, labels).item() == pytest.approx(found.item(), rel=1e-5)


def test_loss_in_bf16_is_as_close_as_torch() -> None:
    hidden, weight = random(64, 32, dtype=torch.bfloat16), random(500, 32, seed=1)
    labels = torch.randint(500, (64,), generator=torch.Generator().manual_seed(0))
    exact = F.cross_entropy(hidden.float() @ weight.T, labels, reduction="sum")
    plain = F.cross_entropy((hidden @ weight.bfloat16().T).float(), labels, reduction="sum")
    hidden.requires_grad_()
    weight.requires_grad_()
    found = linear_cross_entropy(hidden, weight, labels)
    assert abs(found - exact).item() <= 2 * abs(plain - exact).item() + 0.5
    found.backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    logits = (hidden.detach().float() @ weight.detach().T).softmax(-1)
    logits[torch.arange(64), labels] -= 1
    assert torch.allclose(weight.grad, logits.T @ hidden.detach().float(), atol=0.05, rtol=0.05)
