"""DeepSeek-V3 and V2 (DeepSeek 2024): a pre-norm decoder with latent attention; all but the first layers are mixtures
of experts."""

from __future__ import annotations

from titan_core.models.deepseek_v3.flavors import DeepSeekSizes
from titan_core.nn.decoder import Decoder
from titan_core.nn.latent_attention import LatentAttention


class DeepSeekV3(Decoder):
    """Every layer attends alike."""

    def __init__(self, sizes: DeepSeekSizes) -> None:
        super().__init__(sizes, lambda layer: LatentAttention(sizes))
