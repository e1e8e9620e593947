"""A parameter that two stages of a pipeline use is one parameter: in steps, in checkpoints and in folders of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from tests.parity.layouts import assert_same, first_steps
from tests.parity.test_layouts import alone, ranks_of, settings_of, validation_losses
from tests.parity.test_mtp_layouts import MTP
from tests.ranks import run_ranks
from tests.runs import losses, tiny
from titan_core.config.layout import Layout
from titan_core.config.load import Resolved
from titan_core.models import resolve
from titan_core.optim.build import state_tensors
from titan_core.parallel import legal
from titan_core.runtime import distributed
from titan_core.runtime.events import silent
from titan_core.training.build import build
from titan_core.training.step import forward_backward

TABLE = "tok_embeddings.weight"
TIED: dict[str, Any] = {"model.args.tied": True}
IN_A_V = {"pp": 2, "schedule": "ZBVZeroBubble" if torch.__version__ >= "2.12" else "Interleaved1F1B"}
FURTHER = {**MTP, "model.args.n_layers": 5, "model.args.num_mtp_layers": 1}


def state_after_steps(resolved: Resolved) -> dict[str, Tensor]:
    """Return all that a rank keeps of the table after three steps: weights and states of the optimizer, whole."""
    parts = build(resolved.config, distributed.start(), silent)
    for _ in range(3):
        forward_backward(parts, lambda: next(parts.loader))
        parts.update(1e-2)
    parts.loader.close()
    kept: dict[str, Any] = {**parts.parameters, **state_tensors(parts.optimizer)}
    return {name: getattr(x, "full_tensor", x.clone)().detach() for name, x in kept.items() if TABLE in name}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_holders_stay_equal_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    settings = settings_of({"pp": 2, "dp": 2}, {**TIED, "training__max_norm": 0.1, "training__dtype": dtype})
    everyone = run_ranks(state_after_steps, 4, tiny(tmp_path, **settings))
    kinds = ("exp_avg", "exp_avg_sq", "step")
    assert set(everyone[0]) == {TABLE, *(f"optimizer.state.{TABLE}.{kind}" for kind in kinds)}
    for one in everyone[1:]:
        assert all(torch.equal(one[name], x) for name, x in everyone[0].items())


def held_in_a_v(resolved: Resolved) -> list[tuple[bool, ...]]:
    """Return of each copy whether it is not trained, its gradient was taken, and it follows when it is used again."""
    parts = build(resolved.config, distributed.start(), silent)
    forward_backward(parts, lambda: next(parts.loader))
    parts.update(1e-2)
    trained = {id(p) for group in parts.optimizer.param_groups for p in group["params"]}
    pipeline: Any = parts.parallel
    found = []
    for follower, leader in pipeline.ties.followers:
        stays = id(follower) not in trained and id(leader) in trained and not torch.equal(follower, leader)
        pipeline.ties.follow()
        found.append((stays, follower.grad is None, torch.equal(follower, leader)))
    parts.loader.close()
    return found


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 cannot split the backward of a V")
def test_of_two_stages_on_a_rank_one_trains(tmp_path: Path) -> None:
    first, other = run_ranks(held_in_a_v, 2, tiny(tmp_path, **settings_of(IN_A_V, TIED)))
    assert first == [(True, True, True)]
    assert other == []


SCHEDULES = {
    "1F1B": "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n",
    "split": "0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1I0,1W0,1F1,1I1,1W1\n",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_ones_own(schedule: str, tmp_path: Path) -> None:
    if schedule == "split" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 cannot split backwards of functions in Python")
    file = tmp_path / "schedule.csv"
    file.write_text(SCHEDULES[schedule])
    mine = {"pipeline_parallel_schedule_csv": file, "pipeline_parallel_microbatch_size": 4}
    settings = settings_of({"pp": 2}, TIED) | {f"parallelism.{key}": value for key, value in mine.items()}
    assert_same(first_steps(tiny(tmp_path, **settings), 2), alone("tied"))


def test_freed_weights_and_split_backwards_are_refused(tmp_path: Path) -> None:
    def problems(layout: dict[str, Any]) -> list[str]:
        config = tiny(tmp_path, **settings_of({**layout, "reshard": "always"}, TIED)).config
        family, sizes = resolve(config.model)
        found = legal.problems(config, Layout.of(config.parallelism, ranks_of(layout)), family, sizes)
        return [problem.key for problem in found]

    zero_bubble = {"pp": 2, "dp": 2, "schedule": "InterleavedZeroBubble"}
    assert problems(zero_bubble) == ["parallelism.fsdp_reshard_after_forward"]
    assert problems({**zero_bubble, "dp": 1}) == problems({"pp": 2, "dp": 2}) == []
    assert problems({**zero_bubble, "backend": "simple"}) == []


@pytest.mark.parametrize("name", ["llama3", "further tokens"])
def test_goes_on_without_a_pipeline_and_back(name: str, tmp_path: Path) -> None:
    model = TIED if name == "llama3" else FURTHER
    kept = {"training__steps": 6, "checkpoint__enable": True, "training__max_norm": 1.0}

    def run(folder: str, layout: dict[str, Any], until: int) -> list[float]:
        resolved = tiny(tmp_path / folder, **settings_of(layout, {**model, **kept}))
        return losses(resolved, ranks_of(layout), until=until)

    whole = run("whole", {}, 6)
    assert run("parts", {**IN_A_V, "dp": 2}, 2) == pytest.approx(whole[:2], rel=1e-5)
    assert pieces(tmp_path / "parts", 2) == {name: 2 for name in pieces(tmp_path / "whole", 6)}  # of two shards
    assert run("parts", {}, 4) == pytest.approx(whole[2:4], rel=1e-5)
    assert run("parts", {"pp": 2}, 6) == pytest.approx(whole[4:], rel=1e-5)
    assert pieces(tmp_path / "parts", 6) == pieces(tmp_path / "whole", 6)


def pieces(folder: Path, step: int) -> dict[str, int]:
    """Return how many pieces of each tensor that has to do with the table a checkpoint holds, numbers aside."""
    (path,) = (folder / "checkpoint").glob(f"step-{step}")
    data = FileSystemReader(path).read_metadata().storage_data
    names = [index.fqn for index in data if TABLE in index.fqn and not index.fqn.endswith(".step")]
    return {name: names.count(name) for name in names}


def test_folders_of_others_go_into_stages_and_out(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    start = {**TIED, "checkpoint__enable": True, "checkpoint__last_save_in_hf": True}
    losses(tiny(tmp_path / "a", **settings_of({}, {**start, "training__steps": 1})))
    (folder,) = (tmp_path / "a" / "checkpoint").rglob("config.json")
    start |= {"checkpoint__initial_load_in_hf": True, "checkpoint__initial_load_path": folder.parent}
    found, tables = [], []
    for name, layout in (("one", {}), ("pipeline", {"pp": 2}), ("V", IN_A_V)):
        resolved = tiny(tmp_path / name, **settings_of(layout, {**start, "training__steps": 2}))
        found.append(losses(resolved, ranks_of(layout)))
        (folder,) = (tmp_path / name / "checkpoint").rglob("config.json")
        model = AutoModelForCausalLM.from_pretrained(folder.parent)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        tables.append(model.lm_head.weight.detach().float())
    for other, table in zip(found[1:], tables[1:], strict=True):
        assert other == pytest.approx(found[0], rel=1e-5)
        assert (table - tables[0]).abs().max() < 1e-2 * tables[0].abs().max()


def test_validation_between_steps(tmp_path: Path) -> None:
    layout = {**IN_A_V, "dp": 2}
    found, expected = (
        validation_losses(layout, tmp_path / str(index), **TIED) for index, layout in enumerate((layout, {}))
    )
    assert found == pytest.approx(expected, rel=1e-6)
