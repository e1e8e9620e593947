"""From the meta device to memory."""

import torch

from titan_core.models import family
from titan_core.parallel.materialise import materialise


def test_buffers_are_where_the_computation_is() -> None:
    qwen = family("qwen3")
    sizes = type(qwen.flavors["debugmodel_moe"])(
        dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, ffn_dim=16, vocab_size=32, num_experts=4, expert_dim=8
    )
    with torch.device("meta"):
        model = qwen.build(sizes)
    host, device = torch.device("cpu"), torch.device("meta")  # which stands for a GPU here
    materialise(model, qwen.parameters(sizes), 0, host, buffers_on=device)
    assert {p.device for p in model.parameters()} == {host}
    assert {b.device for b in model.buffers()} == {device}
    materialise(model, qwen.parameters(sizes), 0, host)
    assert {b.device for b in model.buffers()} == {host}
