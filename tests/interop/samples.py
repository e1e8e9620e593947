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


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.2,
    "mscale": 0.5,
    "mscale_all_dim": 0.9,
}
LATENT: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 6,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 7,
    "first_k_dense_replace": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_group": 4,
    "topk_group": 2,
    "rope_parameters": YARN,
}


def deepseek_v3(**changes: Any) -> Any:
    """Sigmoid scores with a bias, which only chooses; groups by their best two; latents for queries too."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return _random(DeepseekV3ForCausalLM(DeepseekV3Config(**{**SHAPES, **LATENT, **changes})))


def deepseek_v2(**changes: Any) -> Any:
    """Softmax scores, groups by their best one."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    gate = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 4.0}
    return _random(DeepseekV2ForCausalLM(DeepseekV2Config(**{**SHAPES, **LATENT, **gate, **changes})))


def deepseek_v2_lite() -> Any:
    """Queries straight from the stream, no groups, no stretch of the rotation."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return deepseek_v2(q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1, rope_parameters=rope)


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


def llama4_with_eyes() -> Any:
    """The text model within the one that also sees."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4VisionConfig

    text = llama4_experts().config
    eyes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"vision_output_dim": 20, "projector_input_dim": 20, "projector_output_dim": 20, "image_size": 28}
    config = Llama4Config(
        vision_config=Llama4VisionConfig(**eyes, **ends, patch_size=14).to_dict(), text_config=text.to_dict()
    )
    return _random(Llama4ForConditionalGeneration(config))


def llama4_experts(**changes: Any) -> Any:
    """Every second layer is a mixture; 12 experts in one tensor."""
    experts = {"num_local_experts": 12, "intermediate_size": 14, "moe_layers": None, "interleave_moe_layer_step": 2}
    return llama4(**{**experts, "num_experts_per_tok": 1, **changes})


MODELS = {
    "deepseek_v3": deepseek_v3,
    "deepseek_v2": deepseek_v2,
    "deepseek_v2 lite": deepseek_v2_lite,
    "llama3": llama,
    "llama3 tied": llama_tied,
    "qwen3": qwen,
    "qwen3 tied": qwen_tied,
    "qwen3 experts": qwen_moe,
    "llama4": llama4,
    "llama4 scaled": llama4_scaled,
    "llama4 experts": llama4_experts,
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
    """Return gradients by the names of files, where each expert has matrices of its own; buffers have zeros."""
    found = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items() if "_bias" in name}
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
        stored = [name for name, _ in model.named_buffers() if name in model.state_dict()]
        for tensor in [*model.parameters(), *map(model.get_buffer, stored)]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return model.eval()
