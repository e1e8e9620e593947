"""`titan config` where it meets runs, sections and editors."""

import json
from pathlib import Path

import pytest

from tests.cli.test_cli import call
from titan_core.config.fields import fields
from titan_core.config.load import load, to_dict


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    old, new = ({"kind": "start", "config": to_dict(load(None, [("training.steps", n)]).config)} for n in ("5", "7"))
    lines = [json.dumps(old), json.dumps({"step": 1}), json.dumps(new), '{"kind": "start", "config": {"tr']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_a_run_shows_the_config_that_it_recorded_last(run_folder: Path, capsys) -> None:
    code, out, _ = call("config", "show", str(run_folder), "--changed", capsys=capsys)
    assert code == 0
    assert out.split() == ["[training]", "steps", "=", "7"]
    path = run_folder / "a.toml"
    path.write_text("[training]\nsteps = 8\n")
    code, out, _ = call("config", "diff", str(run_folder), str(path), "--json", capsys=capsys)
    assert json.loads(out)["differences"] == {"training.steps": [7, 8]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no metrics.jsonl"),
        ("", "recorded no config"),
        ('{"step": 1}\n', "recorded no config"),
        ('{"config": 5}\n', "recorded no config"),
        ('{"config": {"training": {"stps": 1}}}\n', "training.steps"),
        ('{"config": \n', "cannot read"),
        ('["config"]\n', "cannot read"),
    ],
)
def test_a_folder_that_is_no_run_is_explained(text: str | None, said: str, tmp_path: Path, capsys) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    code, _, err = call("config", "show", str(tmp_path), capsys=capsys)
    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    "words",
    [["schema"], ["explain", "optimizer.lr"], ["list"], ["diff", "llama3_8b", "llama3_1b"], ["show", "."]],
    ids=lambda words: words[0],
)
def test_flags_that_would_do_nothing_are_refused(words: list[str], run_folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(run_folder)
    code, out, err = call("config", *words, "--training.steps", "1", capsys=capsys)
    assert (code, out) == (2, "")
    assert "training.steps" in err


def test_a_section_is_explained_by_its_keys(capsys) -> None:
    code, out, _ = call("config", "explain", "optimizer", capsys=capsys)
    assert code == 0
    assert all(key in out for key in fields() if key.startswith("optimizer."))
    assert "training." not in out
    for spelling in ("--optimizer.weight-decay", "optimizer.weight_decay"):
        code, out, _ = call("config", "explain", "--", spelling, capsys=capsys)
        assert (code, out.splitlines()[0]) == (0, "optimizer.weight_decay")


def test_the_schema_lets_an_editor_mark_misspelt_keys(capsys) -> None:
    _, out, _ = call("config", "schema", "--json", capsys=capsys)
    tree = json.loads(out)["json_schema"]
    assert all(entry["additionalProperties"] is False for entry in tree["$defs"].values())
    assert tree["$defs"]["Config"]["properties"]["extends"]["type"] == "string"
    assert tree["$defs"]["Training"]["properties"]["steps"]["minimum"] == 1
    assert sorted(tree["$defs"]["Optimizer"]["properties"]["name"]["enum"]) == ["Adam", "AdamW"]
    args = tree["$defs"]["Model"]["properties"]["args"]
    assert args.get("additionalProperties", True) is not False
