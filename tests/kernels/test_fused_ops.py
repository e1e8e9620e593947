"""RMSNorm, rotary and linear cross-entropy as torch operations: on a CPU, under autograd and the compiler."""

import pytest
import torch
from titan_kernels.linear_cross_entropy import (
    _rows_of_chunk,
    cross_entropy_,
    linear_cross_entropy,
    reference_linear_cross_entropy,
)
from titan_kernels.rms_norm import reference_rms_norm, rms_norm
from titan_kernels.rotary import reference_rotate_pairs, rotate_pairs

from tests.ranks import apart

OPS = torch.ops.titan_kernels
LABELS = torch.tensor([1, -100, 4, 0, 2])


def wide(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def angles() -> list[torch.Tensor]:
    turn = torch.randn(3, 4, dtype=torch.float64)
    return [turn.cos(), turn.sin()]


def given(name: str) -> tuple:
    """Return the function, its reference and fp64 inputs, of which those that require a gradient have one."""
    return {
        "rms_norm": lambda: (rms_norm, reference_rms_norm, [wide(5, 12), wide(12), 1e-5]),
        "rotate_pairs": lambda: (rotate_pairs, reference_rotate_pairs, [wide(2, 3, 2, 8), *angles()]),
        "linear_cross_entropy": lambda: (
            linear_cross_entropy,
            reference_linear_cross_entropy,
            [wide(5, 4), wide(6, 4), LABELS],
        ),
    }[name]()


NAMES = ["rms_norm", "rotate_pairs", "linear_cross_entropy"]


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_in_fp64(name: str) -> None:
    torch.manual_seed(0)
    function, reference, inputs = given(name)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    out, truth = function(*inputs), reference(*inputs)
    torch.testing.assert_close(out, truth)
    grad = torch.randn_like(out)
    for found, expected in zip(*(torch.autograd.grad(y, leaves, grad) for y in (out, truth)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_traced_as_a_whole_it_is_the_same(name: str) -> None:
    torch.manual_seed(0)
    function, _, inputs = given(name)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]

    def value_and_gradients(compiled) -> list[torch.Tensor]:
        out = compiled(*inputs).square().sum()
        return [out, *torch.autograd.grad(out, leaves)]

    def both() -> list:
        return [
            value_and_gradients(f) for f in (function, torch.compile(function, backend="aot_eager", fullgraph=True))
        ]

    for found, expected in zip(*apart(lambda: [[x.detach() for x in xs] for xs in both()]), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (OPS.rms_norm, lambda: (wide(5, 12), wide(12), 1e-5)),
        (OPS.rotate_pairs, lambda: (wide(2, 3, 2, 8), *(x[None] for x in angles()), False)),
        (OPS.linear_cross_entropy, lambda: (wide(5, 4), wide(6, 4), LABELS, torch.tensor(0.5), 2, True, True)),
        (OPS.scale_, lambda: (torch.randn(5, 6), torch.tensor(0.5))),
        (OPS.cross_entropy_, lambda: (torch.randn(5, 6), LABELS, None, True)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_registered_as_torch_demands(op, arguments) -> None:
    """Schema, fake shapes and autograd registration (the traced gradients are compared above)."""
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    found = apart(lambda: torch.library.opcheck(op.default, arguments(), test_utils=tests))
    assert set(found.values()) == {"SUCCESS"}


def test_gradients_of_a_large_head_do_not_depend_on_the_chunks() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    labels = torch.randint(40, (300,))
    whole, parts = (
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels, chunk_logits=chunk), [hidden, weight])
        for chunk in (1 << 28, 40 * 128)
    )
    for x, y in zip(whole, parts, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_rows", [1, 2048, 4096, 8192, 10240, 10241, 16384, 65536])
def test_the_loss_takes_a_sixth_of_the_memory_of_a_plain_one(num_rows: int) -> None:
    """Three fp32 copies of the logits: themselves, their logarithms, their gradient."""
    vocabulary, width = 128256, 4096
    hidden, weight = (torch.empty(rows, width, dtype=torch.bfloat16, device="meta") for rows in (num_rows, vocabulary))
    rows = _rows_of_chunk(hidden, weight, None, sums=True)
    sums = 4 * vocabulary * width if num_rows > rows else 0
    assert 2 * min(rows, num_rows) * vocabulary + sums <= 3 * 4 * num_rows * vocabulary / 6
    assert _rows_of_chunk(hidden, weight, None, sums=False) == 2048  # nothing to sum
    assert _rows_of_chunk(hidden, weight.float(), None, sums=True) == 2048  # the sum is the gradient
    assert _rows_of_chunk(hidden, weight, 300 * vocabulary, sums=True) == 256  # as asked


@pytest.mark.parametrize("chunk", [None, 40 * 128])
def test_the_gradient_of_an_fp32_weight_is_not_rounded_on_the_way(chunk: int | None) -> None:
    torch.manual_seed(0)
    hidden, labels = torch.randn(300, 16).bfloat16(), torch.randint(40, (300,))
    weight = torch.randn(40, 16, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, labels, chunk_logits=chunk)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.dtype == torch.float32
    wide = weight.detach().bfloat16().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference_linear_cross_entropy(hidden.double(), wide, labels), wide)
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=2**-7 * expected.abs().max().item())


def test_gradients_scaled_in_place_cannot_be_asked_for_twice() -> None:
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4)
    loss = linear_cross_entropy(hidden, weight, LABELS)
    torch.autograd.grad(loss, hidden, torch.tensor(2.0), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)


def test_what_is_frozen_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 4), torch.randn(6, 4)
    expected = torch.autograd.functional.jacobian(lambda h: reference_linear_cross_entropy(h, weight, LABELS), hidden)
    leaf = hidden.clone().requires_grad_()
    linear_cross_entropy(leaf, weight, LABELS).backward()
    torch.testing.assert_close(leaf.grad, expected)
    expected = torch.autograd.functional.jacobian(lambda w: reference_linear_cross_entropy(hidden, w, LABELS), weight)
    leaf = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, leaf, LABELS, scale=torch.tensor(3.0)).backward()
    torch.testing.assert_close(leaf.grad, 3 * expected)


def test_rows_of_losses_sum_to_the_loss() -> None:
    logits = torch.randn(5, 6)
    losses = cross_entropy_(logits.clone(), LABELS)
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(logits, LABELS, reduction="none"))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rms_norm(torch.ones(2, 3), torch.ones(4), 1e-6), "one weight a column"),
        (lambda: rms_norm(torch.ones(1, 40000), torch.ones(40000), 1e-6), "got 40000"),
        (lambda: rotate_pairs(torch.ones(1, 3, 1, 4), torch.ones(2, 2), torch.ones(2, 2)), r"of shape \(3, 2\)"),
        (lambda: linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 3), torch.ones(3).long()), "3 labels"),
    ],
    ids=["weight", "too wide", "tables", "labels"],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
