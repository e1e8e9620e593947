"""Mixture of experts: a router, routed experts, shared experts.

Shape letters: B batch, T tokens, N = B T, D model width, E experts, K experts of a token, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_core.nn.experts import Experts
from titan_core.nn.layers import Linear, SwiGLU


class MoE(nn.Module):
    """Each token visits K of E experts, and all shared ones. `sizes` has the fields of `ExpertSizes`."""

    def __init__(self, sizes: Any) -> None:
        super().__init__()
        self.router = Router(sizes)
        self.experts = Experts(sizes.num_experts, sizes.dim, sizes.expert_dim)
        shared = sizes.num_shared_experts * sizes.expert_dim
        self.shared_experts = SwiGLU(sizes.dim, shared) if shared else None
        self.score_before = sizes.score_before_experts

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        chosen_NK, weights_NK = self.router(x_BTD)
        x_ND = x_BTD.flatten(0, 1)
        if self.score_before:
            y_ND = self.experts(*_one_token_a_choice(x_ND, chosen_NK, weights_NK), None)
            y_ND = y_ND.unflatten(0, chosen_NK.shape).sum(1)
        else:
            y_ND = self.experts(x_ND, chosen_NK, weights_NK)
        y_BTD = y_ND.view(x_BTD.shape)
        return y_BTD if self.shared_experts is None else y_BTD + self.shared_experts(x_BTD)


def _one_token_a_choice(x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token as often as it has experts, weighed for each (N K, D), and the experts (N K, 1)."""
    x_NKD = (x_ND.unsqueeze(1) * weights_NK.unsqueeze(-1)).to(x_ND.dtype)
    return x_NKD.flatten(0, 1), chosen_NK.reshape(-1, 1)


class Router(nn.Module):
    """Scores experts in fp32 and chooses K for each token.

    In training, until somebody reads and clears them, `tally_E` counts choices, and `penalties` adds up the losses of
    balance (of sequences, and the global one). `penalty_scale` is what these are multiplied with where they join the
    gradients: who trains sets it, as only that one knows what a loss is divided by.
    `evenly` deals tokens to experts in turn, whatever the scores.
    """

    expert_bias: Tensor
    last_load: Tensor
    tally_E: Tensor
    penalties: Tensor

    def __init__(self, sizes: Any) -> None:
        super().__init__()
        self.sizes = sizes
        self.gate = Linear(sizes.dim, sizes.num_experts)
        self.load = Load(sizes.num_experts)
        if sizes.score_bias:
            self.register_buffer("expert_bias", torch.zeros(sizes.num_experts, dtype=torch.float32))
        if sizes.global_balance_loss:
            self.register_buffer("last_load", torch.zeros(sizes.num_experts, dtype=torch.float32))
        self.register_buffer("tally_E", torch.zeros(sizes.num_experts, dtype=torch.float32), persistent=False)
        self.register_buffer("penalties", torch.zeros(2, dtype=torch.float32), persistent=False)
        self.penalty_scale = 0.0
        self.evenly = False

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts of each token (N, K) and their weights (N, K), fp32."""
        sizes = self.sizes
        weight = self.gate.weight.to(x_BTD.dtype)  # rounded as every layout that computes in this dtype rounds it
        logits_NE = F.linear(x_BTD.flatten(0, 1).float(), weight.float())
        scores_NE = logits_NE.softmax(-1) if sizes.score == "softmax" else logits_NE.sigmoid()
        chosen_NK = self._choose(scores_NE.detach())
        weights_NK = scores_NE.gather(1, chosen_NK)
        if sizes.normalise_scores and sizes.top_k > 1:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        weights_NK = weights_NK * sizes.route_scale
        if self.training and torch.is_grad_enabled():
            load_BE = self.load(chosen_NK.view(*x_BTD.shape[:2], -1), self.tally_E)
            if self.penalty_scale and (sizes.sequence_balance_loss or sizes.global_balance_loss):
                both = self._penalties(scores_NE.view(*x_BTD.shape[:2], -1), load_BE)
                tally(self.penalties, both.detach()[None])
                weights_NK = Join.apply(weights_NK, both.sum(), self.penalty_scale)
        return chosen_NK, weights_NK

    def _choose(self, scores_NE: Tensor) -> Tensor:
        sizes = self.sizes
        if self.evenly:
            slots = torch.arange(scores_NE.shape[0] * sizes.top_k, device=scores_NE.device)
            return (slots % sizes.num_experts).view(-1, sizes.top_k)
        if sizes.score_bias:
            scores_NE = scores_NE + self.expert_bias
        if sizes.num_groups > 1:
            scores_NE = _within_best_groups(scores_NE, sizes.num_groups, sizes.top_groups, sizes.group_score)
        return scores_NE.topk(sizes.top_k, dim=-1, sorted=False).indices

    def _penalties(self, scores_BTE: Tensor, load_BE: Tensor) -> Tensor:
        """Return the weighed sums over sequences of `E / K sum_e f_e P_e` (2): f the share of choices that fell on an
        expert in the sequence, and that in all of the last step; P the mean of its share of the scores (DeepSeek-V3,
        eq. 17 to 20)."""
        sizes = self.sizes
        shares_BTE = scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)
        tokens_B1 = load_BE.sum(-1, keepdim=True) / sizes.top_k  # of whole sequences, wherever their parts are
        mean_BE = shares_BTE.sum(1) / tokens_B1
        sums = [sizes.sequence_balance_loss * (load_BE / tokens_B1 * mean_BE).sum(), mean_BE.new_zeros(())]
        if sizes.global_balance_loss:
            last_E = sizes.top_k * self.last_load / self.last_load.sum().clamp(min=1)
            sums[1] = sizes.global_balance_loss * (last_E * mean_BE).sum()
        return torch.stack(sums) * (sizes.num_experts / sizes.top_k)


def _within_best_groups(scores_NE: Tensor, groups: int, best: int, by: str) -> Tensor:
    """Hide all experts but those of each token's best groups."""
    scores_NGE = scores_NE.unflatten(-1, (groups, -1))
    merit_NG = scores_NGE.amax(-1) if by == "max" else scores_NGE.topk(2, dim=-1).values.sum(-1)
    kept = merit_NG.topk(best, dim=-1, sorted=False).indices
    hidden_NG = torch.ones_like(merit_NG, dtype=torch.bool).scatter_(1, kept, False)
    return scores_NGE.masked_fill(hidden_NG.unsqueeze(-1), float("-inf")).flatten(1)


class Load(nn.Module):
    """Counts choices: a place in a model where those of other parts of the same sequences can be added."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, chosen_BTK: Tensor, tally_E: Tensor) -> Tensor:
        """Return how many choices of each sequence fell on each expert (B, E), fp32, and add them all to `tally_E`."""
        flat_BN = chosen_BTK.flatten(1)
        load_BE = torch.zeros(flat_BN.shape[0], self.num_experts, device=flat_BN.device)
        load_BE = load_BE.scatter_add(1, flat_BN, torch.ones_like(flat_BN, dtype=torch.float32))
        tally(tally_E, load_BE)
        return load_BE


@torch.library.custom_op("titan::tally", mutates_args=("counts_E",))
def tally(counts_E: Tensor, more_BE: Tensor) -> None:
    """Add to counts; not while a forward is recomputed in a backward, which has counted already."""
    if torch._C._current_graph_task_id() == -1:
        counts_E += more_BE.sum(0)


@tally.register_fake
def _(counts_E: Tensor, more_BE: Tensor) -> None:
    pass


class Join(torch.autograd.Function):
    """Lets the gradient of a scaled penalty join where a tensor passes."""

    @staticmethod
    def forward(ctx, x: Tensor, penalty: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(penalty)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (penalty,) = ctx.saved_tensors
        return grad, torch.full_like(penalty, ctx.scale), None
