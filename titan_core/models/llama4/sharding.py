"""Llama 4: where the model can be split."""

from titan_core.declare.sharding import Sharding

SHARDING = Sharding(
    embeddings=("tok_embeddings",),
    columns=(
        "layers.*.attention.wq",
        "layers.*.attention.wk",
        "layers.*.attention.wv",
        "layers.*.feed_forward.w1",
        "layers.*.feed_forward.w3",
        "output",
    ),
    rows=("layers.*.attention.wo", "layers.*.feed_forward.w2"),
    regions=("layers.*.attention", "layers.*.feed_forward"),
    closing=("norm",),
    attentions=("layers.*.attention.attend",),
    first=("tok_embeddings",),
    last=("norm", "output"),
)
