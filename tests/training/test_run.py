"""Runs as a whole: metrics, validation, traces, what changes and what must not."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import titan_core
from tests.runs import losses, tiny
from titan_core.checkpoint import find_step
from titan_core.checkpoint.places import split
from titan_core.checkpoint.reader import Reader
from titan_core.config.load import load
from titan_core.jobs import train
from titan_core.runtime.errors import ConfigError, RunFailed
from titan_core.runtime.events import Note, StepDone, Validated

VALIDATE = {
    "validation__enable": True,
    "validation__freq": 3,
    "validation__steps": 3,
    "validation__seq_len": 32,
    "validation__local_batch_size": 4,
}


def events(resolved, **options) -> list:
    found: list = []
    train.run(resolved, listener=found.append, **options)
    return found


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_logged(tmp_path: Path) -> None:
    changes = {"metrics__enable_tensorboard": True, "metrics__log_freq": 2}
    found = [event for event in events(tiny(tmp_path, **changes)) if isinstance(event, StepDone)]
    assert [event.step for event in found] == [1, 2, 4, 6]
    for event in found:
        assert event.tokens == event.step * 8 * 32
        assert event.tokens_per_second > 0
        assert event.max_loss >= event.loss - 1e-6
        assert 0 <= event.data_share <= 1
        assert event.mfu is None
        assert event.memory_gib > 0.01
    lines = records(tmp_path)
    assert lines[0]["event"] == "started"
    assert lines[0]["config"]["training"]["seq_len"] == 32
    assert [line["loss"] for line in lines if line["event"] == "stepdone"] == [event.loss for event in found]
    assert list((tmp_path / "tb").rglob("events.out*"))


def test_wandb_offline_keeps_its_run_id(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    changes = {"metrics__enable_wandb": True, "checkpoint__enable": True}
    losses(tiny(tmp_path, **changes), until=3)
    first = (tmp_path / "wandb" / "wandb-run-id").read_text()
    losses(tiny(tmp_path, **changes))
    assert (tmp_path / "wandb" / "wandb-run-id").read_text() == first
    assert len(list((tmp_path / "wandb" / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.parametrize(("ranks", "local"), [(1, 8), (2, 2), (4, 1)])
def test_validation_is_the_same_on_every_layout(ranks: int, local: int, tmp_path: Path) -> None:
    losses(tiny(tmp_path / "one", training__local_batch_size=8, **VALIDATE))
    losses(tiny(tmp_path / "many", training__local_batch_size=local, **VALIDATE), ranks)
    one, many = ([r for r in records(tmp_path / name) if r["event"] == "validated"] for name in ("one", "many"))
    assert [r["step"] for r in one] == [1, 3, 6]
    assert [r["tokens"] for r in one] == [r["tokens"] for r in many] == [3 * 4 * 32] * 3
    assert [r["loss"] for r in many] == pytest.approx([r["loss"] for r in one], rel=1e-5)


def test_validating_does_not_change_training(tmp_path: Path) -> None:
    assert losses(tiny(tmp_path / "a", **VALIDATE)) == losses(tiny(tmp_path / "b"))


def test_a_save_after_a_validation_finds_shards(tmp_path: Path) -> None:
    changes = {"checkpoint__enable": True, "training__steps": 3, "lr_scheduler__warmup_steps": 1}
    losses(tiny(tmp_path, **changes, **VALIDATE), ranks=2)
    reader = Reader(*split(find_step(str(tmp_path / "checkpoint"))), check=True)
    entries: dict[str, Any] = reader.metadata.state_dict_metadata
    pieces = {name: len(entry.chunks) for name, entry in entries.items() if not name.startswith("optimizer.")}
    assert "tok_embeddings.weight" in pieces
    assert pieces == dict.fromkeys(pieces, 2)


def test_best_checkpoint_is_kept(tmp_path: Path) -> None:
    changes = {"checkpoint__enable": True, "checkpoint__interval": 1, "checkpoint__keep_latest_k": 1}
    found = events(tiny(tmp_path, checkpoint__keep_best_k=1, **{**VALIDATE, "validation__freq": 1}, **changes))
    validated = {event.step: event.loss for event in found if isinstance(event, Validated)}
    kept = {int(p.name.split("-")[1]) for p in (tmp_path / "checkpoint").iterdir()}
    assert kept == {6, min(validated, key=validated.__getitem__)}


def test_traces_and_snapshots_at_their_steps(tmp_path: Path) -> None:
    changes = {
        "profiling__enable_profiling": True,
        "profiling__profile_freq": 3,
        "profiling__profiler_warmup": 1,
        "profiling__enable_memory_snapshot": True,
        "profiling__memory_snapshot_freq": 4,
    }
    losses(tiny(tmp_path, **changes))
    traces = sorted((tmp_path / "profile_traces").rglob("*.json"))
    assert [path.parent.name for path in traces] == ["step_3", "step_6"]
    assert json.loads(traces[0].read_text())["traceEvents"]
    (snapshot,) = (tmp_path / "memory_snapshot").rglob("*.json")
    assert snapshot.parent.name == "step_4"
    assert json.loads(snapshot.read_text())["tensor_bytes"] > 0


def test_out_of_memory_is_explained(tmp_path: Path, monkeypatch) -> None:
    def exhausted(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 GB")

    monkeypatch.setattr("titan_core.training.trainer.forward_backward", exhausted)
    with pytest.raises(RunFailed, match="out of memory") as caught:
        losses(tiny(tmp_path))
    assert "--training.local_batch_size 2" in (caught.value.tip or "")
    assert json.loads(Path(caught.value.where).read_text())["tensors"]["resident_bytes"] > 0


def test_a_new_learning_rate_must_be_allowed(tmp_path: Path) -> None:
    changes = {"checkpoint__enable": True}
    losses(tiny(tmp_path, **changes), until=3)
    with pytest.raises(ConfigError, match=r"optimizer.lr.*0\.01"):
        losses(tiny(tmp_path, optimizer__lr="2e-2", **changes))
    found = events(tiny(tmp_path, optimizer__lr="2e-2", **changes), allow_change=["optimizer.lr"])
    assert any(isinstance(e, Note) and "optimizer.lr changes from 0.01 to 0.02" in e.text for e in found)
    rates = [event.lr for event in found if isinstance(event, StepDone)]
    assert rates[0] == pytest.approx(0.02, rel=0.3)


def test_harmless_changes_need_no_permission(tmp_path: Path) -> None:
    changes = {"checkpoint__enable": True}
    losses(tiny(tmp_path, **changes), until=3)
    more = losses(
        tiny(tmp_path, metrics__log_freq=1, checkpoint__interval=2, activation_checkpoint__mode="full", **changes)
    )
    assert len(more) == 3


def test_resume_never_does_not_overwrite(tmp_path: Path) -> None:
    losses(tiny(tmp_path, checkpoint__enable=True))
    with pytest.raises(ConfigError, match="would overwrite"):
        losses(tiny(tmp_path, checkpoint__enable=True), resume="never")


def test_resume_from_a_step(tmp_path: Path) -> None:
    changes = {"checkpoint__enable": True, "checkpoint__interval": 2}
    whole = losses(tiny(tmp_path, **changes))
    assert losses(tiny(tmp_path, **changes), resume="2") == whole[2:]


def test_start_from_the_weights_of_another_run(tmp_path: Path) -> None:
    losses(tiny(tmp_path / "first", checkpoint__enable=True))
    path = find_step(str(tmp_path / "first"))
    found = events(tiny(tmp_path / "second", checkpoint__initial_load_path=path))
    assert any(isinstance(e, Note) and "started from the weights" in e.text for e in found)
    first = next(event.loss for event in found if isinstance(event, StepDone))
    assert first < losses(tiny(tmp_path / "third"))[0] - 0.3


def test_empty_folder_does_not_hide_the_initial_weights(tmp_path: Path) -> None:
    losses(tiny(tmp_path / "first", checkpoint__enable=True))
    (tmp_path / "second" / "checkpoint").mkdir(parents=True)
    resolved = tiny(tmp_path / "second", checkpoint__enable=True, checkpoint__initial_load_path=str(tmp_path / "first"))
    assert any(isinstance(e, Note) and "started from" in e.text for e in events(resolved))


def test_seed_checkpoint(tmp_path: Path) -> None:
    result = train.run(tiny(tmp_path, checkpoint__enable=True, checkpoint__create_seed_checkpoint=True))
    assert result.step == 0
    assert find_step(str(tmp_path)).endswith("step-0")
    assert losses(tiny(tmp_path, checkpoint__enable=True)) == losses(tiny(tmp_path / "other"))


def test_weights_export_at_the_last_step(tmp_path: Path) -> None:
    from titan_core.checkpoint import tensor_index

    changes = {"checkpoint__last_save_model_only": True, "checkpoint__export_dtype": "bfloat16"}
    losses(tiny(tmp_path, checkpoint__enable=True, **changes))
    index = tensor_index(find_step(str(tmp_path / "checkpoint" / "weights")))
    assert not any(name.startswith("optimizer.") for name in index)
    assert {dtype for _, dtype in index.values()} == {torch.bfloat16}
    full = tensor_index(find_step(str(tmp_path)))
    assert any(name.startswith("optimizer.") for name in full)


def test_parts_left_out_of_loading(tmp_path: Path) -> None:
    changes = {"checkpoint__enable": True}
    losses(tiny(tmp_path, **changes), until=3)
    fresh = losses(tiny(tmp_path, checkpoint__exclude_from_loading="dataloader,train_state", **changes))
    assert len(fresh) == 6


def test_checkpoints_at_a_url(tmp_path: Path) -> None:
    changes = {"checkpoint__enable": True, "checkpoint__interval": 2, "checkpoint__folder": f"memory://runs{tmp_path}"}
    whole = losses(tiny(tmp_path / "whole"))
    begun = losses(tiny(tmp_path / "cut", **changes), until=4)
    assert begun + losses(tiny(tmp_path / "cut", **changes)) == whole
    assert not (tmp_path / "cut" / "checkpoint").exists()


def test_parameter_groups_by_pattern(tmp_path: Path) -> None:
    path = tmp_path / "groups.toml"
    text = 'extends = "llama3_debugmodel"\n[[optimizer.param_groups]]\npattern = "layers.*"\nlr_factor = 0.0\n'
    path.write_text(text + "weight_decay = 0.0\n")
    changed = load(str(path)).config.optimizer.param_groups
    resolved = tiny(tmp_path / "run", checkpoint__enable=True)
    optimizer = dataclasses.replace(resolved.config.optimizer, param_groups=changed)
    config = dataclasses.replace(resolved.config, optimizer=optimizer)
    losses(dataclasses.replace(resolved, config=config))
    seed = tiny(tmp_path / "seed", checkpoint__enable=True, checkpoint__create_seed_checkpoint=True)
    train.run(seed)
    trained, fresh = (titan_core.load(str(tmp_path / name)).state_dict() for name in ("run", "seed"))
    frozen = {name for name in fresh if torch.equal(trained[name], fresh[name])}
    assert frozen == {name for name in fresh if name.startswith("layers.")}


def test_two_runs_in_one_process_do_not_meet(tmp_path: Path) -> None:
    alone = losses(tiny(tmp_path / "a"))
    losses(tiny(tmp_path / "b", **{"model.args.dim": 64, "training__seed": 3}))
    assert losses(tiny(tmp_path / "c")) == alone


def test_deterministic_mode_runs(tmp_path: Path) -> None:
    try:
        first = losses(tiny(tmp_path / "a", training__deterministic=True))
        assert first == losses(tiny(tmp_path / "b", training__deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_seed_is_drawn_once_and_kept(tmp_path: Path) -> None:
    resolved = tiny(tmp_path, checkpoint__enable=True, training__seed="none")
    begun = losses(resolved, until=3)
    shared = json.loads((tmp_path / "checkpoint" / "step-3" / "shared.json").read_text())
    whole = losses(tiny(tmp_path / "whole", training__seed=shared["seed"]))
    assert begun + losses(resolved) == whole


def test_custom_import(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_titan_extension.py").write_text("import os\nos.environ['TITAN_TEST_IMPORT'] = 'yes'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("TITAN_TEST_IMPORT", raising=False)
    losses(tiny(tmp_path / "run", experimental__custom_import="my_titan_extension"))
    assert os.environ.pop("TITAN_TEST_IMPORT") == "yes"


def test_default_run_needs_nothing() -> None:
    config = load("llama3_debugmodel").config
    assert config.training.dataset == "embedded"
    assert config.model.hf_assets_path == ""
