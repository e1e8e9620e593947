"""A save that fails, on any rank and for any reason, loses nothing and hangs nobody."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.saved import empty, open_at, save
from tests.ranks import run_ranks
from titan_core.checkpoint import Checkpointer, Snapshot
from titan_core.checkpoint.writer import Writer
from titan_core.config.schema import Checkpoint
from titan_core.runtime.distributed import set_timeout
from titan_core.runtime.errors import CheckpointError


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
        import titan_core.checkpoint.saving as module

        module.commit = lambda *_: time.sleep(60)
        save(open_at(tmp_path), 2)
        os._exit(0)
    deadline = time.monotonic() + 20
    while not list(tmp_path.glob(".step-2.partial/shared.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / ".step-2.partial").exists()
    checkpointer = open_at(tmp_path)
    assert not (tmp_path / ".step-2.partial").exists()
    assert checkpointer.load(empty()).step == 1


def test_folder_that_may_not_be_written(tmp_path: Path, monkeypatch) -> None:
    checkpointer = open_at(tmp_path)
    save(checkpointer, 1)

    def refused(path: Path, *_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(CheckpointError, match="Read-only file system") as caught:
        save(checkpointer, 2)
    monkeypatch.undo()
    assert str(tmp_path) in (caught.value.where or "")
    assert "--run" in (caught.value.tip or "")
    assert checkpointer.steps() == [1]


def _write_until_told(folder: str, pipe: int) -> None:
    checkpointer = open_at(folder)
    checkpointer.storage.begin(2)
    os.write(pipe, b"x")
    time.sleep(60)


def test_what_a_living_run_is_writing_is_left_alone(tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _write_until_told(str(tmp_path), write)
        os._exit(0)
    try:
        assert os.read(read, 1) == b"x"
        other = open_at(tmp_path)
        assert (tmp_path / ".step-2.partial").exists()
        with pytest.raises(CheckpointError, match="another process is writing step 2"):
            save(other, 2)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    save(open_at(tmp_path), 2)
    assert open_at(tmp_path).steps() == [1, 2]


def test_died_between_the_two_renames_of_a_commit(tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    (tmp_path / "step-1").rename(tmp_path / ".step-1.old.partial")
    checkpointer = open_at(tmp_path)
    assert checkpointer.steps() == [1]
    assert checkpointer.load(empty()).step == 1


# ------------------------------------------------------------------------------------------------ several ranks


def _tensors() -> Snapshot:
    return Snapshot({"w": torch.ones(5)}, {"s": 1}, {"rank": dist.get_rank()})


def _fail_on_one_rank(folder: str, what: str) -> tuple[str, list[int], list[int]]:
    """Save step 1, let step 2 fail on rank 1 alone, save step 3; return the error and the steps after 2 and 3."""
    rank = dist.get_rank()
    checkpointer = Checkpointer(folder, Checkpoint(), rank=rank, size=2)
    checkpointer.save(1, _tensors(), blocking=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    broken = {
        "staging": (checkpointer._stage, "copy"),
        "writing": (Writer, "write_file"),
        "tensors": (Writer, "write_data"),
    }
    owner, name = broken[what]
    whole = getattr(owner, name)
    if rank == 1:
        setattr(owner, name, full)
    checkpointer.save(2, _tensors(), blocking=False)
    checkpointer.wait_staged()
    try:
        checkpointer.finish()
        error = ""
    except CheckpointError as caught:
        error = caught.message
    setattr(owner, name, whole)
    after = checkpointer.steps()
    checkpointer.save(3, _tensors(), blocking=True)
    return error, after, checkpointer.steps()


@pytest.mark.parametrize("what", ["staging", "writing", "tensors"])
def test_failure_of_one_rank_fails_the_save_on_all(what: str, tmp_path: Path) -> None:
    for error, after, end in run_ranks(_fail_on_one_rank, 2, str(tmp_path), what, timeout=20):
        assert "No space left" in error
        assert (after, end) == ([1], [1, 3])
    assert {p.name for p in tmp_path.iterdir()} == {"step-1", "step-3"}


def _save_slowly(folder: str) -> list[int]:
    rank = dist.get_rank()
    checkpointer = Checkpointer(folder, Checkpoint(), rank=rank, size=2)
    set_timeout(0.2)
    if rank == 0:
        write = Writer.write_data
        Writer.write_data = lambda *args: (time.sleep(1), write(*args))[1]
    checkpointer.save(1, _tensors(), blocking=True)
    return checkpointer.steps()


def test_slow_disk_is_no_lost_rank(tmp_path: Path) -> None:
    assert run_ranks(_save_slowly, 2, str(tmp_path), timeout=20) == [[1], [1]]


def _ask_while_saving(folder: str) -> tuple[list[int], int | None]:
    rank = dist.get_rank()
    checkpointer = Checkpointer(folder, Checkpoint(), rank=rank, size=2)
    if rank == 0:  # the other rank asks long before the commit
        write = Writer.write_file
        Writer.write_file = lambda *args: (time.sleep(0.2), write(*args))[1]
    checkpointer.save(1, _tensors(), blocking=False)
    return checkpointer.steps(), checkpointer.newest()


def test_all_ranks_see_the_same_steps_while_one_is_being_saved(tmp_path: Path) -> None:
    assert run_ranks(_ask_while_saving, 2, str(tmp_path), timeout=20) == [([1], 1), ([1], 1)]


def _lose_a_rank(folder: str) -> str:
    rank = dist.get_rank()
    checkpointer = Checkpointer(folder, Checkpoint(), rank=rank, size=2)
    checkpointer.save(1, _tensors(), blocking=True)
    if rank == 1:
        return ""
    time.sleep(0.5)  # the other one is gone by now
    try:
        checkpointer.save(2, _tensors(), blocking=True)
    except CheckpointError as error:
        return error.message
    return "saved"


def test_lost_rank_is_said_in_a_sentence(tmp_path: Path) -> None:
    assert "another rank cannot be reached" in run_ranks(_lose_a_rank, 2, str(tmp_path), timeout=20)[0]
    assert open_at(tmp_path).steps() == [1]


def _save_where_the_others_are_not(folder: str) -> str:
    rank = dist.get_rank()
    try:
        Checkpointer(f"{folder}/{rank}", Checkpoint(), rank=rank, size=2).save(1, _tensors(), blocking=True)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_folder_that_the_ranks_do_not_share_is_found_out(tmp_path: Path) -> None:
    for text in run_ranks(_save_where_the_others_are_not, 2, str(tmp_path), timeout=20):
        assert "is not there" in text
        assert "every rank sees" in text
