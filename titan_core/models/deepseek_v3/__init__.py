"""DeepSeek-V2 and V3: multi-head latent attention, mixtures of experts, multi-token prediction."""

import dataclasses

from titan_core.declare import decoder
from titan_core.declare.family import Family, lazily
from titan_core.models.deepseek_v3.flavors import FLAVORS, attentions, parameters
from titan_core.models.deepseek_v3.weights import WEIGHTS

_ATTENTION = "layers.*.attention"
_SHARDING = dataclasses.replace(
    decoder.SHARDING,
    columns=(*decoder.SHARDING.columns, f"{_ATTENTION}.wq_b", f"{_ATTENTION}.wkv_b"),
    closing=(*decoder.SHARDING.closing, "mtp.*.norm"),
    resuming=("mtp.*.hidden_norm",),
    last=(*decoder.SHARDING.last, "mtp.*"),
)

FAMILY = Family(
    name="deepseek_v3",
    flavors=FLAVORS,
    parameters=parameters,
    attentions=attentions,
    build=lazily("titan_core.models.deepseek_v3.model", "DeepSeekV3"),
    blocks=(*decoder.BLOCKS, "mtp.*"),
    sharding=_SHARDING.again("layers.*", "mtp.*.block"),
    weights=WEIGHTS,
    in_use=lambda sizes: dataclasses.replace(sizes, num_mtp_layers=0),
)
