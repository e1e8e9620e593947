"""Checkpoints of runs on a GPU: exact resume, copies in pinned memory, and the way to another device."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.runs import config, losses
from titan_core import load
from titan_core.checkpoint import Checkpointer, Snapshot
from titan_core.config.schema import Checkpoint
from titan_core.jobs import convert

SAVING = {"checkpoint.enable": True, "checkpoint.interval": 3, "training.deterministic": True}


@pytest.mark.parametrize("model", ["llama3 packed", "qwen3 experts", "flux"])
@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_run_goes_on_bit_for_bit(model: str, mode: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {**SAVING, "checkpoint.async_mode": mode}
    whole = losses(config(tmp_path / "whole", model, **changes))
    first = losses(config(tmp_path / "run", model, **changes), until=3)
    rest = losses(config(tmp_path / "run", model, **changes))
    assert len(rest) == 3
    assert first + rest == whole


@pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
def test_a_background_copy_is_of_its_own_step(mode: str, tmp_path: Path) -> None:
    device, seen = torch.device("cuda"), []
    checkpointer = Checkpointer(str(tmp_path), Checkpoint(enable=True, async_mode=mode, keep_latest_k=0))
    weights = {f"w{n}": torch.zeros(1 << 22, device=device) for n in range(4)}
    for step in (1, 2, 3):
        for weight in weights.values():
            torch.cuda._sleep(20_000_000)  # the update is still to come when the save is asked for
            weight.fill_(step)
        checkpointer.save(step, Snapshot(weights, {}, {}), blocking=False)
        checkpointer.wait_staged()
        for weight in weights.values():
            weight.fill_(-1.0)
    checkpointer.finish()
    for step in (1, 2, 3):
        found = {name: torch.empty_like(weight) for name, weight in weights.items()}
        assert checkpointer.load(found, step) is not None
        seen.append({value for weight in found.values() for value in weight.unique().tolist()})
    assert seen == [{1.0}, {2.0}, {3.0}]


def test_pinned_copies_are_pinned() -> None:
    from titan_core.checkpoint.staging import Stage

    stage = Stage(pinned=True)
    weights = {"w": torch.randn(1000, device="cuda")}
    copies = stage.copy(weights, stage.fence(weights))
    assert copies["w"].is_pinned()
    assert torch.equal(copies["w"], weights["w"].cpu())


def test_a_run_moves_between_devices(tmp_path: Path) -> None:
    changes = {**SAVING, "training.deterministic": False}
    whole = losses(config(tmp_path / "whole", "llama3", **changes), "cpu")
    losses(config(tmp_path / "run", "llama3", **changes), "cpu", until=3)
    assert losses(config(tmp_path / "run", "llama3", **changes)) == pytest.approx(whole[3:], rel=1e-3)


@pytest.mark.parametrize("model", ["llama3", "deepseek_v3", "llama4 experts"])
def test_an_exported_model_computes_alike_on_both_devices(model: str, tmp_path: Path) -> None:
    losses(config(tmp_path / "run", model, **{**SAVING, "training.deterministic": False, "checkpoint.interval": 6}))
    convert.run("dcp-to-hf", str(tmp_path / "run"), str(tmp_path / "hf"))
    tokens = torch.randint(0, 2000, (2, 48), generator=torch.Generator().manual_seed(0))
    for path in (tmp_path / "run", tmp_path / "hf"):
        wanted = load(str(path), device="cpu", dtype=torch.float32)(tokens)
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 6e-2)):
            model_on_gpu = load(str(path), device="cuda", dtype=dtype)
            found = model_on_gpu(tokens.cuda()).float().cpu()
            assert (found - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max().item()), (path, dtype)
    assert next(load(str(tmp_path / "hf")).parameters()).dtype == torch.bfloat16  # by default, on the GPU
