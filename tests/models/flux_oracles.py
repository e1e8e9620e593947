"""Tiny diffusers models with random numbers: the oracles of Flux and its autoencoder."""

from __future__ import annotations

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
