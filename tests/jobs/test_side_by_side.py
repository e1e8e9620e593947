"""Benchmarks beside a peer in one process: the same weights, and nothing timed that differs."""

import pytest
import torch

from titan_core.jobs import bench_flux, bench_moe_step
from titan_core.jobs.side_by_side import agree, take_turns
from titan_core.runtime.errors import RunFailed
from titan_core.runtime.events import silent


def test_experts_beside_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_moe_step, "_ROWS", 1)
    monkeypatch.setattr(bench_moe_step, "_LENGTH", 16)
    small = {"n_layers": 2, "dim": 64, "ffn_dim": 64, "expert_dim": 32}
    monkeypatch.setattr(bench_moe_step, "_SIZES", bench_moe_step._SIZES | small)
    said: list[str] = []
    rows = bench_moe_step.run(rounds=1, listener=lambda event: said.append(str(event)))
    assert [row.name for row in rows] == ["titan", "titan, loop", "transformers", "transformers, eager"]
    assert all(0 < row.cpu_seconds_min <= row.cpu_seconds <= row.cpu_seconds_max for row in rows)
    assert len(said) == 3  # each of the others was compared


def test_flux_beside_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench_flux, "_IMAGES", 1)
    monkeypatch.setattr(bench_flux, "_SIDE", 2)
    rows = bench_flux.run(rounds=1)
    assert {(row.work, row.name) for row in rows} == {
        (work, name) for work in ("training step", "4 sampling steps") for name in ("titan", "diffusers")
    }


def test_who_computes_something_else_is_not_timed() -> None:
    ours = torch.linspace(-1, 1, 9)
    agree("losses", {"titan": ours, "peer": ours + 1e-6}, silent)
    with pytest.raises(RunFailed, match=r"the losses of peer differ from titan's by 1.0e-04 of the largest"):
        agree("losses", {"titan": ours, "peer": ours + 1e-4}, silent)


def test_all_take_their_turn_in_each_round() -> None:
    order: list[str] = []
    calls = {("step", name): (lambda name=name: order.append(name)) for name in ("a", "b")}
    rows = take_turns(calls, 2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert [row.name for row in rows] == ["a", "b"]
