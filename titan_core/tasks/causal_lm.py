"""Next-token prediction."""

from __future__ import annotations

from typing import Any, Protocol

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
        """Number of the document that each input belongs to."""
        ...


class CausalLM(nn.Module):
    """A language model together with its loss. A loss is a sum and a weight; only the trainer divides."""

    def __init__(self, model: nn.Module, *, document_masks: bool, inner_loss: LossAndSlope | None = None) -> None:
        super().__init__()
        self.model: Any = model  # any module with `hidden(tokens, mask)` and `head_weight`
        self.document_masks = document_masks
        self.inner_loss = inner_loss

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the sum of the cross-entropies (nats) of all counted labels, fp32 scalar."""
        hidden_BTD = self.model.hidden(batch.tokens, self.mask(batch))
        labels_N = batch.labels.flatten()
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), self.model.head_weight, labels_N, self.inner_loss)

    def mask(self, batch: TokenBatch) -> Mask:
        """Return who may attend to whom."""
        return document_mask(batch.documents) if self.document_masks else CAUSAL

    @staticmethod
    def weight(batch: TokenBatch) -> Tensor:
        """Return the number of labels that count, int64 scalar on the batch's device."""
        return (batch.labels != -100).sum()
