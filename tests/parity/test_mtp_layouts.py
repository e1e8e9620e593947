"""The layout never changes the result of multi-token prediction: losses of all depths, and every gradient of the first
step, equal one process."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.parity.layouts import Seen, assert_same, first_steps
from tests.parity.test_expert_layouts import MODELS
from tests.parity.test_layouts import ranks_of, settings_of, too_new
from tests.runs import losses, tiny
from titan_core.config.layout import Layout
from titan_core.config.schema import Parallelism
from titan_core.models import resolve
from titan_core.parallel import legal
from titan_core.parallel.stages import block_counts

MTP: dict[str, Any] = {
    **MODELS["deepseek_v3"],
    "model.args.n_layers": 2,
    "model.args.num_mtp_layers": 2,
    "model.args.attention_mask": "block_causal",
    "training.mtp_loss_weight": 0.7,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {"dp": 2},
    "simple fsdp": {"dp": 2, "backend": "simple"},
    "tensor": {"tp": 2},
    "tensor, whole stream": {"tp": 2, "sp": False},
    "context": {"cp": 2},
    "context, ring": {"cp": 2, "cp_by": "alltoall"},
    "context, heads": {"cp": 2, "cp_by": "heads"},
    "expert": {"dp": 2, "ep": 2},
    "expert over tensor": {"tp": 2, "ep": 2},
    "pipeline": {"pp": 2},
    "pipeline x expert": {"pp": 2, "dp": 2, "ep": 2},
    "pipeline x context": {"pp": 2, "cp": 2},
    "pipeline x fsdp x tensor": {"pp": 2, "dp": 2, "tp": 2},
}
TIED = {
    "model.args.tied": True,
    "model.args.n_dense_layers": 4,
}  # no token near a tie of experts: a last bit decides it
STAGES = [["tok_embeddings"], ["layers.0"], ["layers.1"], ["norm", "output", "mtp.0", "mtp.1"]]
IN_FOUR: dict[str, dict[str, Any]] = {
    "pipeline 4": {"pp": 4},
    "interleaved": {"pp": 2, "schedule": "Interleaved1F1B"},
    "zero bubble": {"pp": 2, "schedule": "InterleavedZeroBubble"},
    "DualPipeV": {"pp": 2, "schedule": "DualPipeV"},
    "ZBV x fsdp": {"pp": 2, "dp": 2, "schedule": "ZBVZeroBubble"},
}


def run(layout: dict[str, Any], folder: Path | str, **more: Any) -> Seen:
    return first_steps(tiny(folder, **{**settings_of(layout, MTP), **more}), ranks_of(layout))


@cache
def alone(tied: bool = False) -> Seen:
    with TemporaryDirectory() as folder:
        return run({}, folder, **(TIED if tied else {}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_further_tokens_on_layouts(layout: str, tmp_path: Path) -> None:
    assert_same(run(LAYOUTS[layout], tmp_path), alone())


@pytest.mark.parametrize(
    ("layout", "tied"), [*((name, False) for name in IN_FOUR), ("pipeline 4", True), ("ZBV x fsdp", True)]
)
def test_further_tokens_on_the_last_of_four_stages(
    layout: str, tied: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if too_new(IN_FOUR[layout]):
        request.applymarker(pytest.mark.xfail(reason="torch 2.11 cannot split this backward", strict=True))
    assert_same(run(IN_FOUR[layout], tmp_path, **(TIED if tied else {})), alone(tied))


def test_accumulation_and_recomputation(tmp_path: Path) -> None:
    """A microbatch has its own number of targets at each depth, and documents end where they end."""
    recompute = {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op"}
    assert_same(run({"dp": 2}, tmp_path, training__local_batch_size=1, **recompute), alone())


def test_blocks_compile_on_tensor_parallel_ranks(tmp_path: Path) -> None:
    settings = {**settings_of({"tp": 2}, MTP), "training__steps": 2, "compile__backend": "aot_eager"}
    settings |= {"model.args.n_layers": 1, "model.args.num_mtp_layers": 1}
    eager = losses(tiny(tmp_path / "eager", **settings), 2)
    compiled = losses(tiny(tmp_path / "compiled", **settings, compile__enable=True), 2)
    assert compiled == pytest.approx(eager, rel=1e-5)


def test_the_next_tokens_loss_does_not_depend_on_a_weight_of_zero(tmp_path: Path) -> None:
    """With weight 0, and gradients not clipped, the main model is trained as if the layers were not there."""
    without = run({}, tmp_path / "without", **{"model.args.num_mtp_layers": 0, "training.mtp_loss_weight": 0.3})
    with_them = run({}, tmp_path / "with", **{"training.mtp_loss_weight": 0})
    assert with_them.losses == without.losses
    assert without.further == [{}] * len(without.losses)
    assert alone().losses[0] == without.losses[0]
    assert alone().losses[1:] != without.losses[1:]


def test_validation_measures_all_depths(tmp_path: Path) -> None:
    changes = {"validation__enable": True, "validation__steps": 2, "validation__freq": 100, "training__steps": 1}
    changes |= {"validation__seq_len": 32, "validation__local_batch_size": 4, "lr_scheduler__warmup_steps": 0}
    found = []
    for ranks, layout in ((1, {}), (2, {"dp": 2})):
        folder = tmp_path / str(ranks)
        losses(tiny(folder, **{**settings_of(layout, MTP), **changes}), ranks)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found += [line for line in lines if line["event"] == "validated"]
    alone, two = found
    assert set(alone["parts"]) == {"mtp/loss_1", "mtp/loss_2"}
    assert two["parts"] == pytest.approx(alone["parts"], rel=1e-5)
    assert alone["tokens"] == 2 * 4 * 32
    assert two["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert len({alone["loss"], *alone["parts"].values()}) == 3


def test_layers_that_predict_count_as_blocks_of_the_last_stage() -> None:
    counts = {
        (6, 1): [2, 2, 2, 0],
        (6, 2): [2, 2, 2, 0],
        (13, 1): [3, 4, 4, 2],
        (2, 2): [0, 1, 1, 0],
        (4, 0): [1, 2, 1, 0],
    }
    found = {key: block_counts(Parallelism(pipeline_parallel_degree=4), *key) for key in counts}
    assert found == counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pp": 8},
            "2 blocks are too few for 8 pipeline stages, with the embedding counting for 1 of them and the head for 1, "
            "and 2 more on the last",
        ),
        ({"pp": 2, "parts": [["tok_embeddings", "layers.0"], STAGES[2] + STAGES[3]]}, None),
        (
            {"pp": 2, "parts": [["tok_embeddings", "layers.0", "layers.1", "norm", "output"], ["mtp.0", "mtp.1"]]},
            "`output` belongs to the last stage",
        ),
        ({"pp": 2, "parts": [[], ["tok_embeddings", *STAGES[1], *STAGES[2], *STAGES[3]]]}, "`tok_embeddings` belongs"),
        ({"pp": 2, "parts": STAGES}, "these are 4 stages, and 1F1B wants one stage on each of 2 pipeline ranks"),
    ],
)
def test_what_predicts_is_on_the_last_stage(changes: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    parts = changes.pop("parts", None)
    more = {} if parts is None else {"parallelism.module_fqns_per_model_part": json.dumps(parts)}
    config = tiny(tmp_path, **{**settings_of(changes, MTP), **more}).config
    family, sizes = resolve(config.model)
    layout = Layout.of(config.parallelism, changes["pp"])
    found = [problem.message for problem in legal.problems(config, layout, family, sizes)]
    assert len(found) == (message is not None)
    assert message is None or found[0].startswith(message)


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        ({**MTP, "model.args.num_mtp_layers": 0}, "set model.args.num_mtp_layers, or leave it out"),
        ({"training.mtp_loss_weight": 0.7}, "leave it out"),
    ],
)
def test_a_weight_without_layers_is_refused(changes: dict[str, Any], way_out: str, tmp_path: Path) -> None:
    config = tiny(tmp_path, **changes).config
    family, sizes = resolve(config.model)
    (problem,) = legal.problems(config, Layout.of(config.parallelism, 1), family, sizes)
    assert problem.message.startswith("`training.mtp_loss_weight` does nothing")
    assert problem.tip == way_out
