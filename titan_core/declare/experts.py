"""Mixtures of experts as data: their sizes, how tokens choose, and their parameters. `nn.moe` is the module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from titan_core.config.schema import NonNegative, NonNegativeFloat, Positive, PositiveFloat
from titan_core.declare.parameters import Constant, Normal, Parameter


@dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """Sizes of mixtures of experts; with `num_experts` 0 there are none.

    A token goes to the `top_k` of `num_experts` experts, each `expert_dim` wide, and to `num_shared_experts`, which are
    one MLP. It scores experts by `score`; with `num_groups`, only those of its best `top_groups` groups count, a group
    being as good as its best expert ("max") or its best two ("top2"). The chosen scores, divided by their sum with
    `normalise_scores` and multiplied by `route_scale`, weigh what experts give, or with `score_before_experts` what
    they get.

    With `score_bias`, a bias is added to the scores for the choice alone; `load_balance_coeff` is the step by which
    that of an expert with too few tokens grows (Wang et al. 2024).
    `sequence_balance_loss` weighs the loss of DeepSeek-V3 (eq. 17) for every sequence; `global_balance_loss` the same
    with the loads of the whole batch of the last step.
    """

    num_experts: NonNegative = 0
    top_k: Positive = 1
    expert_dim: Positive = 768
    num_shared_experts: NonNegative = 0
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise_scores: bool = False
    route_scale: PositiveFloat = 1.0
    score_before_experts: bool = False
    num_groups: Positive = 1
    top_groups: Positive = 1
    group_score: Literal["max", "top2"] = "max"
    score_bias: bool = False
    load_balance_coeff: NonNegativeFloat = 0.0
    sequence_balance_loss: NonNegativeFloat = 0.0
    global_balance_loss: NonNegativeFloat = 0.0

    def check_experts(self) -> None:
        """Raise `ValueError` for numbers that do not fit each other."""
        if not self.num_experts:
            return
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_groups {self.num_groups} does not divide num_experts {self.num_experts}")
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups {self.top_groups} is more than num_groups {self.num_groups}")
        each = self.num_experts // self.num_groups
        if self.top_k > self.top_groups * each:
            raise ValueError(f"top_k {self.top_k} is more than the {self.top_groups * each} experts to choose from")
        if self.group_score == "top2" and self.num_groups > 1 and each < 2:
            raise ValueError("group_score `top2` needs two experts in a group")
        if self.load_balance_coeff and not self.score_bias:
            raise ValueError("load_balance_coeff moves the bias of scores: set score_bias")


def parameters(prefix: str, sizes: Any, inner: Normal, residual: Normal) -> Iterator[Parameter]:
    """List the parameters of one mixture in the order of the module."""
    count, dim, width = sizes.num_experts, sizes.dim, sizes.expert_dim
    yield Parameter(f"{prefix}.router.gate.weight", (count, dim), "router", residual)
    if sizes.score_bias:
        yield Parameter(f"{prefix}.router.expert_bias", (count,), "bias", Constant(0.0), trained=False)
    if sizes.global_balance_loss:
        yield Parameter(f"{prefix}.router.last_load", (count,), "bias", Constant(0.0), trained=False)
    share = sizes.top_k / count
    for name, shape, init in (
        ("w1", (count, width, dim), inner),
        ("w2", (count, dim, width), residual),
        ("w3", (count, width, dim), residual),
    ):
        yield Parameter(f"{prefix}.experts.{name}.weight", shape, "expert", init, active=share)
    if sizes.num_shared_experts:
        yield from swiglu(f"{prefix}.shared_experts", dim, sizes.num_shared_experts * width, inner, residual)


def swiglu(prefix: str, dim: int, width: int, inner: Normal, residual: Normal) -> Iterator[Parameter]:
    """List the parameters of a SwiGLU MLP."""
    yield Parameter(f"{prefix}.w1.weight", (width, dim), "hidden", inner)
    yield Parameter(f"{prefix}.w2.weight", (dim, width), "hidden", residual)
    yield Parameter(f"{prefix}.w3.weight", (width, dim), "hidden", residual)
