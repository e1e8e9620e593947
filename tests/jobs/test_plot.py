"""Pictures of runs."""

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import call
from titan_core.jobs.plot import read_curve
from titan_core.runtime.errors import UsageError


def write(folder: Path, records: list[dict], tail: str = "") -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)


def test_curves_and_picture(tmp_path: Path, capsys) -> None:
    steps = [{"event": "stepdone", "step": s, "loss": 5.0 - s} for s in (1, 2, 2, 3)]
    write(tmp_path / "a", [{"event": "started"}, *steps, {"event": "validated", "step": 2, "loss": 3.5}], '{"cut')
    curve = read_curve(str(tmp_path / "a"))
    assert (curve.steps, curve.losses) == ([1, 2, 3], [4.0, 3.0, 2.0])
    assert (curve.validated_steps, curve.validated_losses) == ([2], [3.5])
    for ending, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        out = tmp_path / f"x.{ending}"
        code, text, _ = call("plot", str(tmp_path / "a"), "--out", str(out), capsys=capsys)
        assert code == 0
        assert "loss 4.0000 -> 2.0000 in 3 steps" in text
        assert out.read_bytes().startswith(magic)


@pytest.mark.parametrize("make", ["nothing", "empty"])
def test_no_run(make: str, tmp_path: Path) -> None:
    if make == "empty":
        write(tmp_path / "a", [{"event": "started"}])
    with pytest.raises(UsageError):
        read_curve(str(tmp_path / "a"))


def test_unwritable_picture(tmp_path: Path, capsys) -> None:
    write(tmp_path / "a", [{"event": "stepdone", "step": 1, "loss": 1.0}])
    assert call("plot", str(tmp_path / "a"), "--out", str(tmp_path / "no" / "x.png"), capsys=capsys)[0] == 2
    assert call("plot", str(tmp_path / "a"), "--out", str(tmp_path / "x.txt"), capsys=capsys)[0] == 2
