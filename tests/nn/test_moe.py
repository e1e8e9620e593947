"""Routers, experts and their balance, against plain reimplementations and closed forms."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.runs import tiny
from titan_core.declare.experts import ExpertSizes
from titan_core.models import family, resolve
from titan_core.nn.experts import multiply
from titan_core.nn.moe import MoE, Router
from titan_core.parallel import legal
from titan_core.parallel.mesh import Layout
from titan_core.runtime import distributed
from titan_core.runtime.events import silent
from titan_core.training.build import build
from titan_core.training.step import forward_backward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(ExpertSizes):
    dim: int = 12
    num_experts: int = 8
    top_k: int = 3
    expert_dim: int = 10


def mixture(**changes: object) -> MoE:
    torch.manual_seed(0)
    module = MoE(Sizes(**changes))  # pyright: ignore[reportArgumentType]
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


X = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1))


def token_by_token(module: MoE, x_BTD: Tensor) -> Tensor:
    """A mixture as the formula says it, one token at a time."""
    sizes, experts, out = module.router.sizes, module.experts, torch.zeros_like(x_BTD)
    for index, x in enumerate(x_BTD.flatten(0, 1)):
        logits = module.router.gate.weight @ x
        scores = logits.softmax(0) if sizes.score == "softmax" else logits.sigmoid()
        ranked = scores + (module.router.expert_bias if sizes.score_bias else 0)
        groups = ranked.view(sizes.num_groups, -1)
        merit = groups.amax(1) if sizes.group_score == "max" else groups.sort(1).values[:, -2:].sum(1)
        kept = set(merit.argsort(descending=True)[: sizes.top_groups].tolist())
        each = sizes.num_experts // sizes.num_groups
        allowed = [e for e in ranked.argsort(descending=True).tolist() if e // each in kept][: sizes.top_k]
        weights = scores[allowed]
        if sizes.normalise_scores:
            weights = weights / weights.sum()
        for e, weight in zip(allowed, weights * sizes.route_scale, strict=True):
            into = x * weight if sizes.score_before_experts else x
            w1, w2, w3 = (w.weight[e] for w in (experts.w1, experts.w2, experts.w3))
            given = w2 @ (F.silu(w1 @ into) * (w3 @ into))
            out.view(-1, out.shape[-1])[index] += given if sizes.score_before_experts else given * weight
    return out if module.shared_experts is None else out + module.shared_experts(x_BTD)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalise_scores": True, "route_scale": 2.5, "score": "sigmoid", "num_shared_experts": 2},
        {"score": "sigmoid", "score_bias": True, "num_groups": 4, "top_groups": 2, "group_score": "top2"},
        {"num_groups": 4, "top_groups": 2},
        {"score_before_experts": True, "score": "sigmoid", "top_k": 1},
        {"score_before_experts": True},
    ],
)
def test_mixture_is_its_formula(changes: dict[str, object]) -> None:
    module = mixture(**changes)
    if module.router.sizes.score_bias:
        module.router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    x = X.clone().requires_grad_()
    found, wanted = module(x), token_by_token(module, x)
    assert torch.allclose(found, wanted, atol=1e-6)
    weights = [x, *module.parameters()]
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), weights),
        torch.autograd.grad(wanted.square().sum(), weights),
        strict=True,
    ):
        assert (a - b).abs().max() <= 1e-5 * max(b.abs().max().item(), 1e-3)


@pytest.mark.parametrize("backend", ["grouped_mm", "loop", "titan"])
def test_backends_agree(backend: str) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(20, 16, requires_grad=True), torch.randn(4, 8, 16, requires_grad=True)
    ends = torch.tensor([5, 5, 19, 20], dtype=torch.int32)
    found = multiply(x, weight, ends, backend)  # pyright: ignore[reportArgumentType]
    wanted = torch.cat([x[:5] @ weight[0].T, x[5:19] @ weight[2].T, x[19:] @ weight[3].T])
    assert torch.allclose(found, wanted, atol=1e-5)
    slope = torch.randn(20, 8)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight), slope), torch.autograd.grad(wanted, (x, weight), slope), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_choices_are_counted_once_in_training_and_never_in_evaluation() -> None:
    module = mixture()
    module(X)
    assert module.router.tally_E.sum() == 18 * 3
    module.eval()(X)
    with torch.no_grad():
        module.train()(X)
    assert module.router.tally_E.sum() == 18 * 3
    checkpoint(module, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert module.router.tally_E.sum() == 2 * 18 * 3


def test_penalties_are_their_formulas() -> None:
    """DeepSeek-V3, eq. 17 to 20, for each sequence, and the same with the loads of the last step."""
    module = mixture(sequence_balance_loss=0.3, global_balance_loss=0.2, score="sigmoid")
    router = module.router
    router.last_load.copy_(torch.arange(8.0))
    router.penalty_scale = 0.5
    (weights,) = torch.autograd.grad(router(X)[1].sum() * 0, [router.gate.weight])

    total, sums = torch.zeros(()), torch.zeros(2)
    for x_TD in X:
        scores = (x_TD @ router.gate.weight.T).sigmoid()
        shares = scores / scores.sum(1, keepdim=True)
        chosen = torch.zeros(9, 8).scatter_(1, scores.topk(3).indices, 1.0)
        f = chosen.sum(0) * 8 / (3 * 9)
        last = router.last_load / router.last_load.sum() * 8
        total = total + ((0.3 * f + 0.2 * last) * shares.mean(0)).sum()
        sums += torch.stack((0.3 * f @ shares.mean(0), 0.2 * last @ shares.mean(0)))
    (wanted,) = torch.autograd.grad(0.5 * total, [router.gate.weight])
    assert torch.allclose(weights, wanted, atol=1e-6)
    assert torch.allclose(router.penalties, sums.detach(), atol=1e-6)


def test_even_dealing() -> None:
    module = mixture()
    module.router.evenly = True
    module(X)
    assert module.router.tally_E.tolist() == [7, 7, 7, 7, 7, 7, 6, 6]


def test_bias_moves_towards_those_who_have_too_few_and_survives(tmp_path: Path) -> None:
    sizes = {"model.name": "qwen3", "model.args.head_dim": 8, "model.args.num_experts": 4, "model.args.tied": False}
    bias = {"model.args.score_bias": True, "model.args.load_balance_coeff": 0.1, "model.args.expert_dim": 8}
    parts = build(tiny(tmp_path, **sizes, **bias).config, distributed.start(), silent)
    router = next(m for m in parts.models[0].modules() if isinstance(m, Router))
    forward_backward(parts, lambda: next(parts.loader))
    loads = parts.balance.loads_LE
    assert loads is not None
    assert loads.sum(1).tolist() == [8 * 32] * 2
    parts.update(1e-3)
    signs = (loads[0].mean() - loads[0]).sign() * 0.1
    assert torch.allclose(router.expert_bias, signs - signs.mean())
    assert "layers.0.moe.router.expert_bias" in parts.buffers
    assert not any(name.endswith("tally_E") for name in parts.buffers)
    assert set(parts.balance.metrics()) == {
        "experts/max_load", "experts/mean_max_load", "experts/entropy", "experts/dropped"
    }  # fmt: skip
    parts.loader.close()


def test_losses_of_balance_are_logged_where_they_are_on(tmp_path: Path) -> None:
    """Where every expert gets equally many choices the loss is the coefficient, at each mixture (eq. 17: f = 1)."""
    sizes = {"model.name": "qwen3", "model.args.head_dim": 8, "model.args.num_experts": 4, "model.args.tied": False}
    on = {"model.args.expert_dim": 8, "model.args.sequence_balance_loss": 0.25}
    even = {"training.debug_moe_force_load_balance": True, "training.local_batch_size": 2}
    parts = build(tiny(tmp_path, **sizes, **on, **even).config, distributed.start(), silent)
    for _ in range(2):
        forward_backward(parts, lambda: next(parts.loader))
        found = {name: x for name, x in parts.balance.metrics().items() if name.endswith("loss")}
        assert found == {"experts/sequence_balance_loss": pytest.approx(2 * 0.25)}
    parts.loader.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 3}, "num_groups 3 does not divide num_experts 8"),
        ({"num_groups": 2, "top_groups": 3}, "top_groups 3 is more than num_groups 2"),
        ({"num_groups": 4, "top_k": 3}, "top_k 3 is more than the 2 experts to choose from"),
        ({"num_groups": 8, "top_groups": 8, "group_score": "top2"}, "group_score `top2` needs two experts in a group"),
        ({"load_balance_coeff": 0.1}, "load_balance_coeff moves the bias of scores: set score_bias"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    qwen = family("qwen3")
    with pytest.raises(ValueError, match=message):
        qwen.sizes("0.6B", **{"num_experts": 8, "top_k": 2, **changes})


def test_products_that_cannot_be_formed_so(tmp_path: Path) -> None:
    def problems(**changes: object) -> list[str]:
        sizes = {"model.name": "qwen3", "model.args.head_dim": 8, "model.args.num_experts": 4}
        config = tiny(tmp_path, **sizes, **changes).config
        return [p.message for p in legal.problems(config, Layout(), *resolve(config.model))]

    assert problems(training__expert_backend="grouped_mm") == []
    assert problems(training__expert_backend="grouped_mm", **{"model.args.expert_dim": 9}) == [
        "layers.0.moe.experts.w1.weight is 9 x 32, and `grouped_mm` wants multiples of 4"
    ]
    assert problems(training__expert_backend="loop", compile__enable=True) == [
        "the compiler cannot see through a `loop` over experts"
    ]


@pytest.mark.parametrize(
    "changes", [{"training__expert_backend": "loop"}, {"training__debug_moe_force_load_balance": True}]
)
def test_options_of_experts_without_experts_are_refused(changes: dict[str, object], tmp_path: Path) -> None:
    config = tiny(tmp_path, **changes).config
    (found,) = legal.problems(config, Layout(), *resolve(config.model))
    assert found.key == next(iter(changes)).replace("__", ".")
    assert "does nothing: this llama3 has no experts" in found.message
