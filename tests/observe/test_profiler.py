"""Traces and snapshots: at which steps, from where to where, and what is in them."""

import json
import re
from pathlib import Path

import pytest
import torch

from tests.runs import tiny
from titan_core.config.schema import Config
from titan_core.observe import memory
from titan_core.observe.profiler import Profiler
from titan_core.runtime.errors import ConfigError, RunFailed
from titan_core.runtime.host_memory import peak_resident_bytes

CPU = torch.device("cpu")


def config(folder: Path, freq: int, active: int = 1, warmup: int = 1, **more: object) -> Config:
    settings = {
        "profiling__enable_profiling": True,
        "profiling__profile_freq": freq,
        "profiling__profiler_active": active,
        "profiling__profiler_warmup": warmup,
    }
    return tiny(folder, **{**settings, **more}).config


def steps(settings: Config, first: int, last: int, rank: int = 0) -> None:
    """Take steps first + 1 to last; step n computes a tensor of n elements."""
    with Profiler(settings, rank, CPU) as profiler:
        profiler.before_first_step(first)
        for step in range(first + 1, last + 1):
            torch.ones(step) + 1
            profiler.after_step(step)


def recorded(path: Path) -> list[int]:
    """Return the sizes that a trace's additions had: the steps that it recorded."""
    events = json.loads(path.read_text())["traceEvents"]
    return [event["args"]["Input Dims"][0][0] for event in events if event["name"] == "aten::add"]


def traces(folder: Path) -> dict[str, list[int]]:
    found = sorted((folder / "profile_traces").rglob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    return {path.parent.name: recorded(path) for path in found}


@pytest.mark.parametrize(
    ("freq", "active", "warmup", "last", "expected"),
    [
        (5, 1, 2, 11, {"step_5": [5], "step_10": [10]}),
        (5, 3, 1, 10, {"step_5": [3, 4, 5], "step_10": [8, 9, 10]}),
        (3, 2, 1, 9, {"step_3": [2, 3], "step_6": [5, 6], "step_9": [8, 9]}),
        (4, 2, 1, 7, {"step_4": [3, 4], "step_7": [7]}),
    ],
    ids=["gaps", "several", "without gaps", "the run ends within a trace"],
)
def test_traces_hold_their_steps(
    tmp_path: Path, freq: int, active: int, warmup: int, last: int, expected: dict[str, list[int]]
) -> None:
    steps(config(tmp_path, freq, active, warmup), 0, last)
    assert traces(tmp_path) == expected


def test_a_resumed_run_traces_the_same_steps(tmp_path: Path) -> None:
    steps(config(tmp_path, 5), 12, 16)
    assert traces(tmp_path) == {"step_15": [15]}
    steps(config(tmp_path / "late", 5), 14, 20)  # the warmup for step 15 is past
    assert traces(tmp_path / "late") == {"step_20": [20]}


def test_ranks_write_their_own_files(tmp_path: Path) -> None:
    for rank in (0, 3):
        steps(config(tmp_path, 2), 0, 2, rank)
    names = {path.name for path in (tmp_path / "profile_traces" / "step_2").iterdir()}
    assert names == {"rank0_trace.json", "rank3_trace.json"}


def test_a_window_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="5 steps of warmup and recording do not fit into 4"):
        Profiler(config(tmp_path, 4, active=2, warmup=3), 0, CPU)


@pytest.mark.parametrize(("snapshot_freq", "expected"), [(3, {"step_3", "step_6"}), (0, {"step_5"})])
def test_snapshots_have_their_own_steps(tmp_path: Path, snapshot_freq: int, expected: set[str]) -> None:
    more = {"profiling__enable_memory_snapshot": True, "profiling__memory_snapshot_freq": snapshot_freq}
    steps(config(tmp_path, 5, profiling__enable_profiling=False, **more), 0, 7)
    assert {path.name for path in (tmp_path / "memory_snapshot").iterdir()} == expected
    assert not (tmp_path / "profile_traces").exists()


def test_a_gpu_is_traced_and_its_allocator_recorded(tmp_path: Path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(path))
    settings = config(tmp_path, 4, profiling__enable_profiling=False, profiling__enable_memory_snapshot=True)
    with Profiler(settings, 1, torch.device("cuda", 1)) as profiler:
        assert torch.profiler.ProfilerActivity.CUDA in profiler._activities()
        profiler.after_step(4)
    path = tmp_path / "memory_snapshot" / "step_4" / "rank1_memory_snapshot.pickle"
    assert calls == [{"max_entries": 100_000}, str(path), {"enabled": None}]


@pytest.mark.parametrize("what", ["trace", "snapshot"])
def test_what_cannot_be_written_is_said(tmp_path: Path, what: str) -> None:
    for folder in ("profile_traces", "memory_snapshot"):
        (tmp_path / folder).write_text("in the way")
    more = {
        "profiling__enable_profiling": what == "trace",
        "profiling__enable_memory_snapshot": what == "snapshot",
    }
    with pytest.raises(RunFailed, match=f"cannot write the {what}: Not a directory") as caught:
        steps(config(tmp_path, 2, **more), 0, 2)
    assert "step_2" in (caught.value.where or "")
    assert "profiling off" in (caught.value.tip or "")


def fill_the_disk(_profile: object, path: str) -> None:
    """Do what the exporter does on a full disk: leave a piece, and say nothing."""
    Path(path + ".tmp").write_text('{"traceEvents": [')


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch) -> None:
    settings = config(tmp_path, 2)
    steps(settings, 0, 2)  # an older trace of the same step must not pass for the new one
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fill_the_disk)
    with pytest.raises(RunFailed, match=re.escape("cannot write the trace: is the disk full?")):
        steps(settings, 0, 2)
    assert list((tmp_path / "profile_traces" / "step_2").iterdir()) == []


def fail_within_a_trace(settings: Config) -> None:
    with Profiler(settings, 0, CPU) as profiler:
        profiler.before_first_step(0)
        profiler.after_step(1)
        profiler.after_step(2)
        raise ZeroDivisionError


def test_an_error_under_way_is_not_replaced(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fill_the_disk)
    settings = config(tmp_path, 4, active=3)
    with pytest.raises(ZeroDivisionError):
        fail_within_a_trace(settings)
    with pytest.raises(RunFailed):
        steps(settings, 0, 2)


def test_live_tensors_by_size() -> None:
    weight = torch.nn.Parameter(torch.zeros(1237, 11))
    (weight * 2).sum().backward()
    views = [weight.data[:5], weight.data.t()]
    twins = [torch.zeros(1237, 13, dtype=torch.bfloat16) for _ in range(2)]
    sparse = torch.eye(3).to_sparse()
    rows = memory.live_tensors()["largest"]
    by_shape = {row["shape"]: row for row in rows}
    assert by_shape["(1237, 13)"] == {
        "shape": "(1237, 13)", "dtype": "torch.bfloat16", "device": "cpu", "count": 2, "bytes": 2 * 2 * 1237 * 13,
    }  # fmt: skip
    shapes = {str(tuple(tensor.shape)) for tensor in (weight, *views)}
    ours = [row for row in rows if row["shape"] in shapes]
    assert sum(row["count"] for row in ours) == 2  # weight and gradient, no view again
    assert sum(row["bytes"] for row in ours) == 2 * 4 * 1237 * 11
    assert len(twins) + sparse._nnz() == 5


def test_largest_come_first() -> None:
    kept = [torch.zeros(size) for size in (1000, 3000, 2000)]
    found = memory.live_tensors()
    sizes = [row["bytes"] for row in found["largest"]]
    assert sizes == sorted(sizes, reverse=True)
    assert found["tensor_bytes"] >= sum(tensor.nbytes for tensor in kept)
    assert found["resident_bytes"] <= peak_resident_bytes() + (64 << 20)
