"""Counts of parameters and FLOPs against published numbers and closed forms."""

import dataclasses
from typing import Any

import pytest

from titan_core.declare.parameters import Attention, Normal, Parameter
from titan_core.estimation.flops import count_parameters, flops_per_token
from titan_core.models import family

LLAMA = family("llama3")


@pytest.mark.parametrize(
    ("flavor", "parameters", "flops"),
    [
        ("debugmodel", 6_163_712, 1.848e8),
        ("8B", 8_030_261_248, 5.791e10),
        ("70B", 70_553_706_496, 4.814e11),
        ("405B", 405_853_388_800, 2.625e12),
    ],
)
def test_llama3_counts(flavor: str, parameters: int, flops: float) -> None:
    sizes = LLAMA.flavors[flavor]
    assert count_parameters(LLAMA.parameters(sizes)).total == parameters
    found = flops_per_token(LLAMA.parameters(sizes), LLAMA.attentions(sizes), 8192)
    assert found == pytest.approx(flops, rel=1e-3)


def test_tied_head_counts_once_and_computes() -> None:
    tied, free = (LLAMA.parameters(LLAMA.sizes("debugmodel", tied=t)) for t in (True, False))
    assert count_parameters(free).total - count_parameters(tied).total == 256 * 2048
    assert flops_per_token(tied, (), 1) == flops_per_token(free, (), 1)


def test_causal_attention_counts_the_keys_that_are_seen() -> None:
    one = (Attention(num_heads=3, num_kv_heads=1, qk_dim=5, v_dim=7),)
    pairs = sum(t + 1 for t in range(16)) / 16
    assert flops_per_token((), one, 16, causal=True) == 6 * pairs * 3 * 12
    assert flops_per_token((), one, 16) == 6 * 16 * 3 * 12
    window = (Attention(3, 1, 5, 7, window=4),)
    pairs = sum(min(t + 1, 4) for t in range(16)) / 16
    assert flops_per_token((), window, 16, causal=True) == 6 * pairs * 3 * 12


@pytest.mark.parametrize(("seq_len", "full", "causal"), [(4096, 51.5e9, 48.2e9), (8192, 57.9e9, 51.5e9)])
def test_both_conventions_for_llama3_8b(seq_len: int, full: float, causal: float) -> None:
    """The causal numbers are those with which NVIDIA's tokens/s and TFLOP/s agree."""
    table, layers = LLAMA.parameters(LLAMA.flavors["8B"]), LLAMA.attentions(LLAMA.flavors["8B"])
    assert flops_per_token(table, layers, seq_len) == pytest.approx(full, rel=2e-3)
    assert flops_per_token(table, layers, seq_len, causal=True) == pytest.approx(causal, rel=2e-3)


def test_heads_wider_than_the_model() -> None:
    """28 layers of 16 heads of width 128 in a model of width 1024: 12 L d T would count half."""
    layers = (Attention(num_heads=16, num_kv_heads=8, qk_dim=128, v_dim=128),) * 28
    assert flops_per_token((), layers, 8192) == 12 * 28 * (16 * 128) * 8192


def test_latent_attention_has_two_widths() -> None:
    assert flops_per_token((), (Attention(16, 16, qk_dim=192, v_dim=128),), 4096) == 6 * 4096 * 16 * (192 + 128)


@pytest.mark.parametrize(
    ("name", "flavor", "active", "layers", "heads", "widths"),
    [
        ("deepseek_v3", "16B", 2_661_150_208, 27, 16, 192 + 128),
        ("deepseek_v3", "236B", 21_375_800_320, 60, 128, 192 + 128),
        ("deepseek_v3", "671B", 37_552_282_624, 61, 128, 192 + 128),
        ("qwen3", "30B-A3B", 3_353_032_704, 48, 32, 128 + 128),
        ("qwen3", "235B-A22B", 22_190_763_520, 94, 64, 128 + 128),
        ("llama4", "17bx128e", 17_184_691_200, 48, 40, 128 + 128),
    ],
)
def test_published_mixtures(name: str, flavor: str, active: int, layers: int, heads: int, widths: int) -> None:
    """What one token uses, with the embedding, is known of these models; attention has its closed form."""
    known = family(name)
    sizes = known.in_use(known.flavors[flavor])
    parameters = [p for p in known.parameters(sizes) if p.trained]
    assert sum(round(p.numel * p.active) for p in parameters) == active
    closed = 6 * (active - sizes.vocab_size * sizes.dim) + 6 * 4096 * layers * heads * widths
    assert flops_per_token(known.parameters(sizes), known.attentions(sizes), 4096) == pytest.approx(closed, rel=1e-9)


def test_a_layer_that_predicts_a_further_token_costs_a_layer_a_projection_and_a_head() -> None:
    known = family("deepseek_v3")
    with_one = known.flavors["671B"]
    without = known.in_use(with_one)

    def flops(sizes: Any) -> float:
        return flops_per_token(known.parameters(sizes), known.attentions(sizes), 4096)

    shallower = dataclasses.replace(without, n_layers=60)
    layer = flops(without) - flops(shallower)
    dim, norms = with_one.dim, 3 * with_one.dim
    more = layer + 6 * (dim * 2 * dim + dim * with_one.vocab_size + norms)
    assert flops(with_one) == pytest.approx(flops(without) + more, rel=1e-9)


@pytest.mark.parametrize("window", [1, 5, 16, 99])
def test_windows_count_every_pair(window: int) -> None:
    pairs = sum(1 for q in range(16) for k in range(16) if 0 <= q - k < window)
    found = flops_per_token((), (Attention(2, 2, 4, 4, window=window),), 16, causal=True)
    assert found == pytest.approx(6 * pairs / 16 * 2 * 8)


def test_counts_by_role_add_up() -> None:
    sizes = LLAMA.flavors["8B"]
    counts = count_parameters(LLAMA.parameters(sizes))
    assert counts.by_role["embedding"] == counts.embedding == counts.by_role["output"] == 128256 * 4096
    assert counts.by_role["norm"] == 65 * 4096
    assert sum(counts.by_role.values()) == counts.total
    assert counts.active == counts.total - counts.embedding - counts.by_role["norm"]


def test_routed_experts_count_by_their_share() -> None:
    experts = Parameter("moe.experts.w1", (64, 10, 20), "expert", Normal(0.02), active=6 / 64)
    counts = count_parameters((experts,))
    assert (counts.total, counts.active) == (64 * 200, 6 * 200)
    assert flops_per_token((experts,), (), 1) == pytest.approx(6 * 6 * 200)


def test_flux_dev_per_image() -> None:
    """A 1024 px image of FLUX.1-dev, 4,096 image and 512 text rows: a closed form, and torch's counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from titan_core.models import family
    from titan_core.nn.latents import coordinates

    flux = family("flux")
    sizes = flux.flavors["flux-dev"]
    image, text, d = 4096, 512, 3072
    found = flops_per_token(flux.parameters(sizes), flux.attentions(sizes), {"image": image, "text": text, "sample": 1})
    blocks = 19 * 12 * d * d * (image + text) + 38 * 12 * d * d * (image + text)
    conditions = (19 * 12 + 38 * 3 + 2 + 3) * d * d + 2 * 256 * d + 768 * d
    ends = 2 * 64 * d * image + 4096 * d * text
    attention = 57 * 2 * (image + text) ** 2 * d
    assert found * image == pytest.approx(6 * (blocks + conditions + ends + attention), rel=3e-4)  # and biases
    assert 6 * (blocks + attention) / 3 == pytest.approx(74.4e12, rel=0.01)  # published: 74.4 TFLOP a forward

    small = flux.sizes("debugmodel", n_double=1, n_single=1)
    with torch.device("meta"):
        model = flux.build(small)
        inputs = torch.empty(2, 64, 192), torch.empty(2, 16, 128), torch.empty(2, 128), torch.empty(2)
    ids = tuple(x.to("meta") for x in coordinates(8, 8, 16))
    with FlopCounterMode(display=False) as counter:
        model(*inputs, ids)
    lengths = {"image": 64, "text": 16, "sample": 1}
    matmuls = [p for p in flux.parameters(small) if p.role not in ("norm", "bias")]
    counted = flops_per_token(matmuls, flux.attentions(small), lengths) * 64 * 2 / 3
    assert counter.get_total_flops() == pytest.approx(counted, rel=1e-6)
