"""Tiny diffusers models with random numbers: the oracles of Flux and its autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

GUIDED: dict[str, Any] = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
    "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
}  # fmt: skip


def transformer(**changes: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    return randomised(FluxTransformer2DModel(**{**GUIDED, **changes}), 0.1)


def autoencoder(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return randomised(AutoencoderKL(**{**AUTOENCODER, **changes}), 0.1)


def randomised(model: Any, std: float) -> Any:
    """Give every parameter random numbers: gates that start at zero would hide what lies behind them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def save_pipeline(folder: Path) -> Path:
    """Save a whole pipeline of diffusers with tiny random parts, as users have it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=24, d_ff=32, d_kv=8, num_layers=1, num_heads=2))
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=64, hidden_size=20, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ))  # fmt: skip
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=autoencoder(),
        text_encoder=randomised(clip, 0.2), tokenizer=_tokenizer("clip"),
        text_encoder_2=randomised(t5, 0.2), tokenizer_2=_tokenizer("t5"),
        transformer=transformer(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _tokenizer(kind: str) -> Any:
    """A tokenizer of single letters, which needs no file."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz "]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>" if kind == "clip" else "$A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=77
    )
