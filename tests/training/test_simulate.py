"""Plans of steps on ranks that are not there, against what the engine must hold and send."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity.test_mtp_layouts import MTP
from tests.ranks import apart
from tests.runs import tiny
from titan_core.config.catalog import recipes
from titan_core.config.layout import Layout
from titan_core.config.load import Resolved, load
from titan_core.jobs import plan
from titan_core.models import resolve
from titan_core.parallel import legal

INTENDED = {  # ranks
    "deepseek_v3_16b": 8,
    "deepseek_v3_671b": 512,
    "deepseek_v3_debugmodel": 1,
    "flux_debug": 1,
    "flux_dev": 8,
    "flux_schnell": 8,
    "llama3_debugmodel": 1,
    "llama3_1b": 1,
    "llama3_8b": 8,
    "llama4_17bx128e": 256,
    "llama4_17bx16e": 64,
    "llama4_debugmodel": 1,
    "llama4_debugmodel_moe": 1,
    "qwen3_0.6b": 1,
    "qwen3_30b_a3b": 16,
    "qwen3_debugmodel": 1,
    "qwen3_debugmodel_moe": 1,
}


def ranks(resolved: Resolved, world: int, device: str) -> list[dict[str, Any]]:
    return apart(lambda: plan.run(resolved, world, device).ranks)


def planned(folder: Any, world: int, **changes: Any) -> list[dict[str, Any]]:
    settings = {"model.args.n_layers": 4, "training__local_batch_size": 4, "training__global_batch_size": 16, **changes}
    return ranks(tiny(folder, **settings), world, "cpu")


def sent(rank: dict[str, Any]) -> dict[tuple[str, str], tuple[int, int]]:
    return {(c["collective"], c["axis"]): (c["calls"], c["bytes"]) for c in rank["collectives"]}


def test_fsdp_gathers_every_block_twice_a_microbatch_and_reduces_it_once_a_step(tmp_path) -> None:
    (rank,) = planned(tmp_path, 2)
    blocks, microbatches = 4, 2
    found = sent(rank)
    # the embedding, the last norm and the head stay gathered between forward and backward
    assert found[("all-gather", "fsdp")][0] == microbatches * (2 * blocks + 1)
    assert found[("reduce-scatter", "fsdp")] == (blocks + 1, 2 * rank["weights"])
    assert rank["weights"] * 2 == rank["optimizer"]


def test_sequence_parallelism_gathers_and_scatters_in_every_region(tmp_path) -> None:
    (rank,) = planned(tmp_path, 2, parallelism__tensor_parallel_degree=2, training__global_batch_size=4)
    regions, stream = 2 * 4, 4 * 32 * 32 * 4
    found = sent(rank)
    # forward: each region and the head gather, each region and the embedding scatter; the backward mirrors them
    calls = 2 * (regions + 1)
    assert found[("all-gather", "tensor")] == (calls, calls * stream)
    assert found[("reduce-scatter", "tensor")] == (calls, calls * stream)


def test_pipeline_stages_hold_the_whole_model_between_them(tmp_path) -> None:
    first, last = planned(tmp_path, 2, parallelism__pipeline_parallel_degree=2, training__local_batch_size=16)
    assert (first["blocks"], last["blocks"]) == (2, 2)
    (one,) = planned(tmp_path, 1, training__local_batch_size=16)
    assert first["parameters"] + last["parameters"] == one["parameters"]


def test_tied_stages_hold_the_table_twice_and_add_its_gradients_once(tmp_path) -> None:
    settings = {"parallelism__pipeline_parallel_degree": 2, "training__local_batch_size": 16, "model.args.tied": True}
    first, last = planned(tmp_path, 2, **settings)
    (one,) = planned(tmp_path, 1, training__local_batch_size=16, **{"model.args.tied": True})
    table = 2048 * 32
    assert first["parameters"] + last["parameters"] == one["parameters"] + table
    assert sent(first)[("all-reduce", "pipeline")] == sent(last)[("all-reduce", "pipeline")] == (1, 4 * table)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 cannot split the backward of a V")
def test_a_v_holds_both_tables_on_one_rank_and_sends_no_gradient(tmp_path) -> None:
    settings = {"training__local_batch_size": 16, "model.args.tied": True}
    pipelined = {"parallelism__pipeline_parallel_degree": 2, "parallelism__pipeline_parallel_schedule": "DualPipeV"}
    both, middle = planned(tmp_path, 2, **settings, **pipelined)
    (one,) = planned(tmp_path, 1, **settings)
    table = 2048 * 32
    assert both["parameters"] + middle["parameters"] == one["parameters"] + table
    assert both["optimizer"] == 2 * (both["weights"] - 4 * table)  # of the two, one is trained
    assert ("all-reduce", "pipeline") not in sent(both)


def test_the_last_of_four_stages_predicts_further_tokens_with_the_table_of_the_first(tmp_path) -> None:
    predicting = {**MTP, "model.args.n_layers": 6, "training__local_batch_size": 16}
    stages = planned(tmp_path, 4, **predicting, parallelism__pipeline_parallel_degree=4)
    (one,) = planned(tmp_path, 1, **predicting)
    assert [(stage["blocks"], stage["ranks"]) for stage in stages] == [(2, 1), (2, 2), (2, 1)]
    assert sum(s["parameters"] * s["ranks"] for s in stages) == one["parameters"] + 2048 * 32
    assert [("all-reduce", "pipeline") in sent(stage) for stage in (stages[0], stages[-1])] == [True, True]
    assert not any(("all-reduce", "pipeline") in sent(stage) for stage in stages[1:-1])


def test_everything_in_flight_at_once_is_most_for_gpipe(tmp_path) -> None:
    settings = {"parallelism__pipeline_parallel_degree": 2, "training__local_batch_size": 16}
    early, late = (
        planned(tmp_path, 2, parallelism__pipeline_parallel_schedule=s, **settings) for s in ("1F1B", "GPipe")
    )
    assert late[0]["activations"] == 8 * early[0]["activations"]  # 16 microbatches instead of 2


def fewer_blocks(name: str) -> Resolved:
    """Return a recipe with few blocks of each kind, in the same proportion: the time to plan grows with them."""
    _, sizes = resolve(load(name, []).config.model)
    few = {"n_layers": 8} if hasattr(sizes, "n_layers") else {"n_double": 4, "n_single": 8}
    words = [(f"model.args.{key}", str(count)) for key, count in few.items() if getattr(sizes, key) > count]
    return load(name, words)


@pytest.mark.parametrize("name", INTENDED)
def test_recipes_are_planned(name: str) -> None:
    resolved = load(name, [])
    family, sizes = resolve(resolved.config.model)
    fewer = fewer_blocks(name)
    (rank,) = ranks(fewer, INTENDED[name], "cuda")
    assert rank["ranks"] == INTENDED[name]
    assert rank["weights"] + rank["optimizer"] < rank["peak"]
    held = sum(rank[kind] for kind in ("weights", "gradients", "optimizer", "activations"))
    blocks, planned_blocks = (len(family.attentions(one)) for one in (sizes, resolve(fewer.config.model)[1]))
    assert rank["peak"] + held * (blocks / planned_blocks - 1) < 80 << 30
    found = legal.problems(resolved.config, Layout.of(resolved.config.parallelism, INTENDED[name]), family, sizes)
    assert not found


def test_every_recipe_has_an_intended_size() -> None:
    assert set(recipes()) == set(INTENDED)


@pytest.mark.parametrize("tied", [False, True])
def test_views_gather_a_parameter_once_a_forward_and_reduce_it_once_a_step(tied: bool, tmp_path) -> None:
    settings = {"parallelism__data_parallel_backend": "simple", "model.args.tied": tied}
    (rank,) = planned(tmp_path, 2, **settings)
    found, microbatches = sent(rank), 2
    count = 9 * 4 + 2 + (not tied)  # nine a block, the embedding, the last norm, and the head
    assert found[("all-gather", "fsdp")][0] == microbatches * count
    assert found[("reduce-scatter", "fsdp")][0] == count


def test_llama3_405b_on_512_ranks() -> None:
    words = [
        ("model.flavor", "405B"),
        ("parallelism.tensor_parallel_degree", "8"),
        ("activation_checkpoint.mode", "full"),
    ]
    (rank,) = ranks(load("llama3_8b", words), 512, "cuda")
    assert rank["parameters"] == 792_755_456
    assert sent(rank)[("all-gather", "fsdp")][0] == 2 * 126 + 1
    assert rank["peak"] < 24 << 30
