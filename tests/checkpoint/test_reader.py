"""Damaged, foreign and malicious checkpoints: reported, passed over, never run."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.checkpoint.saved import SHAPES, assert_equal, data_file, empty, flip, open_at, save
from tests.ranks import run_ranks
from titan_core.checkpoint import Checkpointer, Snapshot, find_step, load_tensors, read_shared, tensor_index, verify
from titan_core.checkpoint.manifest import VERSION, Manifest, content_hash, read_manifest
from titan_core.checkpoint.places import split
from titan_core.config.schema import Checkpoint
from titan_core.runtime.errors import CheckpointError
from titan_core.runtime.events import Warned

DAMAGE = {
    "bits flipped": lambda f: flip(f / "__0_0.distcp"),
    "truncated": lambda f: os.truncate(f / "__0_0.distcp", (f / "__0_0.distcp").stat().st_size // 2),
    "tail lost": lambda f: os.truncate(f / "__0_0.distcp", (f / "__0_0.distcp").stat().st_size - 10),
    "data file missing": lambda f: (f / "__0_0.distcp").unlink(),
    "metadata missing": lambda f: (f / ".metadata").unlink(),
    "metadata damaged": lambda f: flip(f / ".metadata"),
    "shared state damaged": lambda f: (f / "shared.json").write_text("{"),
    "rank state missing": lambda f: (f / "ranks" / "0.json").unlink(),
    "manifest bits flipped": lambda f: flip(f / "manifest.json"),
    "manifest edited": lambda f: _edit(f / "manifest.json", '"world_size":1', '"world_size":2'),
    "rank state truncated": lambda f: os.truncate(f / "ranks" / "0.json", 3),
    "shared state of another form": lambda f: (f / "shared.json").write_text("[]"),
    "manifest damaged": lambda f: (f / "manifest.json").write_text("{"),
    "manifest of another form": lambda f: (f / "manifest.json").write_text("[]"),
}


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


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


@pytest.mark.parametrize("kind", ["metadata missing", "shared state damaged", "shared state of another form"])
def test_damage_is_a_sentence_without_hashes_too(kind: str, tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path, verify=False)
    save(checkpointer, 1)
    DAMAGE[kind](tmp_path / "step-1")
    with pytest.raises(CheckpointError) as caught:
        checkpointer.load(empty(), step=1)
    assert str(tmp_path / "step-1") in (caught.value.where or "")


@pytest.mark.parametrize("kind", DAMAGE)
def test_full_check_finds_every_damage(kind: str, tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    assert verify(str(tmp_path / "step-1")) == []
    DAMAGE[kind](tmp_path / "step-1")
    if kind != "rank state missing":
        assert verify(str(tmp_path / "step-1"))
    else:
        assert "missing" in verify(str(tmp_path / "step-1"))[0]


def test_full_check_finds_a_longer_file_and_numbers_that_are_none(tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    with data_file(tmp_path, 1).open("ab") as file:
        file.write(b"more")
    assert ["bytes, the manifest says" in problem for problem in verify(str(tmp_path / "step-1"))] == [True]
    weights = {"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)}
    open_at(tmp_path).save(2, Snapshot(weights, {}, {}), blocking=True)
    assert verify(str(tmp_path / "step-2")) == ["`bad` has numbers that are not finite"]


def _save_twice(folder: str) -> None:
    checkpointer = Checkpointer(folder, Checkpoint(), rank=dist.get_rank(), size=2)
    for step in (1, 2):
        own = {"rank": dist.get_rank()}
        checkpointer.save(step, Snapshot({"w": torch.full((5,), step)}, {"step": step}, own), blocking=True)


def _load_newest(folder: str, step: int) -> tuple:
    heard: list = []
    checkpointer = Checkpointer(folder, Checkpoint(), rank=dist.get_rank(), size=2, listener=heard.append)
    found = {"w": torch.zeros(5, dtype=torch.int64)}
    try:
        loaded = checkpointer.load(found, step)
    except CheckpointError as error:
        return (error.message,)
    return loaded.step, loaded.own, found["w"].tolist(), len(heard)


def test_damage_that_one_rank_sees_is_passed_over_by_all(tmp_path: Path) -> None:
    run_ranks(_save_twice, 2, str(tmp_path))
    flip(tmp_path / "step-2" / "ranks" / "1.json")
    found = run_ranks(_load_newest, 2, str(tmp_path), -1, timeout=20)
    assert found == [(1, {"rank": 0}, [1] * 5, 1), (1, {"rank": 1}, [1] * 5, 0)]
    errors = run_ranks(_load_newest, 2, str(tmp_path), 2, timeout=20)
    assert errors[0] == errors[1]
    assert "damaged" in errors[0][0]


def test_step_without_manifest_is_no_step(tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path)
    save(checkpointer, 1)
    save(checkpointer, 2)
    (tmp_path / "step-2" / "manifest.json").unlink()
    assert checkpointer.steps() == [1]


def test_every_checkpoint_damaged_is_an_error(tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path)
    save(checkpointer, 1)
    flip(data_file(tmp_path, 1))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        checkpointer.load(empty())


def _readable(step: Path, name: str) -> bool:
    try:
        load_tensors(str(step), {name: torch.zeros(SHAPES[name])}, strict=False)
    except CheckpointError:
        return False
    return True


def test_a_rank_checks_only_what_it_reads(tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    pieces = read_manifest(*split(str(tmp_path / "step-1"))).pieces["__0_0.distcp"]
    flip(data_file(tmp_path, 1), pieces[0][0] // 2)
    damaged = [name for name in SHAPES if not _readable(tmp_path / "step-1", name)]
    assert len(damaged) == 1
    with pytest.raises(CheckpointError, match="hash"):
        load_tensors(str(tmp_path / "step-1"), {damaged[0]: torch.zeros(SHAPES[damaged[0]])}, strict=False)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.mark,)


def _restep(step: Path, name: str, content: bytes) -> None:
    """Put other bytes in the place of a file of a step, with the hash that belongs to them: an attacker can."""
    manifest = read_manifest(*split(str(step)))
    if name in manifest.files:
        manifest.files[name] = (len(content), content_hash(content))
    else:
        manifest.pieces[name] = {0: (len(content), content_hash(content))}
    (step / name).write_bytes(content)
    (step / "manifest.json").write_bytes(manifest.to_json())


def test_steps_of_the_first_version_are_read(tmp_path: Path) -> None:
    """They have SHA-256, and pieces that torch.save wrote; they stay what they are when their manifest is written."""
    expected = save(open_at(tmp_path), 1)
    step = tmp_path / "step-1"
    manifest, metadata = read_manifest(*split(str(step))), pickle.loads((step / ".metadata").read_bytes())
    content, pieces = b"", {}
    for index, info in sorted(metadata.storage_data.items(), key=lambda entry: entry[1].offset):
        buffer = io.BytesIO()
        torch.save(expected[index.fqn], buffer)
        place = dataclasses.replace(info, offset=len(content), length=len(buffer.getvalue()))
        metadata.storage_data[index] = place
        pieces[place.offset] = place.length, hashlib.sha256(buffer.getvalue()).hexdigest()[:32]
        content += buffer.getvalue()
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    (step / "__0_0.distcp").write_bytes(content)
    manifest.version, manifest.pieces = 1, {"__0_0.distcp": pieces}
    for name in manifest.files:
        data = (step / name).read_bytes()
        manifest.files[name] = len(data), hashlib.sha256(data).hexdigest()[:32]
    (step / "manifest.json").write_bytes(manifest.to_json())
    found = empty()
    load_tensors(str(step), found)
    assert_equal(found, expected)
    assert verify(str(step)) == []
    flip(step / "__0_0.distcp", len(content) // 2)
    assert "hash" in verify(str(step))[0]


@pytest.mark.parametrize("check", [True, False])
def test_metadata_that_would_run_code_is_refused(check: bool, tmp_path: Path) -> None:
    mark, step = tmp_path / "was-here", tmp_path / "checkpoint" / "step-1"
    checkpointer = open_at(tmp_path / "checkpoint", verify=check)
    save(checkpointer, 1)
    _restep(step, ".metadata", pickle.dumps(Evil(mark)))
    with pytest.raises(CheckpointError, match=r"wants to run `posix.mkdir`.* refused"):
        checkpointer.load(empty(), step=1)
    assert "refused" in verify(str(step))[0]
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins eval",
        "torch load",
        "torch.serialization load",
        "torch.distributed.checkpoint.metadata Metadata.__init__.__globals__",
        "torch.distributed.checkpoint.metadata os",
        "torch float32.__class__",
    ],
)
def test_metadata_may_name_nothing_but_its_own_classes(name: str, tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    module, attribute = name.split()
    pickled = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, attribute)) + b"\x93."
    _restep(tmp_path / "step-1", ".metadata", pickled)
    with pytest.raises(CheckpointError, match="refused"):
        load_tensors(str(tmp_path / "step-1"), empty())


@pytest.mark.parametrize("place", ["../../elsewhere.distcp", "/elsewhere.distcp", "__0_0.distcp/../../x", 7])
@pytest.mark.parametrize("check", [True, False])
def test_metadata_cannot_point_outside_of_the_step(place: object, check: bool, tmp_path: Path) -> None:
    step = tmp_path / "checkpoint" / "step-1"
    save(open_at(tmp_path / "checkpoint"), 1)
    (tmp_path / "elsewhere.distcp").write_bytes((step / "__0_0.distcp").read_bytes())
    metadata = pickle.loads((step / ".metadata").read_bytes())
    metadata.storage_data = {
        index: dataclasses.replace(info, relative_path=place) for index, info in metadata.storage_data.items()
    }
    _restep(step, ".metadata", pickle.dumps(metadata))
    for use in (lambda: load_tensors(str(step), empty(), check=check), lambda: tensor_index(str(step))):
        with pytest.raises(CheckpointError, match=r"points outside|is damaged"):
            use()
    assert len(verify(str(step))) == 1


@pytest.mark.parametrize("name", ["../other/file", "/dev/zero", "ranks/../../file"])
def test_manifest_cannot_name_what_lies_outside(name: str, tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    manifest = read_manifest(*split(str(tmp_path / "step-1")))
    manifest.files[name] = (5, "0")
    (tmp_path / "step-1" / "manifest.json").write_bytes(manifest.to_json())
    with pytest.raises(CheckpointError, match=r"lies outside of the checkpoint: refused"):
        load_tensors(str(tmp_path / "step-1"), empty())
    assert "refused" in verify(str(tmp_path / "step-1"))[0]


@pytest.mark.parametrize("field", ["state_dict_metadata", "storage_data"])
def test_metadata_without_its_fields_is_damaged(field: str, tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    metadata = pickle.loads((tmp_path / "step-1" / ".metadata").read_bytes())
    del metadata.__dict__[field]
    if field == "storage_data":  # a class attribute stands in for it
        metadata.storage_data = None
    _restep(tmp_path / "step-1", ".metadata", pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="the metadata is damaged"):
        tensor_index(str(tmp_path / "step-1"))
    assert "the metadata is damaged" in verify(str(tmp_path / "step-1"))[0]


def _with_own_hash(tree: dict) -> bytes:
    def dump(value: dict) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    return dump({**tree, "hash": content_hash(dump(tree))})


@pytest.mark.parametrize("content", ["[" * 200_000, "infinite"])
def test_manifest_that_no_parser_likes_is_damaged(content: str, tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    data = content.encode()
    if content == "infinite":
        tree = {"version": VERSION, "step": float("inf"), "world_size": 1, "metrics": {}, "files": {}, "pieces": {}}
        data = _with_own_hash(tree)
    (tmp_path / "step-1" / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError, match="the manifest is damaged"):
        read_shared(str(tmp_path / "step-1"))


def test_shared_state_that_is_nested_too_deep_is_no_state(tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    _restep(tmp_path / "step-1", "shared.json", b"[" * 200_000)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_shared(str(tmp_path / "step-1"))


def test_renamed_step_is_passed_over(tmp_path: Path) -> None:
    checkpointer = open_at(tmp_path)
    save(checkpointer, 1)
    save(checkpointer, 2)
    (tmp_path / "step-1").rename(tmp_path / "step-9")
    loaded = checkpointer.load(empty())
    assert loaded.step == 2
    assert [step for step, _ in loaded.skipped] == [9]
    with pytest.raises(CheckpointError, match="of step 1 under another name") as caught:
        checkpointer.load(empty(), step=9)
    assert caught.value.tip == "rename the folder to step-1"


def test_newer_checkpoints_than_the_one_asked_for_are_named(tmp_path: Path) -> None:
    heard: list = []
    checkpointer = open_at(tmp_path, heard.append)
    for step in (1, 2, 3):
        save(checkpointer, step)
    heard.clear()
    checkpointer.load(empty(), step=3)
    assert heard == []
    checkpointer.load(empty(), step=1)
    assert ["up to step 3" in event.text for event in heard] == [True]


def test_tensor_that_would_run_code_is_refused(tmp_path: Path) -> None:
    mark, step = tmp_path / "was-here", tmp_path / "checkpoint" / "step-1"
    open_at(tmp_path / "checkpoint").save(1, Snapshot({"w": torch.zeros(4000)}, {}, {}), blocking=True)
    length = (step / "__0_0.distcp").stat().st_size
    evil = io.BytesIO()
    torch.save([Evil(mark), torch.zeros(3000)], evil)
    evil.write(bytes(length - len(evil.getvalue())))
    _restep(step, "__0_0.distcp", evil.getvalue())
    with pytest.raises(CheckpointError, match=r"cannot read a tensor"):
        load_tensors(str(step), {"w": torch.zeros(4000)})
    assert not mark.exists()


def test_object_in_the_place_of_a_tensor_is_not_read(tmp_path: Path) -> None:
    mark, step = tmp_path / "was-here", tmp_path / "checkpoint" / "step-1"
    dcp.save({"evil": Evil(mark)}, checkpoint_id=str(step), no_dist=True)
    with pytest.raises(CheckpointError, match="no manifest"):
        find_step(str(step))
    (step / "manifest.json").write_bytes(Manifest(1, 1).to_json())
    with pytest.raises(CheckpointError, match="evil is not a tensor, and is not read"):
        load_tensors(str(step), {"evil": torch.zeros(1)}, check=False)
    assert not mark.exists()


def test_missing_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors: x, y"):
        load_tensors(str(tmp_path / "step-1"), {"x": torch.zeros(1), "y": torch.zeros(1), "step": torch.zeros(())})
    with pytest.raises(CheckpointError, match=r"a.weight is \(7, 4\), wanted \(4, 7\)"):
        load_tensors(str(tmp_path / "step-1"), {"a.weight": torch.zeros(4, 7)})
    with pytest.raises(CheckpointError, match=r"has 3 tensors that the model lacks: a.weight, b.weight, b.bias"):
        load_tensors(str(tmp_path / "step-1"), {"step": torch.zeros(())})


def test_checkpoint_of_another_model_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    heard: list = []
    checkpointer = open_at(tmp_path, heard.append)
    save(checkpointer, 1)
    save(checkpointer, 2)
    with pytest.raises(CheckpointError, match="lacks 1 tensors: other"):
        checkpointer.load({"other": torch.zeros(1)})
    assert not [event for event in heard if isinstance(event, Warned)]


def _load_beside_others(step: str) -> str:
    found = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    if dist.get_rank() == 1:
        found["a.weight"] = torch.zeros(1, 1)
    try:
        load_tensors(step, found)
    except CheckpointError as error:
        return error.message
    return "loaded"


def test_model_only_load_fails_on_all_ranks_or_none(tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    first, second = run_ranks(_load_beside_others, 2, str(tmp_path / "step-1"), timeout=20)
    assert first == second
    assert "a.weight is (7, 4), wanted (1, 1)" in first


def test_shared_state_without_a_run(tmp_path: Path) -> None:
    save(open_at(tmp_path), 1)
    assert read_shared(str(tmp_path / "step-1")) == {"step": 1}
    (tmp_path / "step-1" / "shared.json").write_text("{")
    for check in (True, False):
        with pytest.raises(CheckpointError):
            read_shared(str(tmp_path / "step-1"), check=check)
