"""What a rank is estimated to send, against what the engine sends on ranks that are not there, and what that takes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import apart
from tests.runs import TINY
from titan_core.config.layout import Layout
from titan_core.config.load import Resolved, load
from titan_core.estimation.devices import Device, device, names
from titan_core.estimation.memory import rank_memory
from titan_core.estimation.step_time import WHILE_COMPUTING, step_time
from titan_core.estimation.traffic import Traffic, traffic
from titan_core.jobs import plan
from titan_core.models import resolve

EXPERTS = {"training.local_batch_size": "4", "training.global_batch_size": "16", "validation.enable": "false"}


def config(recipe: str, base: dict[str, str], **changes: Any) -> Resolved:
    settings = {**base, **{key.replace("__", "."): str(value) for key, value in changes.items()}}
    return load(recipe, list(settings.items()))


def estimated(resolved: Resolved, ranks: int) -> Traffic:
    family, sizes = resolve(resolved.config.model)
    layout = Layout.of(resolved.config.parallelism, ranks)
    lengths = family.lengths(resolved.config)
    return traffic(resolved.config, family.parameters(sizes), family.attentions(sizes), layout, lengths)


def sent(resolved: Resolved, ranks: int) -> dict[str, int]:
    """Return the bytes by axis of a rank, all-reduces of single numbers left out."""
    found: dict[str, int] = {}
    for one in apart(lambda: plan.run(resolved, ranks, "cpu").ranks)[0]["collectives"]:
        if one["collective"] != "all-reduce" or one["axis"] == "replicate":
            found[one["axis"]] = found.get(one["axis"], 0) + one["bytes"]
    return found


def outside_blocks(resolved: Resolved, tp: int) -> int:
    """Return the bytes of what FSDP gathers once a microbatch: embedding, last norm, head; fp32 or bf16 as computed."""
    family, sizes = resolve(resolved.config.model)
    width = {"float32": 4, "bfloat16": 2}[resolved.config.training.mixed_precision_param]
    return (
        width
        * sum(p.numel for p in family.parameters(sizes) if not p.name.startswith("layers.") and not p.tied_to)
        // tp
    )


@pytest.mark.parametrize(("mode", "option"), [("full", "2"), ("selective", "op"), ("selective", "2")])
def test_shards_tensors_and_contexts(mode: str, option: str) -> None:
    degrees = {"parallelism__tensor_parallel_degree": 2, "parallelism__context_parallel_degree": 2}
    recompute = {"activation_checkpoint__mode": mode, "activation_checkpoint__selective_ac_option": option}
    resolved = config("llama3_debugmodel", TINY, **recompute, **degrees)
    found, counted = sent(resolved, 8), estimated(resolved, 8)
    stream = 4 * 4 * 16 * 32  # four bytes for each of 4 x 16 x 32 numbers
    assert found["context"] == counted.context
    assert found["tensor"] - counted.tensor == 4 * stream  # embedding and head, forward and backward
    assert counted.fsdp - outside_blocks(resolved, 2) == pytest.approx(
        found["fsdp"], rel=1e-3
    )  # the last norm is whole


def test_experts_in_parts_of_the_stream() -> None:
    degrees = {"parallelism__tensor_parallel_degree": 2, "parallelism__expert_parallel_degree": 4}
    resolved = config("qwen3_debugmodel_moe", EXPERTS, activation_checkpoint__mode="none", **degrees)
    found, counted = sent(resolved, 8), estimated(resolved, 8)
    assert found["expert fsdp"] == counted.expert_fsdp
    assert counted.expert == pytest.approx(found["expert"], rel=1e-3)  # it sends counts too
    assert counted.fsdp - outside_blocks(resolved, 2) == pytest.approx(found["fsdp"], rel=2e-3)  # it pads some
    assert 0 < found["tensor"] - counted.tensor < 0.3 * found["tensor"]


def test_a_pipeline_gathers_once_a_step() -> None:
    changes = {"training__local_batch_size": 8, "training__global_batch_size": 32, "parallelism__fsdp_prefetch": 0}
    layout = {"parallelism__pipeline_parallel_degree": 2, "parallelism__data_parallel_replicate_degree": 2}
    resolved = config("llama3_debugmodel", TINY, **changes, **layout)
    found, counted = sent(resolved, 8), estimated(resolved, 8)
    family, sizes = resolve(resolved.config.model)
    block = sum(p.numel for p in family.parameters(sizes) if p.name.startswith("layers.0."))
    embedding = sizes.vocab_size * sizes.dim
    assert found["fsdp"] == 2 * 4 * (block + embedding)  # gathered and reduced, fp32
    assert found["replicate"] == 4 * (block + embedding) // 2
    rest = counted.fsdp - 2 * 4 * block  # half of what lies outside the blocks
    assert rest == 4 * (2 * embedding + sizes.dim)
    assert counted.pipeline == 8 * 2 * 4 * 32 * 32  # a microbatch of one sequence, forth and back


@pytest.mark.parametrize("recipe", ["llama3_8b", "qwen3_30b_a3b", "deepseek_v3_16b"])
def test_memory_is_near_what_the_engine_holds(recipe: str) -> None:
    words = {"model.args.n_layers": "6", "activation_checkpoint.mode": "none"}
    resolved = load(recipe, list(words.items()))
    (rank,) = apart(lambda: plan.run(resolved, 8, "cuda").ranks)
    family, sizes = resolve(resolved.config.model)
    layout, lengths = Layout.of(resolved.config.parallelism, 8), family.lengths(resolved.config)
    found = rank_memory(
        resolved.config, family.parameters(sizes), family.attentions(sizes), sizes.vocab_size, layout, lengths
    )
    assert found.activations == pytest.approx(rank["activations"], rel=0.12)
    assert found.total == pytest.approx(rank["peak"], rel=0.12)


def test_time_is_computing_waiting_and_what_is_not_hidden() -> None:
    known = Device("test", peak=1e12 / WHILE_COMPUTING, memory=1, fabric=8e9, network=1e9, neighbours=4)
    resolved = config("llama3_debugmodel", TINY, activation_checkpoint__mode="full", training__global_batch_size=-1)
    hidden = step_time(resolved.config, Layout(dp_shard=4), 3e12, Traffic(fsdp=8e9), known)
    assert (hidden.computing, hidden.waiting, hidden.exchanges) == (4.0, 0.0, {})  # a third is computed once more
    shown = step_time(resolved.config, Layout(dp_shard=4), 3e12, Traffic(fsdp=36.8e9), known)
    assert shown.exchanges == {"fsdp": pytest.approx(1.0)}  # 4.6 seconds, of which 3.6 are hidden
    far = step_time(resolved.config, Layout(dp_shard=4, tp=2), 3e12, Traffic(fsdp=9.2e9, tensor=8e9), known)
    assert far.exchanges == {"tensor": 1.0, "fsdp": pytest.approx(1.0)}  # two of four devices a host: 2e9 bytes/s
    near = step_time(resolved.config, Layout(dp_shard=4, ep=4), 3e12, Traffic(expert=8e9), known)
    assert near.exchanges == {"expert": 1.0}
    spread = step_time(resolved.config, Layout(dp_shard=8, ep=8), 3e12, Traffic(expert=2e9), known)
    assert spread.exchanges == {"expert": pytest.approx(1.0)}  # half of a rank's rows come over its own 1e9 bytes/s
    pipeline = Layout(pp=3)
    waited = step_time(resolved.config, pipeline, 3e12, Traffic(), known)
    assert waited.waiting == pytest.approx(4.0 * 2 / 4)  # four microbatches
    assert waited.total == pytest.approx(6.0)


def test_devices_are_in_the_table_of_peaks() -> None:
    assert {name: device(name).peak > 1e13 for name in names()} == dict.fromkeys(names(), True)
    assert device("H200").memory == 141 << 30
