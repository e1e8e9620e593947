"""Folders and object stores: which checkpoints are there, which are kept, which are found."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.saved import assert_equal, empty, open_at, save
from tests.ranks import run_ranks
from titan_core.checkpoint import Checkpointer, Snapshot, find_step
from titan_core.checkpoint.local import LocalStorage
from titan_core.checkpoint.retention import to_remove
from titan_core.config.schema import Checkpoint
from titan_core.runtime.errors import CheckpointError
from titan_core.runtime.events import Saved, Warned


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
    checkpointer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


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
        save(checkpointer, 5)
        checkpointer.finish()
        assert sorted(fs.ls("bucket/run/checkpoint", refresh=True)) == [
            f"bucket/run/checkpoint/step-{n}" for n in (3, 5)
        ]
        assert find_step("s3://bucket/run") == "s3://bucket/run/checkpoint/step-5"
        with pytest.raises(CheckpointError):
            save(open_at("s3://misspelt/run"), 1)
        assert fs.ls("", refresh=True) == ["bucket"]
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
    with pytest.raises(CheckpointError, match="nothing at") as caught:
        find_step(str(tmp_path / "checkpoint" / "step-8"))
    assert caught.value.tip == "complete steps there: 7"


def test_loss_that_is_no_number_is_never_best() -> None:
    metrics = {1: {"validation_loss": float("nan")}, 2: {"validation_loss": 2.0}, 3: {}}
    assert to_remove([1, 2, 3, 4], metrics, Checkpoint(keep_latest_k=1, keep_best_k=2), None) == [1, 3]


def test_step_that_the_run_stands_on_is_kept() -> None:
    assert to_remove([1, 2, 3, 4], {}, Checkpoint(keep_latest_k=1), 2) == [1, 3]


def test_best_are_known_to_the_next_run_too(tmp_path: Path) -> None:
    for step, loss in enumerate([1.0, 3.0, 2.0], 1):
        config = {"keep_latest_k": 1, "keep_best_k": 1}
        save(open_at(tmp_path, **config), step, metrics={"validation_loss": loss})
    (tmp_path / "step-3" / "manifest.json").write_text("{")
    checkpointer = open_at(tmp_path, keep_latest_k=1, keep_best_k=1)
    save(checkpointer, 4, metrics={"validation_loss": 4.0})
    assert checkpointer.steps() == [1, 4]


def test_removed_steps_leave_nothing_behind(tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path, keep_latest_k=1)
    for step in (1, 2, 3):
        save(checkpointer, step)
    checkpointer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["step-3"]


def test_removal_that_fails_is_only_reported(tmp_path: Path, monkeypatch) -> None:
    heard: list = []
    checkpointer = open_at(tmp_path, heard.append, keep_latest_k=1)
    save(checkpointer, 1)

    def refuse(step: int) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpointer.storage, "hide", refuse)
    save(checkpointer, 2)
    assert checkpointer.steps() == [1, 2]
    assert "could not be removed: " in next(e.text for e in heard if isinstance(e, Warned))


def test_two_that_remove_the_same_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    first, second = LocalStorage(str(tmp_path)), LocalStorage(str(tmp_path))
    for step in range(1, 4):
        save(open_at(tmp_path), step)
        for name in range(200):
            (tmp_path / f"step-{step}" / f"{name}").touch()
        first.hide(step)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda storage: storage.sweep(), (first, second)))
    assert list(tmp_path.iterdir()) == []


def test_start_beside_what_cannot_be_removed_warns(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    save(open_at(tmp_path), 1)
    (tmp_path / ".step-2.partial").mkdir()
    monkeypatch.setattr("shutil.rmtree", refuse)
    heard: list = []
    assert open_at(tmp_path, heard.append).steps() == [1]
    assert ["Permission denied" in event.text for event in heard] == [True]


def test_sweep_leaves_what_is_being_written() -> None:
    checkpointer = open_at("memory://titan-test/sweep")
    save(checkpointer, 9)
    storage = checkpointer.storage
    for step in (3, 5):
        with storage.open(f"step-{step}/__0_0.distcp", "wb") as file:
            file.write(b"half")
    storage.begin(5)
    with storage.open("step-5/__0_0.distcp", "wb") as file:
        file.write(b"half")
    storage.sweep()
    assert (storage.size("step-3/__0_0.distcp"), storage.size("step-5/__0_0.distcp")) == (None, 4)
    assert storage.steps() == [9]


def test_short_object_is_found_before_the_commit(monkeypatch) -> None:
    checkpointer = open_at("memory://titan-test/short")
    save(checkpointer, 1)
    monkeypatch.setattr(checkpointer.storage, "size", lambda path: 3)
    with pytest.raises(CheckpointError, match="but has 3 bytes"):
        save(checkpointer, 2)
    assert checkpointer.steps() == [1]


def test_client_that_fails_in_its_own_way_is_explained(monkeypatch) -> None:
    checkpointer = open_at("memory://titan-test/offline")
    save(checkpointer, 1)

    def offline(*_: object, **__: object) -> None:
        raise RuntimeError("Unable to locate credentials")

    monkeypatch.setattr(checkpointer.storage._fs, "ls", offline)
    for use in (
        checkpointer.steps,
        lambda: checkpointer.load(empty()),
        lambda: find_step("memory://titan-test/offline"),
    ):
        with pytest.raises(CheckpointError, match="Unable to locate credentials") as caught:
            use()
        assert "credentials right" in (caught.value.tip or "")


def _save_to_own_memory() -> str:
    rank = dist.get_rank()
    snapshot = Snapshot({"w": torch.ones(2)}, {}, {})
    try:
        Checkpointer("memory://titan-test/two", Checkpoint(), rank=rank, size=2).save(1, snapshot, blocking=True)
    except CheckpointError as error:
        return error.message
    return "saved"


def test_memory_is_not_shared_between_ranks() -> None:
    assert all("is not there" in text for text in run_ranks(_save_to_own_memory, 2, timeout=20))
