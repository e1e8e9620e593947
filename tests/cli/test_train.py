"""What `titan train` says at its end, and its exit codes, with a job that only pretends."""

import json
import sys
import types
from pathlib import Path

import pytest

from tests.cli.test_cli import call
from titan_core.jobs.train import TrainResult


@pytest.fixture
def ends(monkeypatch, tmp_path: Path):
    """Return a function that makes the training job end in a given way."""
    monkeypatch.chdir(tmp_path)

    def make(**how) -> None:
        run = how.pop("run", "outputs/llama3_debugmodel")
        step = how.get("step", 100)
        usual = {
            "run": run,
            "step": step,
            "steps": 100,
            "tokens": 10,
            "first_loss": 8.0,
            "last_loss": 4.0,
            "checkpoint": f"{run}/checkpoint/step-{step}",
            "seconds": 1.0,
            "finished": step == 100,
            "stopped_by": None,
        }
        job = types.ModuleType("titan_core.jobs.train")
        job.run = lambda resolved, **_: TrainResult(**{**usual, **how})
        monkeypatch.setitem(sys.modules, "titan_core.jobs.train", job)
        monkeypatch.setattr("titan_core.jobs.train", job)

    return make


def next_lines(err: str) -> list[str]:
    lines = err.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("next"))
    return [line[10:] for line in lines[start:]]


def test_a_finished_run_names_the_commands_that_follow(ends, capsys) -> None:
    ends()
    code, out, err = call("train", "--optimizer.lr", "1e-3", "--until", "100", "--run=r", capsys=capsys)
    assert (code, out) == (0, "")
    assert "done      step 100/100, 10 tokens, loss 8.0000 -> 4.0000" in err
    assert next_lines(err) == [
        "titan train --optimizer.lr 1e-3 --run=r --training.steps 200",  # the flags stay: without them it cannot resume
        "titan generate llm --checkpoint outputs/llama3_debugmodel --prompt 'def main():'",
        "titan validate loss outputs/llama3_debugmodel --data embedded",
    ]


def test_more_steps_replace_those_that_were_asked_for(ends, capsys) -> None:
    ends()
    _, _, err = call("train", "--training.steps", "100", "--resume", "auto", capsys=capsys)
    assert next_lines(err)[0] == "titan train --training.steps 200"


def test_a_run_that_is_finished_already_says_how_to_start_afresh(ends, capsys, tmp_path: Path) -> None:
    (tmp_path / "outputs/llama3_debugmodel-2").mkdir(parents=True)
    ends(first_loss=None, last_loss=None)
    code, _, err = call("train", capsys=capsys)
    assert code == 0
    assert "is finished: it is at its last step, 100, already" in err
    assert next_lines(err)[:2] == ["titan train --training.steps 200", "titan train --run outputs/llama3_debugmodel-3"]


def test_a_run_beyond_until_is_not_called_finished(ends, capsys) -> None:
    ends(first_loss=None, last_loss=None, step=51)
    _, _, err = call("train", "--until", "1", capsys=capsys)
    assert "is at step 51, and `--until 1` asks for no more" in err
    assert next_lines(err)[0] == "titan train"


@pytest.mark.parametrize(
    ("stopped_by", "checkpoint", "expected"),
    [
        ("SIGINT", "r/checkpoint/step-51", 75),
        ("SIGTERM", "r/checkpoint/step-51", 75),
        ("the time limit", "r/checkpoint/step-51", 75),
        ("SIGINT", None, 130),
        ("SIGTERM", None, 143),
        ("SIGINT", "r/checkpoint/step-50", 130),  # what was resumed, in a run that only loads
    ],
)
def test_75_means_saved(stopped_by: str, checkpoint: str | None, expected: int, ends, capsys) -> None:
    ends(step=51, stopped_by=stopped_by, checkpoint=checkpoint)
    code, _, err = call("train", capsys=capsys)
    assert code == expected
    assert ("nothing was saved" in err) == (expected != 75)
    code, out, _ = call("train", "--json", capsys=capsys)
    assert code == expected
    found = json.loads(out)
    assert found["ok"] is (expected == 75)
    assert found.get("error", {}).get("code", 75) == expected


def test_a_warmup_that_is_cut_short_is_said_once(ends, capsys, monkeypatch) -> None:
    ends()
    _, _, err = call("train", "--training.steps", "3", capsys=capsys)
    assert err.count("`lr_scheduler.warmup_steps` 10 is shortened to the 3 of `training.steps`") == 1
    _, _, err = call("train", capsys=capsys)
    assert "shortened" not in err


def test_a_misspelt_key_to_allow_is_refused_before_torch_is_loaded(ends, capsys) -> None:
    ends()
    code, _, err = call("train", "--allow-change", "optimizer.lrr", capsys=capsys)
    assert code == 2
    assert "loading torch" not in err
    assert "did you mean `optimizer.lr`" in err
