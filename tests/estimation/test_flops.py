"""Counts against the published numbers and closed forms."""

import pytest

from titan_core.declare.parameters import Attention
from titan_core.estimation.flops import count_parameters, flops_per_token
from titan_core.estimation.peaks import peak_flops
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


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GeForce GTX 1080", None),
        ("something new", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
