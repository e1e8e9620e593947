"""What titan says of a GPU: doctor, traces, snapshots, memory that ran out."""

import json
from pathlib import Path

import pytest
import torch

from tests.gpu.runs import config, losses
from titan_cli.main import run as titan
from titan_core.jobs import doctor
from titan_core.runtime import distributed
from titan_core.runtime.errors import RunFailed


def test_doctor_names_the_gpu(tmp_path: Path) -> None:
    found = {finding.name: finding for finding in doctor.run(str(tmp_path))}
    properties = torch.cuda.get_device_properties(0)
    assert found["gpu 0"].text.startswith(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA ")
    assert "nccl" in found["collectives"].text
    assert found["driver"].state == "ok"
    assert doctor.can_train(list(found.values()))


def test_the_command_trains_where_the_gpu_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "llama3_debugmodel", "--run", str(tmp_path), "--training.steps", "3", "--json"]
    assert titan([*words, "--validation.enable", "false"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert "memory/max_active(GiB)" in (tmp_path / "metrics.jsonl").read_text()  # which only a GPU has


def test_a_trace_holds_kernels(tmp_path: Path) -> None:
    changes = {"enable_profiling": True, "profile_freq": 4, "profiler_active": 1, "profiler_warmup": 1}
    losses(config(tmp_path, "llama3", **{f"profiling.{key}": value for key, value in changes.items()}))
    trace = json.loads((tmp_path / "profile_traces/step_4/rank0_trace.json").read_text())
    kinds = [event.get("cat") for event in trace["traceEvents"]]
    assert kinds.count("kernel") > 50


def test_a_snapshot_is_written(tmp_path: Path) -> None:
    losses(config(tmp_path, "llama3", profiling__enable_memory_snapshot=True, profiling__memory_snapshot_freq=6))
    assert (tmp_path / "memory_snapshot/step_6/rank0_memory_snapshot.pickle").stat().st_size > 1000


def test_memory_that_runs_out_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def huge(*_: object) -> None:
        torch.empty(1 << 44, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr("titan_core.training.trainer.forward_backward", huge)
    with pytest.raises(
        RunFailed, match=r"rank 0 is out of memory.* asked for 16384\.00 GiB more; tensors hold"
    ) as caught:
        losses(config(tmp_path, "llama3"))
    assert Path(caught.value.where or "").exists()
    assert (tmp_path / "memory_snapshot/out-of-memory/rank0_memory_snapshot.pickle").exists()


def test_collectives_over_nccl_alone() -> None:
    from titan_core.parallel import exchange

    world = distributed.start(always_group=True)
    try:
        group = torch.distributed.group.WORLD
        assert "cuda:nccl" in str(torch.distributed.get_backend_config(group))
        for device in (world.device, torch.device("cpu")):
            x = torch.arange(6.0, device=device).view(2, 3)
            assert torch.equal(exchange.all_gather(x, 0, group), x)
            assert torch.equal(exchange.all_gather(x, 1, group), x)
            assert torch.equal(exchange.reduce_scatter(x, 1, group), x)
            assert torch.equal(exchange.all_reduce(x, group, "max"), x)
            assert torch.equal(exchange.all_to_all(x, group), x)
        distributed.set_timeout(5)
    finally:
        distributed.stop()
