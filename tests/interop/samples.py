"""Tiny transformers models with random numbers, saved as users' checkpoints are; the oracle of every conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from titan_core.checkpoint.streaming import StepSource
from titan_core.interop.boxes import Source, read_whole

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# 3 heads of 6 over 3 groups, and widths that no number of ranks divides
SHAPES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _random(LlamaForCausalLM(LlamaConfig(**{**SHAPES, "rope_parameters": LLAMA3_ROPE, **changes})))


def llama_tied() -> Any:
    return llama(tie_word_embeddings=True)


def qwen(**changes: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    return _random(Qwen3ForCausalLM(Qwen3Config(**{**SHAPES, "head_dim": 10, "rope_parameters": rope, **changes})))


def qwen_tied() -> Any:
    return qwen(tie_word_embeddings=True)


def qwen_moe(**changes: Any) -> Any:
    """12 experts: their numbers sort otherwise as text."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    experts = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "norm_topk_prob": True}
    sizes = {**SHAPES, "head_dim": 10, "rope_parameters": rope, **experts, **changes}
    return _random(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)))


def llama4(**changes: Any) -> Any:
    """Dense layers; chunks of 7 tokens; the global layer's sharpening changes every 5 tokens."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    dense = {"moe_layers": [], "intermediate_size_mlp": 50, "head_dim": 6, "num_hidden_layers": 5}
    local = {"attention_chunk_size": 7, "floor_scale": 5, "attn_scale": 0.4}
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    return _random(
        Llama4ForCausalLM(Llama4TextConfig(**{**SHAPES, **dense, **local, "rope_parameters": rope, **changes}))
    )


def llama4_scaled() -> Any:
    """The published rotation: all wavelengths beyond the original length are stretched, none is blended."""
    stretch = {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 32}
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **stretch}
    return llama4(rope_parameters=rope, use_qk_norm=False, attn_temperature_tuning=False)


MODELS = {
    "llama3": llama,
    "llama3 tied": llama_tied,
    "qwen3": qwen,
    "qwen3 tied": qwen_tied,
    "qwen3 experts": qwen_moe,
    "llama4": llama4,
    "llama4 scaled": llama4_scaled,
}


def save(name: str, folder: Path, max_shard_size: str = "20KB") -> Any:
    """Save a model in several files and return it."""
    model = MODELS[name]()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read all safetensors files of a folder with the library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def step_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return tensors(StepSource(str(folder / "step-0")))


def tensors(source: Source) -> dict[str, torch.Tensor]:
    return {name: read_whole(source, name) for name in source.index}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes and bits."""
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return gradients by the names of files, where each expert has matrices of its own."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        prefix, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj") or not prefix.endswith("mlp.experts"):
            found[name] = parameter.grad
            continue
        for expert, matrix in enumerate(parameter.grad):
            parts = matrix.chunk(2) if last == "gate_up_proj" else (matrix,)
            names = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
            found.update({f"{prefix}.{expert}.{n}.weight": part for n, part in zip(names, parts, strict=True)})
    return found


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _random(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()
