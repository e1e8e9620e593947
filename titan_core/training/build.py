"""From a config to a run that is ready to step: every part built in the order in which they need each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from titan_core.config.schema import Config
from titan_core.data.build import build_train_loader
from titan_core.data.loader import BatchLoader
from titan_core.data.tokenizer import Tokenizer, load_tokenizer
from titan_core.declare.family import Family
from titan_core.models import resolve
from titan_core.nn.loss import loss_and_slope
from titan_core.optim.build import build_optimizer
from titan_core.parallel import data_parallel
from titan_core.parallel.data_parallel import DTYPES, DataParallel
from titan_core.parallel.materialise import materialise
from titan_core.parallel.mesh import Layout, Mesh
from titan_core.parallel.parallelize import parallelize
from titan_core.quantization import convert, precompute_scales
from titan_core.runtime import determinism
from titan_core.runtime.distributed import World
from titan_core.runtime.errors import ConfigError, Problem
from titan_core.runtime.events import Listener, Note
from titan_core.tasks.causal_lm import CausalLM


@dataclass
class Parts:
    """A built run: what the trainer steps, saves and loads. The caller of the library may own the loop instead."""

    config: Config
    world: World
    mesh: Mesh
    family: Family
    sizes: Any
    seed: int
    global_batch: int
    tokenizer: Tokenizer
    model: nn.Module
    task: CausalLM
    parallel: DataParallel
    optimizer: torch.optim.Optimizer
    loader: BatchLoader
    said: list[str]

    @property
    def microbatches(self) -> int:
        """Microbatches a step and rank."""
        return self.global_batch // (self.config.training.local_batch_size * self.mesh.layout.dp)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters by the names that the family declares."""
        return dict(self.model.named_parameters())


def build(config: Config, world: World, listener: Listener, global_batch: int | None = None) -> Parts:
    """Build all parts. `global_batch` is that of a run to be resumed, where the config leaves it open."""
    layout = Layout.of(config.parallelism, world.size)
    mesh = Mesh(layout, world.device.type, world.rank)
    seed = determinism.agree_on_seed(config.training.seed)
    if config.training.deterministic:
        determinism.use_deterministic_algorithms()
    determinism.seed_all(seed, world.rank)
    family, sizes = resolve(config.model)
    tokenizer = load_tokenizer(config.model.hf_assets_path, listener)
    _check_vocabulary(tokenizer, sizes)
    rows = global_batch_size(config, layout, global_batch, listener)
    model, task, parallel, said = build_model(config, world, mesh, family, sizes, seed)
    parameters = dict(model.named_parameters())
    declared = family.parameters(sizes)
    optimizer = build_optimizer(parameters, declared, config.optimizer)
    loader = build_train_loader(
        config,
        tokenizer,
        global_batch_size=rows,
        seed=seed,
        dp_rank=mesh.dp_rank,
        dp_size=layout.dp,
        listener=listener,
    )
    return Parts(
        config, world, mesh, family, sizes, seed, rows, tokenizer, model, task, parallel, optimizer,
        loader, said,
    )  # fmt: skip


def build_model(
    config: Config, world: World, mesh: Mesh, family: Family, sizes: Any, seed: int
) -> tuple[nn.Module, CausalLM, DataParallel, list[str]]:
    """Build a model on the meta device, lay it out, and draw its weights."""
    with torch.device("meta"):
        model = family.build(sizes).to(DTYPES[config.training.dtype])
    quantized = convert(model, family.parameters(sizes), config, world.device, mesh.layout.dp_shard)
    document_masks = getattr(sizes, "attention_mask", "causal") == "block_causal"
    compiled = config.compile.enable and "loss" in config.compile.components
    inner = torch.compile(loss_and_slope, backend=config.compile.backend) if compiled else None
    task = CausalLM(model, document_masks=document_masks, inner_loss=inner)
    parallel, said = parallelize(task, family.blocks, mesh, config)
    precompute_scales(task, config)
    said = [*quantized, *said, *["compile the loss"] * compiled]
    host = torch.device("cpu") if config.training.enable_cpu_offload else world.device
    materialise(model, family.parameters(sizes), seed, host)
    data_parallel.replicate(parallel, mesh, world.device)
    return model, task, parallel, said


def global_batch_size(config: Config, layout: Layout, resumed: int | None, listener: Listener) -> int:
    """Return the sequences a step: the config's, or those of the run that is resumed, or one microbatch a rank."""
    unit = config.training.local_batch_size * layout.dp
    asked = config.training.global_batch_size
    rows = asked if asked > 0 else (resumed or unit)
    if asked <= 0 and resumed and resumed != unit:
        listener(Note(f"global batch stays {resumed} sequences, as in the run that is resumed"))
    if rows % unit:
        raise ConfigError(
            [
                Problem(
                    "training.global_batch_size",
                    f"{rows} sequences a step do not divide into {config.training.local_batch_size} "
                    f"(training.local_batch_size) x {layout.dp} data-parallel ranks",
                    tip=f"use a multiple of {unit}, or another local batch size",
                )
            ]
        )
    return rows


def _check_vocabulary(tokenizer: Tokenizer, sizes: Any) -> None:
    if tokenizer.vocab_size > sizes.vocab_size:
        raise ConfigError(
            [
                Problem(
                    "model.args.vocab_size",
                    f"the tokenizer knows {tokenizer.vocab_size} tokens, the model {sizes.vocab_size}",
                    tip=f"set `--model.args.vocab_size {-(-tokenizer.vocab_size // 64) * 64}`, "
                    "or another model.hf_assets_path",
                )
            ]
        )
