"""The benchmark of conversions: its weights are a model that titan and transformers know, and who fails is named."""

import sys
from pathlib import Path

import pytest
import torch

import titan_core
from titan_core.jobs import bench_convert
from titan_core.runtime.errors import RunFailed

TINY = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 48, "vocab_size": 64}


def test_its_weights_are_those_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(bench_convert, "_MODEL", TINY)
    size = bench_convert._write_source(tmp_path / "hf", 0.5)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) >= bench_convert._SHARDS
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    assert size == sum(2 * p.numel() for p in theirs.parameters())
    ours = titan_core.load(str(tmp_path / "hf"))
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(ours.float()(tokens), theirs.float()(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_all_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_convert, "_MODEL", TINY)
    monkeypatch.setattr(bench_convert, "_SETTLE_SECONDS", 0.0)
    rows = bench_convert.run(gigabytes=0.1, rounds=1, folder=str(tmp_path))
    assert [row.name for row in rows] == ["cp", "cp+sync", "dcp", "titan"]
    cp, _, dcp, titan = rows
    assert 0 < cp.peak_gigabytes < min(dcp.peak_gigabytes, titan.peak_gigabytes)
    assert all(row.wall_seconds > 0 and row.cpu_seconds > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_who_fails_is_named() -> None:
    with pytest.raises(RunFailed, match="no such thing"):
        bench_convert._measure([sys.executable, "-c", "raise SystemExit('no such thing')"])
