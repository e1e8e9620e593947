"""The layout never changes the result of mixtures of experts: losses, loads, and every gradient equal one process."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.parity.layouts import Seen, assert_as_alone, assert_same, first_steps
from tests.parity.test_family_layouts import LLAMA4, MLA
from tests.parity.test_layouts import KEYS, ranks_of, settings_of
from tests.ranks import RankFailed
from tests.runs import tiny
from titan_core.config.layout import Layout
from titan_core.models import resolve
from titan_core.parallel import legal

KEYS.update(
    ep="expert_parallel_degree",
    etp="expert_tensor_parallel_degree",
    by="expert_parallel_dispatch",
    room="expert_parallel_capacity",
)
EXPERTS = {
    "model.name": "qwen3",
    "model.args.head_dim": 6,
    "model.args.tied": False,
    "model.args.num_experts": 8,
    "model.args.top_k": 3,
    "model.args.expert_dim": 16,
    "model.args.num_shared_experts": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    # biases that move by themselves, and losses of both kinds
    "balanced": {
        **EXPERTS,
        "model.args.score": "sigmoid",
        "model.args.score_bias": True,
        "model.args.load_balance_coeff": 0.01,
        "model.args.sequence_balance_loss": 0.3,
        "model.args.global_balance_loss": 0.2,
        "model.args.num_groups": 4,
        "model.args.top_groups": 2,
    },
    "scored before": {**EXPERTS, "model.args.score_before_experts": True, "model.args.route_scale": 2.5},
    "deepseek_v3": {
        **MLA,
        "model.args.n_dense_layers": 1,
        "model.args.num_experts": 8,
        "model.args.expert_dim": 16,
        "model.args.num_groups": 4,
        "model.args.top_groups": 2,
    },
    "llama4": {
        **LLAMA4,
        "model.args.attention_mask": "block_causal",
        "model.args.num_experts": 4,
        "model.args.moe_every": 2,
        "model.args.expert_dim": 16,
    },
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"dp": 2},
    "tensor": {"tp": 2},
    "tensor, whole stream": {"tp": 2, "sp": False},
    "context": {"cp": 2},
    "pipeline": {"pp": 2},
    "expert": {"dp": 2, "ep": 2},
    "expert 4": {"dp": 4, "ep": 4},
    "expert, gathered": {"dp": 2, "ep": 2, "by": "allgather", "room": 8},
    "expert, pulled": {"dp": 2, "ep": 2, "by": "symmetric", "room": 8},
    "expert over tensor, pulled": {"dp": 2, "tp": 2, "ep": 4, "by": "symmetric", "room": 8},
    "expert x fsdp": {"dp": 4, "ep": 2},
    "expert x hsdp": {"rep": 2, "dp": 2, "ep": 2},
    "expert x tensor": {"dp": 2, "tp": 2, "ep": 2, "etp": 2},
    "expert x tensor, whole stream": {"dp": 2, "tp": 2, "ep": 2, "etp": 2, "sp": False},
    "expert over tensor": {"tp": 2, "ep": 2},
    "expert over fsdp and tensor": {"dp": 2, "tp": 2, "ep": 4},
    "expert over tensor x fsdp": {"dp": 2, "tp": 2, "ep": 2},
    "expert over tensor, gathered": {"dp": 2, "tp": 2, "ep": 4, "by": "allgather", "room": 8},
    "expert x context": {"cp": 2, "ep": 2},
    "expert x context x fsdp": {"dp": 2, "cp": 2, "ep": 4},
    "expert x pipeline": {"pp": 2, "dp": 2, "ep": 2},
    "expert x zero bubble": {"pp": 2, "dp": 2, "ep": 2, "schedule": "InterleavedZeroBubble"},
    "expert over tensor x pipeline": {"pp": 2, "tp": 2, "ep": 2},
}
EIGHT = {
    "expert x fsdp x tensor": {"dp": 4, "tp": 2, "ep": 2, "etp": 2},
    "expert over tensor x context": {"cp": 2, "dp": 2, "tp": 2, "ep": 4},
    "expert x tensor x pipeline": {"pp": 2, "dp": 2, "tp": 2, "ep": 2, "etp": 2},
}


@cache
def alone(model: str) -> Seen:
    with TemporaryDirectory() as folder:
        return first_steps(tiny(folder, **settings_of({}, MODELS[model])), 1)


SCORED_BEFORE = ("tensor", "expert", "expert, gathered", "expert, pulled", "expert over tensor")
OTHER_FAMILIES = ("tensor", "expert x context", "expert over tensor x pipeline")


@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_on_layouts(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    models = ["balanced", *["scored before"] * (name in SCORED_BEFORE)]
    models += ["deepseek_v3", "llama4"] * (name in OTHER_FAMILIES)
    runs = {model: tiny(tmp_path / model, **settings_of(layout, MODELS[model])) for model in models}
    assert_as_alone(runs, ranks_of(layout), alone)


@pytest.mark.parametrize("way", ["symmetric", "allgather"])
def test_a_step_that_has_no_room_for_a_row_stops_the_run(way: str, tmp_path: Path) -> None:
    settings = settings_of({"dp": 2, "ep": 2, "by": way, "room": 0.9}, MODELS["balanced"])
    with pytest.raises(RankFailed, match=r"rows found no room at their experts.*expert_parallel_dispatch"):
        first_steps(tiny(tmp_path, **settings), 2)


def test_recomputation_by_operation(tmp_path: Path) -> None:
    chosen = {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op"}
    settings = {**settings_of(LAYOUTS["expert"], MODELS["deepseek_v3"]), **chosen}
    assert_same(first_steps(tiny(tmp_path, **settings), 2), alone("deepseek_v3"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", EIGHT)
def test_experts_on_eight_ranks(layout: str, tmp_path: Path) -> None:
    settings = settings_of(EIGHT[layout], MODELS["balanced"])
    assert_same(first_steps(tiny(tmp_path, **settings), 8), alone("balanced"))


def test_layouts_that_experts_cannot_take(tmp_path: Path) -> None:
    def problems(layout: dict[str, Any], **changes: Any) -> list[str]:
        config = tiny(tmp_path, **settings_of(layout, {**EXPERTS, **changes})).config
        family, sizes = resolve(config.model)
        return [
            p.message for p in legal.problems(config, Layout.of(config.parallelism, ranks_of(layout)), family, sizes)
        ]

    assert problems({"dp": 2, "ep": 2}) == []
    assert problems({"dp": 2, "ep": 2}, **{"model.args.num_experts": 0}) == [
        "this qwen3 has no experts to split over 2 ranks"
    ]
    assert problems({"dp": 2, "ep": 2}, **{"model.args.num_experts": 7}) == ["7 experts do not divide over 2 ranks"]
    assert problems({"tp": 2, "ep": 2, "sp": False}) == [
        "experts over tensor-parallel ranks take parts of the stream, and `enable_sequence_parallel` is off"
    ]
