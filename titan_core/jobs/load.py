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
from titan_core.interop.loading import fill
from titan_core.jobs import foreign
from titan_core.models import family, sizes_from_dict
from titan_core.nn.layers import set_parameter_dtype
from titan_core.parallel.materialise import stored_buffers
from titan_core.runtime import distributed
from titan_core.runtime.errors import CheckpointError, DataError, UsageError


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
    """Load a model, ready to call: tokens (B, T) -> logits. `path` is a run, checkpoint or step folder, a Hugging
    Face folder, or a folder of Meta's.

    `device` defaults to a GPU where there is one; `dtype` to bf16 on a GPU and fp32 on a CPU. Raises `CheckpointError`.
    """
    return load_trained(path, device=device, dtype=dtype).model


def load_language(path: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Trained:
    """Load a language model; see `load`. Raises `UsageError` for what is none."""
    trained = load_trained(path, device=device, dtype=dtype)
    if trained.family.task != "causal_lm":
        raise UsageError(f"{trained.path} is a {trained.family.name}, not a language model")
    return trained


def load_trained(path: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Trained:
    """Load a model with its sizes and tokenizer, but without what only its training needs; see `load`."""
    if foreign.kind_of(str(path)) != "dcp":
        return _load_foreign(str(path), device, dtype)
    step_path = find_step(str(path))
    shared = read_shared(step_path)
    chosen, trained = model_of(shared, step_path)
    sizes = chosen.in_use(trained)
    model = _empty(chosen, sizes, device, dtype)
    load_tensors(step_path, _tensors(model), strict=sizes == trained)
    return Trained(model, chosen, sizes, tokenizer_of(step_path, shared), step_path, shared)


def _load_foreign(path: str, device: str | torch.device | None, dtype: torch.dtype | None) -> Trained:
    """Load weights that are not titan's own; they are read region by region into the model."""
    opened = foreign.open_weights(path)
    chosen = opened.known_family()
    sizes = chosen.in_use(opened.sizes)
    model = _empty(chosen, sizes, device, dtype)
    fill(opened.ours, _tensors(model))
    try:
        tokenizer = load_tokenizer(path)
    except DataError:
        tokenizer = load_tokenizer("")  # weights alone can be called with tokens
    return Trained(model, chosen, sizes, tokenizer, path, foreign.shared_of(opened))


def _empty(chosen: Family, sizes: Any, device: str | torch.device | None, dtype: torch.dtype | None) -> nn.Module:
    """Build a model with room for its weights, for use without gradients."""
    target = torch.device(distributed.check_device(str(device or distributed.default_device_type()), numbered=True))
    dtype = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
    with torch.device("meta"):
        model = chosen.build(sizes)
        set_parameter_dtype(model, dtype)
    model.to_empty(device=target)
    for buffer in model.buffers():
        buffer.zero_()
    return model.eval().requires_grad_(False)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | stored_buffers(model)


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
