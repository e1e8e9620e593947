"""Parameters that a module sees through a function."""

import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests.ranks import apart
from titan_core.parallel.views import add_view


def _doubled() -> nn.Module:
    block = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    for module in block:
        add_view(module, "weight", lambda parameter: parameter * 2)
        add_view(module, "weight", lambda seen: seen + 1)
    return block


def test_modules_see_views_and_keep_their_parameters() -> None:
    block = _doubled()
    linear, norm = block
    assert torch.equal(linear.weight, linear._parameters["weight"] * 2 + 1)
    assert torch.equal(norm.weight, torch.full((4,), 3.0))
    assert set(block.state_dict()) == {"0.weight", "0.bias", "1.weight"}
    assert isinstance(linear, nn.Linear)
    assert type(linear) is not nn.Linear is type(nn.Linear(1, 1))


def _compiled() -> int:
    counter, x = CompileCounter(), torch.randn(2, 4)
    for _ in range(12):
        block = _doubled()
        assert torch.equal(torch.compile(block.forward, backend=counter, fullgraph=True)(x), block(x))
    return counter.frame_count


def test_blocks_with_views_are_compiled_once() -> None:
    """The compiler gives up at the ninth version of a function."""
    assert apart(_compiled) == 1
