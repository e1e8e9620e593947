"""Where numbers go: JSON lines that survive a crash, TensorBoard, Weights & Biases."""

import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.runs import tiny
from titan_core.observe.loggers import JsonLines, WandB, open_loggers, scalars
from titan_core.runtime.errors import MachineError, RemoteError, RunFailed
from titan_core.runtime.events import Note, Sampled, Saved, StepDone, Validated, Warned


def step(number: int = 7, loss: float = 2.5, **extra: float) -> StepDone:
    return StepDone(number, 100, loss, 3.0, 0.5, 1e-3, 999, 0.25, 4000.0, 12.0, 0.4, 1.5, 0.75, 0.1, 30.0, extra)


def records(path: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_events_become_records(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "new" / "metrics.jsonl")
    log.record("started", config={"training": {"steps": 5}})
    for event in (step(), Validated(7, 2.25, 100, 1.0), Saved(7, "p", 10, 1.0, 0.1), Warned("odd"), Note("not kept")):
        log(event)
    found = records(log.path)  # before it is closed: every record is flushed
    assert [r["event"] for r in found] == ["started", "stepdone", "validated", "saved", "warned"]
    assert found[0]["config"] == {"training": {"steps": 5}}
    assert (found[1]["step"], found[1]["loss"], found[1]["mfu"]) == (7, 2.5, 0.4)
    assert found[4]["text"] == "odd"
    assert all(r["time"] > 1e9 for r in found)
    log.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_null(tmp_path: Path, value: float) -> None:
    log = JsonLines(tmp_path / "metrics.jsonl")
    log(step(loss=value, strange=value))
    log.record("own", rows=[1.0, {"deep": value}])
    first, second = records(log.path)
    assert first["loss"] is None
    assert first["extra"] == {"strange": None}
    assert first["max_loss"] == 3.0
    assert second["rows"] == [1.0, {"deep": None}]


@pytest.mark.parametrize("torn", ["", '{"event": "stepd', '{"event": "' + "x" * 200_000])
def test_a_torn_line_is_dropped_and_the_rest_kept(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for number in range(3):
        log(step(number))
    log.record("wide", step=3, text="y" * 100_000)
    log.close()
    path.write_bytes(path.read_bytes() + torn.encode())
    again = JsonLines(path)
    again.record("resumed", step=2)
    found = records(path)
    assert [r["event"] for r in found] == ["stepdone"] * 3 + ["wide", "resumed"]
    assert [r["step"] for r in found] == [0, 1, 2, 3, 2]


def test_a_file_of_one_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event"')
    JsonLines(path).record("started")
    assert [r["event"] for r in records(path)] == ["started"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFailed, match="cannot write the log") as caught:
        JsonLines(tmp_path / "file" / "metrics.jsonl")
    assert caught.value.where is not None
    assert "--run" in (caught.value.tip or "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk() -> None:
    log = JsonLines.__new__(JsonLines)
    log.path = Path("/dev/full")
    log._file = log.path.open("w")
    with pytest.raises(RunFailed, match="No space left"):
        log.record("started")
    log.close()


def test_names_of_numbers() -> None:
    found = scalars(step(**{"memory/num_ooms": 1.0}))
    assert found["loss_metrics/global_avg_loss"] == 2.5
    assert found["loss_metrics/global_max_loss"] == 3.0
    assert found["mfu(%)"] == pytest.approx(40.0)
    assert found["time_metrics/data_loading(%)"] == pytest.approx(10.0)
    assert found["memory/max_reserved(%)"] == pytest.approx(75.0)
    assert found["memory/num_ooms"] == 1.0
    assert scalars(Validated(7, 2.25, 100, 1.5))["validation_metrics/loss"] == 2.25
    assert scalars(Note("text")) == {}


def test_which_ranks_log(tmp_path: Path) -> None:
    one = tiny(tmp_path).config
    assert len(open_loggers(one, 0)) == 1
    assert open_loggers(one, 1) == []
    every = tiny(tmp_path, metrics__save_for_all_ranks=True).config
    (logger,) = open_loggers(every, 3)
    logger(step())
    assert [r["step"] for r in records(tmp_path / "metrics-rank3.jsonl")] == [7]


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny(tmp_path, metrics__enable_tensorboard=True).config
    for logger in open_loggers(config, 0):
        for number in (1, 2):
            logger(step(number, loss=5.0 - number))
        logger.close()
    (folder,) = (tmp_path / "tb").iterdir()
    read = EventAccumulator(str(folder)).Reload()
    found = [(event.step, event.value) for event in read.Scalars("loss_metrics/global_avg_loss")]
    assert found == [(1, 4.0), (2, 3.0)]


@pytest.mark.parametrize(
    ("package", "key"), [("torch.utils.tensorboard", "enable_tensorboard"), ("wandb", "enable_wandb")]
)
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch, package: str, key: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MachineError) as caught:
        open_loggers(tiny(tmp_path, **{f"metrics__{key}": True}).config, 0)
    assert caught.value.tip == "pip install 'titan-pretrain[logging]'"


def test_wandb_without_an_account(tmp_path: Path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")

    def init(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(RemoteError, match="did not start: No API key") as caught:
        WandB(tmp_path / "wandb", {})
    assert "WANDB_MODE=offline" in (caught.value.tip or "")


class FakeRun:
    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.axes: list[tuple] = []

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.rows.append({"finished": True})


def test_wandb_rows_carry_their_step(tmp_path: Path, monkeypatch) -> None:
    """A run that resumes at step 4 after a line of step 6 must not lose its lines 5 and 6."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    runs, ids = [], []

    def init(**options: object) -> FakeRun:
        ids.append((options["id"], options["resume"]))
        runs.append(FakeRun())
        return runs[-1]

    monkeypatch.setattr(wandb, "init", init)
    for numbers in ((5, 6), (5, 6, 7)):
        logger = WandB(tmp_path / "wandb", {"a": 1})
        for number in numbers:
            logger(step(number))
        logger(Note("no numbers"))
        logger.close()
    assert ids[0] == ids[1]
    assert ids[0][1] == "allow"
    assert runs[0].axes == [("*", "step")]
    assert [row["step"] for row in runs[1].rows[:-1]] == [5, 6, 7]
    assert runs[1].rows[0]["lr"] == 1e-3


def test_wandb_gets_sample_images_with_their_captions(tmp_path: Path, monkeypatch) -> None:
    """A module with W&B's names stands in for the package: nothing but what we call."""
    runs: list[FakeRun] = []

    def init(**options: object) -> FakeRun:
        runs.append(FakeRun())
        return runs[-1]

    errors = ModuleType("wandb.errors")
    errors.Error = RuntimeError  # pyright: ignore[reportAttributeAccessIssue]
    stub = ModuleType("wandb")
    stub.init = init  # pyright: ignore[reportAttributeAccessIssue]
    stub.Image = lambda pixels, caption: (pixels.shape, int(pixels.sum()), caption)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setitem(sys.modules, "wandb.errors", errors)
    logger = WandB(tmp_path / "wandb", {})
    pictures = [np.full((2, 3, 3), number, dtype=np.uint8) for number in (1, 2)]
    logger(Sampled(7, ["a.png", "b.png"], ["a cat", "a dog"], pictures))
    assert runs[0].rows == [{"step": 7, "samples": [((2, 3, 3), 18, "a cat"), ((2, 3, 3), 36, "a dog")]}]
