"""A trained model as a module to call: `titan_core.load(path)(tokens)` gives logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from titan_core.checkpoint import find_step, load_tensors, read_shared
from titan_core.checkpoint.inspect import read_file
from titan_core.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_files
from titan_core.declare.family import Family
from titan_core.models import family, sizes_from_dict
from titan_core.runtime import distributed
from titan_core.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Trained:
    """A model with what it takes to use it."""

    model: nn.Module
    family: Family
    sizes: Any
    tokenizer: Tokenizer
    path: str
    shared: dict[str, Any]


def load(path: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """Load the model of a run folder, a checkpoint folder or a step folder, ready to call: tokens (B, T) -> logits.

    `device` defaults to a GPU where there is one; `dtype` to bf16 on a GPU and fp32 on a CPU. Raises `CheckpointError`.
    """
    return load_trained(path, device=device, dtype=dtype).model


def load_trained(path: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Trained:
    """Load a model with its sizes and tokenizer; see `load`."""
    step_path = find_step(str(path))
    shared = read_shared(step_path)
    chosen, sizes = model_of(shared, step_path)
    target = torch.device(device or distributed.default_device_type())
    dtype = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
    with torch.device("meta"):
        model = chosen.build(sizes).to(dtype)
    model.to_empty(device=target)
    load_tensors(step_path, dict(model.named_parameters()) | dict(model.named_buffers()))
    model.eval().requires_grad_(False)
    return Trained(model, chosen, sizes, tokenizer_of(step_path, shared), step_path, shared)


def model_of(shared: dict[str, Any], step_path: str) -> tuple[Family, Any]:
    """Return the family and sizes that a checkpoint recorded."""
    try:
        chosen = family(shared["model"]["family"])
        return chosen, sizes_from_dict(chosen, shared["model"]["sizes"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint does not say which model it is: {error}", where=step_path) from error


def tokenizer_of(step_path: str, shared: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that lies in a checkpoint, or else the one that its config names."""
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: read_file(step_path, f"tokenizer/{name}") for name in names}
    if all(files.values()):
        return tokenizer_from_files({name: content for name, content in files.items() if content})
    return load_tokenizer(shared["config"]["model"]["hf_assets_path"])
