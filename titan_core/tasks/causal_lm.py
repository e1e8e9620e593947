"""Next-token prediction, and that of further tokens beside it.

Shape letters: B batch, T tokens, K layers of multi-token prediction, D model width, V vocabulary, P parts of the loss.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from titan_core.nn.attention import CAUSAL, Mask, document_mask
from titan_core.nn.loss import IGNORE, LossAndSlope, linear_cross_entropy


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

    @property
    def tokens_ahead(self) -> Tensor | None:
        """What layers of multi-token prediction are told, (B, T, K); None: they do not take part."""
        ...

    @property
    def labels_ahead(self) -> Tensor | None:
        """What they should predict, (B, T, K)."""
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
        self.factors = {"loss": 1.0}

    def look_ahead(self, layers: int, weight: float) -> None:
        """Train layers of multi-token prediction too: the mean of their losses has a weight (DeepSeek-V3, eq. 25)."""
        self.factors |= {f"mtp/loss_{layer + 1}": weight / layers for layer in range(layers)}

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the sum of the cross-entropies (nats) of all counted labels, fp32: a scalar, or (P) in the order of
        `factors` where the batch looks ahead."""
        return self.loss(self.hidden(batch.tokens, batch), batch)

    def hidden(self, x: Tensor, batch: TokenBatch) -> Tensor:
        """Run the model, or a piece of it, on tokens (B, T) or on what the piece before it gave, (B, T, D)."""
        return self.model.hidden(x, _positions(batch), self.mask(batch))

    def loss(self, hidden_BTD: Tensor, batch: TokenBatch) -> Tensor:
        """Return what `forward` does, for what the model made of the tokens."""
        loss = self._cross_entropy(hidden_BTD, batch.labels)
        if batch.tokens_ahead is None or batch.labels_ahead is None:
            return loss
        losses, positions, mask = [loss], _positions(batch), self.mask(batch)
        told_and_wanted = zip(batch.tokens_ahead.unbind(-1), batch.labels_ahead.unbind(-1), strict=True)
        for layer, (tokens_BT, labels_BT) in enumerate(told_and_wanted):
            hidden_BTD = self.model.ahead(layer, hidden_BTD, tokens_BT, positions, mask)
            losses.append(self._cross_entropy(hidden_BTD, labels_BT))
        return torch.stack(losses)

    def _cross_entropy(self, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1),
            self.model.head_weight,
            labels_BT.flatten(),
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
        """Return the number of labels that count, int64 on the batch's device, in the shape of the loss."""
        weight = (batch.labels != IGNORE).sum()
        if batch.labels_ahead is None:
            return weight
        return torch.cat((weight[None], (batch.labels_ahead != IGNORE).sum((0, 1))))


def _positions(batch: TokenBatch) -> Tensor:
    if batch.positions is not None:
        return batch.positions
    return torch.arange(batch.tokens.shape[1], device=batch.tokens.device)


def ahead(tokens_BT: Tensor, labels_BT: Tensor, documents_BT: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """Return what so many layers of multi-token prediction are told at each token, and what they should predict,
    (B, T, K) each.

    The k-th is told the token k places ahead, and predicts the one after it. Nothing counts where that is of another
    document, or beyond the row, where its document is not known; and where the token to be told is, the layer is told
    the present one again: what it makes of it counts for nothing.
    """
    told, wanted = [], []
    for places in range(1, layers + 1):
        same_BT = _shifted(documents_BT, places, -2) == documents_BT
        told.append(_shifted(tokens_BT, places, 0).where(same_BT, tokens_BT))
        same_BT = _shifted(documents_BT, places + 1, -2) == documents_BT
        wanted.append(_shifted(labels_BT, places, IGNORE).where(same_BT, IGNORE))
    return torch.stack(told, -1), torch.stack(wanted, -1)


def _shifted(x_BT: Tensor, places: int, beyond: int) -> Tensor:
    out_BT = torch.full_like(x_BT, beyond)
    out_BT[:, :-places] = x_BT[:, places:]
    return out_BT
