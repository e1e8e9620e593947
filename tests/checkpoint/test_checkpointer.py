"""Checkpoints: what goes in comes out, in whatever layout, and in the background."""

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.checkpoint.saved import assert_equal, data_file, empty, open_at, save
from tests.ranks import run_ranks
from titan_core.checkpoint import Checkpointer, Snapshot, load_tensors, read_shared, tensor_index, verify
from titan_core.checkpoint.writer import Writer
from titan_core.config.schema import Checkpoint
from titan_core.runtime.errors import CheckpointError
from titan_core.runtime.events import Saved


def test_round_trip(tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path)
    expected = save(checkpointer, 3)
    found = empty()
    loaded = checkpointer.load(found)
    assert loaded is not None
    assert (loaded.step, loaded.shared, loaded.own, loaded.skipped) == (3, {"step": 3}, {"rng": 3}, [])
    assert_equal(found, expected)
    assert read_shared(str(tmp_path / "step-3")) == {"step": 3}
    assert verify(str(tmp_path / "step-3")) == []
    assert tensor_index(str(tmp_path / "step-3"))["a.weight"] == ((7, 4), torch.float32)


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    expected = save(open_at(tmp_path), 1)
    found = empty()
    dcp.load(found, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    assert_equal(found, expected)
    dcp_to_torch_save(str(tmp_path / "step-1"), str(tmp_path / "all.pt"))
    assert_equal(torch.load(tmp_path / "all.pt", weights_only=True), expected)


def test_views_and_bf16_are_stored_alone(tmp_path: Path) -> None:
    big = torch.randn(1000, 8).to(torch.bfloat16)
    checkpointer = open_at(tmp_path)
    checkpointer.save(1, Snapshot({"view": big[3:5]}, {}, {}), blocking=True)
    assert data_file(tmp_path, 1).stat().st_size < 4000
    found = {"view": torch.zeros(2, 8, dtype=torch.bfloat16)}
    checkpointer.load(found)
    assert torch.equal(found["view"], big[3:5])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(6, 7)
        self.b = nn.Linear(7, 5)


def _shards(kind: str, size: int) -> dict[str, torch.Tensor]:
    net = Net()
    if kind == "fsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    elif kind == "hsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("r", "s")))
    elif kind == "fsdp of tp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(net, mesh["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})
        fully_shard(net, mesh=mesh["dp"])
    elif kind == "columns":
        mesh = init_device_mesh("cpu", (size,))
        for module in (net.a, net.b):
            module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(1)]))
    return dict(net.state_dict())


def _save_shards(folder: str, kind: str, size: int) -> None:
    rank = dist.get_rank()
    checkpointer = Checkpointer(folder, Checkpoint(), rank=rank, size=size)
    checkpointer.save(1, Snapshot(_shards(kind, size), {"step": 1}, {"rank": rank}), blocking=False)
    checkpointer.wait_staged()
    checkpointer.finish()


def _load_shards(folder: str, kind: str, size: int) -> tuple:
    rank = dist.get_rank()
    tensors = {name: torch.zeros_like(t) for name, t in _shards(kind, size).items()}
    loaded = Checkpointer(folder, Checkpoint(), rank=rank, size=size).load(tensors)
    full = {n: (t.full_tensor() if isinstance(t, DTensor) else t) for n, t in tensors.items()}
    return loaded.own, {n: t.clone() for n, t in full.items()}


@pytest.mark.parametrize(
    ("written", "ranks", "read", "then"),
    [
        ("fsdp", 2, "fsdp", 2),
        ("fsdp", 2, "columns", 2),
        ("columns", 2, "fsdp", 4),
        ("hsdp", 4, "fsdp", 2),
        ("fsdp", 4, "hsdp", 4),
        ("plain", 2, "fsdp", 2),
        ("fsdp of tp", 4, "columns", 2),
        ("hsdp", 4, "fsdp of tp", 4),
    ],
)
def test_any_layout_to_any_layout(written: str, ranks: int, read: str, then: int, tmp_path: Path) -> None:
    run_ranks(_save_shards, ranks, str(tmp_path), written, ranks)
    expected = dict(Net().state_dict())
    for rank, (own, found) in enumerate(run_ranks(_load_shards, then, str(tmp_path), read, then)):
        assert own == ({"rank": rank} if ranks == then else None)
        assert_equal(found, expected)
    alone = {name: torch.zeros_like(t) for name, t in expected.items()}
    load_tensors(str(tmp_path / "step-1"), alone)
    assert_equal(alone, expected)


def test_weights_may_change_once_staged(tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path)
    tensors = {"w": torch.arange(1_000_000, dtype=torch.float32)}
    expected = tensors["w"].clone()
    checkpointer.save(1, Snapshot(tensors, {}, {}), blocking=False)
    checkpointer.wait_staged()
    tensors["w"].mul_(-1)
    checkpointer.finish()
    found = {"w": torch.zeros_like(expected)}
    checkpointer.load(found)
    assert torch.equal(found["w"], expected)


def test_buffers_are_used_again(tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path, async_mode="async")
    for step in (1, 2, 3):
        expected = save(checkpointer, step, blocking=False)
        checkpointer.wait_staged()
    checkpointer.finish()
    found = empty()
    checkpointer.load(found)
    assert_equal(found, expected)
    assert checkpointer.steps() == [1, 2, 3]


def test_tensors_are_saved_by_one_rank_when_all_have_the_same(tmp_path: Path) -> None:
    run_ranks(_save_shards, 2, str(tmp_path), "plain", 2)
    one = data_file(tmp_path, 1).stat().st_size
    both = sum(p.stat().st_size for p in (tmp_path / "step-1").glob("*.distcp"))
    alone = open_at(tmp_path / "alone")
    alone.save(1, Snapshot(_shards("plain", 1), {}, {}), blocking=True)
    assert both == data_file(tmp_path / "alone", 1).stat().st_size >= one


def test_dtypes_are_cast_but_kinds_are_not(tmp_path: Path) -> None:
    weights = {"w": torch.randn(8), "n": torch.arange(3)}
    open_at(tmp_path).save(1, Snapshot(weights, {}, {}), blocking=True)
    found = {"w": torch.zeros(8, dtype=torch.bfloat16), "n": torch.zeros(3, dtype=torch.int64)}
    load_tensors(str(tmp_path / "step-1"), found)
    assert torch.equal(found["w"], weights["w"].to(torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"n is torch.int64, wanted torch.float32"):
        load_tensors(str(tmp_path / "step-1"), {"w": torch.zeros(8), "n": torch.zeros(3)})


def test_state_is_taken_when_save_is_called(tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path)
    history = [1, 2]
    checkpointer.save(1, Snapshot({"w": torch.ones(3)}, {"history": history}, {}), blocking=False)
    history.append(3)
    checkpointer.finish()
    assert read_shared(str(tmp_path / "step-1")) == {"history": [1, 2]}


def test_events_come_in_the_callers_thread_with_the_whole_stall(tmp_path: Path, monkeypatch) -> None:
    heard: list = []
    checkpointer = open_at(tmp_path, lambda event: heard.append((threading.current_thread(), event)))
    may_copy, copy, wait = threading.Event(), checkpointer._stage.copy, checkpointer._staged.wait
    monkeypatch.setattr(checkpointer._stage, "copy", lambda *args: may_copy.wait(20) and copy(*args))
    monkeypatch.setattr(checkpointer._staged, "wait", lambda: may_copy.set() or wait())
    save(checkpointer, 1, blocking=False)
    of_the_call = checkpointer._stall
    checkpointer.wait_staged()
    checkpointer.finish()
    ((thread, event),) = heard
    assert thread is threading.main_thread()
    assert isinstance(event, Saved)
    assert event.stall == checkpointer._stall > of_the_call > 0
    files = {p for p in (tmp_path / "step-1").rglob("*") if p.is_file() and p.name != "manifest.json"}
    assert event.bytes == sum(p.stat().st_size for p in files)


def test_second_save_waits_for_the_first(tmp_path: Path, monkeypatch) -> None:
    heard: list = []
    checkpointer = open_at(tmp_path, heard.append)
    write = Writer.write_file
    monkeypatch.setattr(Writer, "write_file", lambda *args: (time.sleep(0.1), write(*args))[1])
    save(checkpointer, 1, blocking=False)
    checkpointer.wait_staged()
    assert heard == []
    save(checkpointer, 2, blocking=False)
    assert [event.step for event in heard] == [1]
    checkpointer.finish()
    assert [event.step for event in heard] == [1, 2]
    assert checkpointer.steps() == [1, 2]
