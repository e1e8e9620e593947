"""Next-token prediction."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titan_core.nn.attention import CAUSAL, Mask, document_mask
from titan_core.nn.loss import LossAndSlope, linear_cross_entropy


class TokenBatch(Protocol):
    """Rows of tokens with what should follow them: (B, T) each, labels -100 where nothing counts."""

    @property
    def tokens(self) -> Tensor:
        """Inputs."""
        ...

    @property
    def labels(self) -> Tensor:
        """What should follow each input."""
        ...

    @property
    def documents(self) -> Tensor:
        """Number of the document that each token of the whole rows belongs to."""
        ...

    @property
    def positions(self) -> Tensor | None:
        """Positions of the inputs in their rows; None: all, in order."""
        ...

    @property
    def queries(self) -> Tensor | None:
        """Positions that a mask is for; None: all, in order."""
        ...


class CausalLM(nn.Module):
    """A language model together with its loss. A loss is a sum and a weight; only the trainer divides.

    `hidden` and `loss` are the two halves of `forward`: a pipeline's stages run the first on pieces of the model, and
    its last stage the second.
    """

    def __init__(self, model: nn.Module, *, document_masks: bool, inner_loss: LossAndSlope | None = None) -> None:
        super().__init__()
        self.model: Any = model  # any module with `hidden(tokens, positions, mask)` and `head_weight`
        self.document_masks = document_masks
        self.inner_loss = inner_loss
        self.backward_twice = False  # may the loss be asked twice for its gradients?

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the sum of the cross-entropies (nats) of all counted labels, fp32 scalar."""
        return self.loss(self.hidden(batch.tokens, batch), batch)

    def hidden(self, x: Tensor, batch: TokenBatch) -> Tensor:
        """Run the model, or a piece of it, on tokens (B, T) or on what the piece before it gave, (B, T, D)."""
        positions = batch.positions
        if positions is None:
            positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
        return self.model.hidden(x, positions, self.mask(batch))

    def loss(self, hidden_BTD: Tensor, batch: TokenBatch) -> Tensor:
        """Return the sum of the cross-entropies (nats) of all counted labels, fp32 scalar."""
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.model.head_weight,
            batch.labels.flatten(),
            self.inner_loss,
            backward_twice=self.backward_twice,
        )

    def mask(self, batch: TokenBatch) -> Mask:
        """Return who may attend to whom."""
        if not self.document_masks:
            return CAUSAL
        queries = batch.queries
        if queries is None:
            queries = torch.arange(batch.documents.shape[1], device=batch.documents.device)
        return document_mask(batch.documents, queries)

    @staticmethod
    def weight(batch: TokenBatch) -> Tensor:
        """Return the number of labels that count, int64 scalar on the batch's device."""
        return (batch.labels != -100).sum()
