"""`titan doctor`: what it finds, and what it says when something is wrong."""

import collections
import json
import os
from pathlib import Path

import pytest
import torch

from tests.cli.test_cli import call
from titan_core.jobs import doctor


def finding(name: str, folder: str = ".") -> doctor.Finding:
    return next(one for one in doctor.run(folder) if one.name == name)


def test_a_machine_that_can_train(tmp_path: Path, capsys) -> None:
    code, out, _ = call("doctor", "--folder", str(tmp_path), "--json", capsys=capsys)
    found = {one["name"]: one for one in json.loads(out)["findings"]}
    assert code == 0
    assert found["torch"]["text"] == torch.__version__
    assert "gloo (two ranks tried)" in found["collectives"]["text"]
    assert found["disk"]["state"] == "ok"
    assert f"of {os.cpu_count()} usable" in found["cores"]["text"]
    assert all(one["tip"] for one in found.values() if one["state"] != "ok")
    assert not list(tmp_path.iterdir())


def test_a_machine_that_cannot_train_ends_with_3(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    code, out, _ = call("doctor", "--folder", str(tmp_path), capsys=capsys)
    assert code == 3
    line = next(line for line in out.splitlines() if line.startswith("collectives"))
    assert "wrong" in line
    assert "nosuch0" in line
    assert "GLOO_SOCKET_IFNAME=lo" in line


def test_an_old_torch_is_wrong(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    found = finding("torch")
    assert (found.state, found.tip) == ("wrong", "pip install -U 'torch>=2.11'")
    assert not doctor.can_train([found])


def test_a_folder_that_cannot_be_written_is_wrong(monkeypatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    found = finding("disk", "somewhere/that/does/not/exist")
    assert found.state == "wrong"
    assert "Read-only" in found.text
    assert "--run" in str(found.tip)


def test_little_shared_memory_is_wrong_but_no_obstacle(monkeypatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(1 << 26, 0, 1 << 26))
    found = finding("shared memory")
    assert found.state == "wrong"
    assert "--shm-size" in str(found.tip)
    assert doctor.can_train([found])


@pytest.mark.parametrize(
    ("text", "expected"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("2147483648\n", 2.0**31), ("", None)]
)
def test_limits_of_containers(text: str, expected: float | None, monkeypatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    assert doctor._cgroup_number("any") == expected


def test_a_driver_that_torch_cannot_use_is_wrong(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(Path, "exists", lambda self: True)
    found = finding("devices")
    assert found.state == "wrong"
    assert "nvidia-smi" in str(found.tip)
