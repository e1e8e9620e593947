"""Runs of language models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from titan_core.config.schema import Config
from titan_core.data.build import build_train_loader, build_validation_slice
from titan_core.data.loader import Batch, BatchLoader
from titan_core.data.tokenizer import Tokenizer, load_tokenizer
from titan_core.nn.loss import LossAndSlope, loss_and_slope
from titan_core.parallel.mesh import Mesh
from titan_core.parallel.stages import may_split
from titan_core.parallel.tensor import loss_over_parts
from titan_core.runtime.errors import ConfigError, Problem
from titan_core.runtime.events import Listener
from titan_core.tasks.causal_lm import CausalLM, ahead

if TYPE_CHECKING:
    from titan_core.training.build import Parts


class Language:
    """Tokens in rows; nothing is made of them before the model."""

    def __init__(self, config: Config, sizes: Any) -> None:
        self.config, self.sizes = config, sizes
        self.mtp_layers: int = getattr(sizes, "num_mtp_layers", 0)
        self.tokenizer: Tokenizer | None = None
        self.seed = 0

    def tasks(self, mesh: Mesh) -> tuple[Callable[[nn.Module, bool], nn.Module], list[str]]:
        """Return what makes a task of a model."""
        inner, said = self._inner_loss(mesh)
        masks = getattr(self.sizes, "attention_mask", "causal") == "block_causal"
        twice = may_split(self.config.parallelism) and not self.mtp_layers  # with which no backward is split
        weight = self.config.training.mtp_loss_weight

        def make(model: nn.Module, staged: bool) -> nn.Module:
            task = CausalLM(model, document_masks=masks, inner_loss=inner)
            task.backward_twice = staged and twice
            if self.mtp_layers:
                task.look_ahead(self.mtp_layers, weight)
            return task

        return make, said

    def _inner_loss(self, mesh: Mesh) -> tuple[LossAndSlope | None, list[str]]:
        """Return the loss of a few rows of logits, where it is another than the plain one: compiled, or over parts of
        the vocabulary; and words about it."""
        config, inner = self.config, None
        if mesh.layout.tp > 1:
            inner = loss_over_parts(self.sizes.vocab_size, mesh.tp, gather=config.parallelism.disable_loss_parallel)
        if config.compile.enable and "loss" in config.compile.components:
            return torch.compile(inner or loss_and_slope, backend=config.compile.backend), ["compile the loss"]
        return inner, []

    def blank(self, rows: int) -> Batch:
        """Return a batch of zeros."""
        shape = rows, self.config.training.seq_len
        tokens = torch.zeros(shape, dtype=torch.int64)
        return self.prepare(Batch(tokens, tokens.clone(), torch.zeros(shape, dtype=torch.int32)))

    def open(self, mesh: Mesh, device: torch.device, seed: int, listener: Listener) -> None:
        """Load the tokenizer; it must fit the model's vocabulary."""
        self.seed = seed
        self.tokenizer = load_tokenizer(self.config.model.hf_assets_path, listener)
        if self.tokenizer.vocab_size > self.sizes.vocab_size:
            message = f"the tokenizer knows {self.tokenizer.vocab_size} tokens, the model {self.sizes.vocab_size}"
            tip = f"set `--model.args.vocab_size {-(-self.tokenizer.vocab_size // 64) * 64}`, "
            tip += "or another model.hf_assets_path"
            raise ConfigError([Problem("model.args.vocab_size", message, tip=tip)])

    def files(self) -> Mapping[str, bytes]:
        """Return the tokenizer's files."""
        assert self.tokenizer is not None
        return {f"tokenizer/{name}": content for name, content in self.tokenizer.files().items()}

    def loader(self, mesh: Mesh, rows: int, listener: Listener) -> BatchLoader:
        """Return the training loader of this rank."""
        assert self.tokenizer is not None
        return build_train_loader(
            self.config,
            self.tokenizer,
            global_batch_size=rows,
            seed=self.seed,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.layout.dp,
            listener=listener,
        )

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch, with what layers of multi-token prediction want of it: here rows are still whole."""
        if not self.mtp_layers:
            return batch
        told, wanted = ahead(batch.tokens, batch.labels, batch.documents, self.mtp_layers)
        return dataclasses.replace(batch, tokens_ahead=told, labels_ahead=wanted)

    def validation(self, mesh: Mesh, listener: Listener) -> Iterable[Batch]:
        """Return the validation slice."""
        assert self.tokenizer is not None
        return build_validation_slice(
            self.config, self.tokenizer, dp_rank=mesh.dp_rank, dp_size=mesh.layout.dp, listener=listener
        )

    def for_validation(self, batch: Batch) -> Iterable[Batch]:
        """Return the batch as training has it."""
        return (self.prepare(batch),)

    def mean_loss(self, sums: list[float], weights: list[float]) -> tuple[float, float, Mapping[str, float]]:
        """Return the loss of the next token; the parts are those of the further tokens, named as in training."""
        loss, *ahead = (s / max(w, 1.0) for s, w in zip(sums, weights, strict=True))
        return loss, weights[0], {f"mtp/loss_{layer + 1}": mean for layer, mean in enumerate(ahead)}

    def show(self, parts: Parts, step: int, listener: Listener) -> None:
        """There is nothing to show."""
