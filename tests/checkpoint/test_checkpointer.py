"""Checkpoints: what goes in comes out, whatever happens in between."""

import json
import os
import pickle
import signal
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

from tests.ranks import run_ranks
from titan_core.checkpoint import Checkpointer, Snapshot, find_step, load_tensors, read_shared, tensor_index, verify
from titan_core.config.schema import Checkpoint
from titan_core.runtime.errors import CheckpointError
from titan_core.runtime.events import Saved, Warned

SHAPES = {"a.weight": (7, 4), "b.weight": (5, 6), "b.bias": (5,), "step": ()}


def make(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, float("nan")) for name, shape in SHAPES.items()}


def open_at(folder, listener=lambda event: None, **config) -> Checkpointer:
    return Checkpointer(str(folder), Checkpoint(**config), listener=listener)


def save(checkpointer: Checkpointer, step: int, seed: int | None = None, **options) -> dict[str, torch.Tensor]:
    tensors = make(step if seed is None else seed)
    snapshot = Snapshot(tensors, {"step": step}, {"rng": step}, {"tokenizer/x.json": b"{}"})
    checkpointer.save(step, snapshot, blocking=options.pop("blocking", True), **options)
    return tensors


def assert_equal(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def data_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step}" / "__0_0.distcp"


# ------------------------------------------------------------------------------------------------ round trips


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


# ------------------------------------------------------------------------------------------------ in the background


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


def test_background_failure_is_raised_later_and_nothing_is_lost(tmp_path: Path, monkeypatch) -> None:
    checkpointer = open_at(tmp_path)
    save(checkpointer, 1)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("titan_core.checkpoint.writer._HashingFile.write", full)
    save(checkpointer, 2, blocking=False)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        checkpointer.finish()
    assert "keep_latest_k" in (caught.value.tip or "")
    monkeypatch.undo()
    assert checkpointer.steps() == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    save(checkpointer, 2)
    assert checkpointer.steps() == [1, 2]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk(tmp_path: Path) -> None:
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("cannot mount a tmpfs here")
    try:
        checkpointer = open_at(tmp_path)
        save(checkpointer, 1)
        with pytest.raises(CheckpointError, match="No space left"):
            checkpointer.save(2, Snapshot({"w": torch.zeros(1_000_000)}, {}, {}), blocking=True)
        assert checkpointer.steps() == [1]
        assert checkpointer.load(empty()).step == 1
    finally:
        os.system(f"umount {tmp_path}")


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="Not a directory"):
        save(open_at(tmp_path / "file" / "checkpoint"), 1)


def test_killed_while_saving(tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    pid = os.fork()
    if pid == 0:
        import titan_core.checkpoint.checkpointer as module

        module.Checkpointer._commit = lambda *_: time.sleep(60)
        save(open_at(tmp_path), 2)
        os._exit(0)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob(".step-2.partial/ranks")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / ".step-2.partial").exists()
    checkpointer = open_at(tmp_path)
    assert not (tmp_path / ".step-2.partial").exists()
    assert checkpointer.load(empty()).step == 1


# ------------------------------------------------------------------------------------------------ damage

DAMAGE = {
    "bits flipped": lambda f: _flip(f / "__0_0.distcp"),
    "truncated": lambda f: os.truncate(f / "__0_0.distcp", (f / "__0_0.distcp").stat().st_size // 2),
    "tail lost": lambda f: os.truncate(f / "__0_0.distcp", (f / "__0_0.distcp").stat().st_size - 10),
    "data file missing": lambda f: (f / "__0_0.distcp").unlink(),
    "metadata missing": lambda f: (f / ".metadata").unlink(),
    "metadata damaged": lambda f: _flip(f / ".metadata"),
    "shared state damaged": lambda f: (f / "shared.json").write_text("{"),
    "rank state missing": lambda f: (f / "ranks" / "0.json").unlink(),
    "manifest damaged": lambda f: (f / "manifest.json").write_text("{"),
    "manifest of another form": lambda f: (f / "manifest.json").write_text("[]"),
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 4):
        content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_newest_is_reported_and_the_one_before_used(kind: str, tmp_path: Path) -> None:
    heard: list = []
    checkpointer = open_at(tmp_path, heard.append)
    expected = save(checkpointer, 1)
    save(checkpointer, 2)
    DAMAGE[kind](tmp_path / "step-2")
    found = empty()
    loaded = checkpointer.load(found)
    assert loaded.step == 1
    assert_equal(found, expected)
    assert [step for step, _ in loaded.skipped] == [2]
    assert any(isinstance(event, Warned) and "step-2" in event.text for event in heard)
    with pytest.raises(CheckpointError):
        checkpointer.load(empty(), step=2)


def test_step_without_manifest_is_no_step(tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path)
    save(checkpointer, 1)
    save(checkpointer, 2)
    (tmp_path / "step-2" / "manifest.json").unlink()
    assert checkpointer.steps() == [1]


def test_every_checkpoint_damaged_is_an_error(tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path)
    save(checkpointer, 1)
    _flip(data_file(tmp_path, 1))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpointer.load(empty())


def _readable(step: Path, name: str) -> bool:
    try:
        load_tensors(str(step), {name: torch.zeros(SHAPES[name])})
    except CheckpointError:
        return False
    return True


def test_a_rank_checks_only_what_it_reads(tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    pieces = json.loads((tmp_path / "step-1" / "manifest.json").read_text())["pieces"]["__0_0.distcp"]
    offset, length, _ = pieces[0]
    content = bytearray(data_file(tmp_path, 1).read_bytes())
    content[offset + length // 2] ^= 0xFF
    data_file(tmp_path, 1).write_bytes(content)
    damaged = [name for name in SHAPES if not _readable(tmp_path / "step-1", name)]
    assert len(damaged) == 1
    with pytest.raises(CheckpointError, match="hash"):
        load_tensors(str(tmp_path / "step-1"), {damaged[0]: torch.zeros(SHAPES[damaged[0]])})


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/titan-was-here",)


@pytest.mark.parametrize("check", [True, False])
def test_pickle_that_would_run_code_is_refused(check: bool, tmp_path: Path) -> None:
    Path("/tmp/titan-was-here").unlink(missing_ok=True)
    checkpointer = open_at(tmp_path, verify=check)
    save(checkpointer, 1)
    (tmp_path / "step-1" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"hash|manifest says|refused"):
        checkpointer.load(empty(), step=1)
    assert not Path("/tmp/titan-was-here").exists()


def test_entry_that_would_run_code_is_refused(tmp_path: Path) -> None:
    Path("/tmp/titan-was-here").unlink(missing_ok=True)
    dcp.save({"evil": Evil()}, checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    checkpointer = open_at(tmp_path, verify=False)
    with pytest.raises(CheckpointError, match="no manifest"):
        find_step(str(tmp_path / "step-1"))
    files = {p.name: [p.stat().st_size, "0"] for p in (tmp_path / "step-1").iterdir()}
    manifest = {"version": 1, "step": 1, "world_size": 1, "metrics": {}, "files": files, "pieces": {}}
    (tmp_path / "step-1" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "step-1" / "shared.json").write_text("{}")
    (tmp_path / "step-1" / "ranks").mkdir()
    (tmp_path / "step-1" / "ranks" / "0.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a tensor"):
        checkpointer.load({"evil": torch.zeros(1)}, step=1)
    assert not Path("/tmp/titan-was-here").exists()


def test_missing_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors: x, y"):
        load_tensors(str(tmp_path / "step-1"), {"x": torch.zeros(1), "y": torch.zeros(1), "step": torch.zeros(())})
    with pytest.raises(CheckpointError, match=r"a.weight is \(7, 4\), wanted \(4, 7\)"):
        load_tensors(str(tmp_path / "step-1"), {"a.weight": torch.zeros(4, 7)})


# ------------------------------------------------------------------------------------------------ which ones are kept


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (0, [1, 2, 3, 4, 5])])
def test_newest_k_are_kept(keep: int, left: list[int], tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path, keep_latest_k=keep)
    for step in range(1, 6):
        save(checkpointer, step)
    assert checkpointer.steps() == left


def test_best_k_are_kept_too(tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path, keep_latest_k=1, keep_best_k=2)
    for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], 1):
        save(checkpointer, step, metrics={"validation_loss": loss})
    assert checkpointer.steps() == [2, 3, 5]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path)
    save(checkpointer, 1, seed=1)
    expected = save(checkpointer, 1, seed=2)
    found = empty()
    checkpointer.load(found)
    assert_equal(found, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


# ------------------------------------------------------------------------------------------------ elsewhere


def test_memory_file_system() -> None:
    checkpointer = open_at("memory://titan-test/run/checkpoint", keep_latest_k=2)
    for step in (1, 2, 3):
        expected = save(checkpointer, step)
    assert checkpointer.steps() == [2, 3]
    found = empty()
    assert checkpointer.load(found).step == 3
    assert_equal(found, expected)


def test_s3(monkeypatch) -> None:
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        fs = s3fs.S3FileSystem(endpoint_url=address)
        fs.mkdir("bucket")
        saved: list = []
        checkpointer = open_at("s3://bucket/run/checkpoint", saved.append, keep_latest_k=2)
        for step in (1, 2, 3):
            expected = save(checkpointer, step)
        assert checkpointer.steps() == [2, 3]
        assert [event.step for event in saved if isinstance(event, Saved)] == [1, 2, 3]
        with fs.open("bucket/run/checkpoint/step-4/__0_0.distcp", "wb") as file:
            file.write(b"what a dying writer left")
        found = empty()
        assert checkpointer.load(found).step == 3
        assert_equal(found, expected)
        with fs.open("bucket/run/checkpoint/step-3/__0_0.distcp", "wb") as file:
            file.write(b"short")
        assert checkpointer.load(empty()).step == 2
        assert find_step("s3://bucket/run") == "s3://bucket/run/checkpoint/step-3"
    finally:
        server.stop()


def test_missing_package_names_the_line_to_run(monkeypatch) -> None:
    import fsspec

    from titan_core.runtime.errors import MachineError

    def absent(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(MachineError) as caught:
        open_at("s3://bucket/x")
    assert caught.value.tip == "pip install 'titan-pretrain[s3]'"


def test_find_step_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing at"):
        find_step(str(tmp_path / "no"))
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_step(str(tmp_path))
    save(open_at(tmp_path / "checkpoint"), 7)
    assert find_step(str(tmp_path)) == str(tmp_path / "checkpoint" / "step-7")
    assert find_step(str(tmp_path / "checkpoint")) == str(tmp_path / "checkpoint" / "step-7")
