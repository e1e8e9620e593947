"""Out of memory: a snapshot, the place, the numbers, and what would help; nothing swallowed."""

import json
from pathlib import Path

import pytest
import torch

from tests.runs import tiny
from titan_core.config.schema import Config
from titan_core.observe.oom import explain_out_of_memory
from titan_core.runtime.errors import RunFailed

HUGE = 1 << 50


def exhaust(error: BaseException | None) -> None:
    if error is not None:
        raise error
    torch.empty(HUGE, dtype=torch.uint8)


def fail(config: Config, error: BaseException | None = None) -> RunFailed:
    with pytest.raises(RunFailed) as caught, explain_out_of_memory(config, 3):
        exhaust(error)
    assert caught.value.__cause__ is not None
    return caught.value


def test_a_real_one_on_the_cpu(tmp_path: Path) -> None:
    kept = torch.zeros(1013, 17)
    found = fail(tiny(tmp_path).config)
    assert "rank 3 is out of memory" in found.message
    assert "it asked for 1048576.00 GiB more" in found.message
    assert "GiB are free" in found.message
    snapshot = json.loads(Path(found.where or "").read_text())
    assert "DefaultCPUAllocator" in snapshot["error"]
    assert any(row["shape"] == "(1013, 17)" and row["bytes"] == kept.nbytes for row in snapshot["tensors"]["largest"])


def test_the_place_is_our_innermost_line(tmp_path: Path) -> None:
    from titan_core.nn.layers import Embedding

    config = tiny(tmp_path).config
    with pytest.raises(RunFailed) as caught, explain_out_of_memory(config, 0):
        Embedding(1 << 30, 1 << 20)
    assert " in __init__ (titan_core/nn/layers.py:" in caught.value.message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has"), "asked for 20.50 GiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has"), "asked for 0.50 GiB"),
        (RuntimeError("CUDA error: out of memory\nmore lines"), "CUDA error: out of memory;"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "CUBLAS_STATUS_ALLOC_FAILED"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1073741824 bytes."), "1.00 GiB"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_every_kind_is_recognised(tmp_path: Path, error: BaseException, said: str) -> None:
    assert said in fail(tiny(tmp_path).config, error).message


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("not enough memory")])
def test_other_errors_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), explain_out_of_memory(tiny(tmp_path).config, 0):
        raise error
    assert not (tmp_path / "memory_snapshot").exists()


@pytest.mark.parametrize(
    ("changes", "tips"),
    [
        (
            {"training__local_batch_size": 6, "training__global_batch_size": 12, "training__seq_len": 4096},
            ["local_batch_size 3", "activation_checkpoint.mode full", "more ranks"],
        ),
        (
            {
                "training__local_batch_size": 1,
                "training__seq_len": 4096,
                "activation_checkpoint__mode": "full",
            },
            ["more ranks", "seq_len 2048"],
        ),
        ({"training__local_batch_size": 7, "training__global_batch_size": 7}, ["local_batch_size 1"]),
    ],
)
def test_what_is_cheaper(tmp_path: Path, changes: dict, tips: list[str]) -> None:
    tip = fail(tiny(tmp_path, **changes).config).tip or ""
    positions = [tip.index(word) for word in tips]
    assert positions == sorted(positions)
    assert tip.count(";") <= 2


def test_a_snapshot_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "memory_snapshot").write_text("in the way")
    found = fail(tiny(tmp_path).config)
    assert "could not be written" in (found.where or "")
    assert "out of memory" in found.message


def test_on_a_gpu_the_allocator_is_dumped_too(tmp_path: Path, monkeypatch) -> None:
    written = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 70 << 30)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", written.append)
    found = fail(tiny(tmp_path).config, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert "asked for 2.00 GiB more; tensors hold 70.00 GiB, 1.00 of 80.00 GiB are free" in found.message
    assert written == [str(tmp_path / "memory_snapshot" / "out-of-memory" / "rank3_memory_snapshot.pickle")]


def test_host_memory_runs_out_beside_a_gpu(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    settings = tiny(tmp_path, training__local_batch_size=1, activation_checkpoint__mode="full").config
    for error in (MemoryError(), None):
        found = fail(settings, error)
        assert "it holds" in found.message
        assert "offload" not in (found.tip or "")  # that would need more of it
    assert not (tmp_path / "memory_snapshot" / "out-of-memory").exists()
