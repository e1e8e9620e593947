"""Whole runs in float8 and MXFP8: near fp32, the same in every layout, resumable without it."""

import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchao", reason="torchao is not installed")

from tests.ranks import run_ranks
from tests.runs import _train, losses, tiny
from titan_core.config.quantize import FLOAT8, FLOAT8_EXPERTS, MX, MX_EXPERTS
from titan_core.runtime.errors import ConfigError

SIZES = {"model.args.ffn_dim": 64, "model.args.n_kv_heads": 4, "training__steps": 8}  # all sides are multiples of 32
GATHER = {
    f"{FLOAT8}.enable_fsdp_float8_all_gather": True,
    f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp": True,
}


def options(recipe: str) -> dict[str, Any]:
    if recipe.startswith("mxfp8"):
        return {**SIZES, "model.converters": MX, f"{MX}.recipe_name": recipe}
    return {**SIZES, "model.converters": FLOAT8, f"{FLOAT8}.emulate": True, f"{FLOAT8}.recipe_name": recipe}


@functools.cache
def one_process(recipe: str | None, microbatch: int = 4) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        changes = SIZES if recipe is None else options(recipe)
        return losses(tiny(folder, training__local_batch_size=microbatch, **changes))


RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "mxfp8_emulated", "mxfp8_emulated_rceil")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_stays_near_that_of_high_precision_and_is_another(recipe: str) -> None:
    found, exact = one_process(recipe), one_process(None)
    assert found == pytest.approx(exact, rel=2e-3)
    assert all(one != other for one, other in zip(found, exact, strict=True))
    assert found[-1] < found[0] - 0.4


@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8_emulated"])
def test_the_loss_stays_near_that_of_bf16_and_is_another(recipe: str, tmp_path: Path) -> None:
    bf16 = {"training__mixed_precision_param": "bfloat16"}
    found = losses(tiny(tmp_path / "low", **options(recipe), **bf16))
    wanted = losses(tiny(tmp_path / "bf16", **SIZES, **bf16))
    assert found == pytest.approx(wanted, rel=2e-3)
    assert all(one != other for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_ranks_equal_one_process_with_the_same_microbatches(recipe: str, tmp_path: Path) -> None:
    assert losses(tiny(tmp_path, **options(recipe)), 2) == pytest.approx(one_process(recipe), rel=1e-6)


def test_two_replicas_equal_one_process_with_the_same_microbatches(tmp_path: Path) -> None:
    ddp = {"parallelism__data_parallel_replicate_degree": 2, "parallelism__data_parallel_shard_degree": 1}
    assert losses(tiny(tmp_path, **options("rowwise"), **ddp), 2) == pytest.approx(one_process("rowwise"), rel=1e-6)


@pytest.mark.parametrize("recipe", ["rowwise_with_gw_hp", "mxfp8_emulated", "mxfp8_emulated_rceil"])
def test_recipes_without_scales_over_the_batch_equal_in_any_microbatches(recipe: str) -> None:
    assert one_process(recipe, 8) == pytest.approx(one_process(recipe, 2), rel=1e-5)


# sides and sequences whose halves are multiples of 32
HALVES = {"model.args.dim": 64, "training__seq_len": 64, "training__steps": 4}
TP, CP, PP = (f"parallelism__{kind}_parallel_degree" for kind in ("tensor", "context", "pipeline"))


@pytest.mark.parametrize(
    ("recipe", "layout", "tolerance"),
    [
        ("rowwise_with_gw_hp", {TP: 2}, 1e-5),
        ("rowwise_with_gw_hp", {CP: 2}, 1e-5),
        ("rowwise_with_gw_hp", {"parallelism__data_parallel_backend": "simple"}, 1e-5),
        ("mxfp8_emulated", {TP: 2}, 5e-5),  # sums in another order fall on another side of a rounding now and then
        ("tensorwise", {TP: 2}, 5e-4),  # scales of halves
        ("tensorwise", {PP: 2}, 1e-6),
    ],
)
def test_other_layouts(recipe: str, layout: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    """A pipeline's microbatches are single rows, so one process takes such too."""
    changes = {**options(recipe), **HALVES}
    wanted = losses(tiny(tmp_path / "one", **changes, training__local_batch_size=1 if PP in layout else 4))
    assert losses(tiny(tmp_path / "two", **changes, **layout), 2) == pytest.approx(wanted, rel=tolerance)


@pytest.mark.parametrize("kept", [{PP: 2}, {"parallelism__fsdp_reshard_after_forward": "never"}])
def test_weights_that_stay_whole_between_forwards_keep_their_scales(kept: dict[str, Any], tmp_path: Path) -> None:
    changes = {**options("tensorwise"), "training__steps": 3, "training__local_batch_size": 2, **kept}
    validate = {
        "validation__enable": True, "validation__freq": 1, "validation__steps": 2, "validation__seq_len": 32,
        "validation__local_batch_size": 2,
    }  # fmt: skip
    ranks = 4 if PP in kept else 2
    found = losses(tiny(tmp_path / "float8", **changes, **GATHER, **validate), ranks)
    assert found == losses(tiny(tmp_path / "high", **changes), ranks)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_gathered_in_float8_give_the_same_losses(precision: str, tmp_path: Path) -> None:
    changes = {**options("tensorwise"), "training__mixed_precision_param": precision}
    found = losses(tiny(tmp_path / "float8", **changes, **GATHER), 2)
    wanted = losses(tiny(tmp_path / "high", **changes), 2)
    if precision == "float32":
        assert found == wanted  # the same scales and the same numbers to round
    else:
        assert found == pytest.approx(wanted, rel=1e-3)  # without the rounding to bf16 in between


def _gathered(resolved) -> tuple[set[str], int, list[float]]:
    """Train on this rank; return the types of the weights as layers saw them, and the reductions of a maximum."""
    import torch.distributed as dist

    from titan_core.quantization.float8 import Float8Linear

    seen: set[str] = set()
    reductions = 0
    plain_forward, plain_reduce = Float8Linear.forward, dist.all_reduce

    def forward(self, x):
        seen.add(f"{type(self.weight).__name__} {getattr(self.weight, '_data', self.weight).dtype}")
        return plain_forward(self, x)

    def reduce(tensor, op=dist.ReduceOp.SUM, *rest, **named):
        nonlocal reductions
        reductions += op == dist.ReduceOp.MAX and tensor.shape == (14,)
        return plain_reduce(tensor, op, *rest, **named)

    Float8Linear.forward, dist.all_reduce = forward, reduce
    found = _train(resolved, {})
    return seen, reductions, found


@pytest.mark.parametrize("shards", [1, 2])
def test_layers_see_weights_that_came_in_float8_with_one_reduction_a_forward(shards: int, tmp_path: Path) -> None:
    """FSDP 2 and HSDP 2 x 2; a microbatch a step, so that forwards are steps."""
    ranks = 2 if shards == 1 else 4
    changes = {
        **options("tensorwise"), "training__steps": 3, "training__local_batch_size": 8 // ranks,
        "parallelism__data_parallel_replicate_degree": shards, "parallelism__data_parallel_shard_degree": 2,
    }  # fmt: skip
    for seen, reductions, found in run_ranks(_gathered, ranks, tiny(tmp_path, **changes, **GATHER)):
        assert seen == {"Float8TrainingTensor torch.float8_e4m3fn"}
        assert reductions == 3
        assert found == pytest.approx(one_process("tensorwise", 8 // ranks)[:3], rel=1e-6)


def test_a_run_that_gathered_in_float8_goes_on_in_one_process_without(tmp_path: Path) -> None:
    """The checkpoint holds plain fp32 weights, and torch reads it without torchao's types."""
    from titan_core.checkpoint import find_step, load_tensors

    saved = {**options("tensorwise"), "checkpoint__enable": True, "checkpoint__interval": 4}
    before = losses(tiny(tmp_path, **saved, **GATHER), 2)
    weight = torch.zeros(32, 32)
    load_tensors(find_step(str(tmp_path)), {"layers.0.attention.wq.weight": weight}, strict=False)
    assert weight.std() > 0.01
    after = losses(tiny(tmp_path, **saved, checkpoint__load_step=4))
    assert after == pytest.approx(before[4:], rel=1e-6)
    assert before == pytest.approx(one_process("tensorwise"), rel=1e-6)


@pytest.mark.parametrize(
    ("recipe", "recompute"),
    [("tensorwise", "op"), ("rowwise", "full"), pytest.param("mxfp8_emulated", "op", marks=pytest.mark.slow)],
)
def test_recomputation_and_compilation_change_nothing(recipe: str, recompute: str, tmp_path: Path) -> None:
    mode = {"full": {"activation_checkpoint__mode": "full"}}.get(
        recompute, {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op"}
    )
    wanted = one_process(recipe)[:2]
    steps = {**options(recipe), "training__steps": 2, **mode}
    assert losses(tiny(tmp_path / "eager", **steps)) == pytest.approx(wanted, rel=1e-6)
    compiled = {"compile__enable": True, "compile__components": "model", "compile__backend": "aot_eager"}
    (found,) = run_ranks(_train, 1, tiny(tmp_path / "compiled", **steps, **compiled), {})  # compiling starts a thread
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_compiled_blocks_take_weights_that_came_in_float8(tmp_path: Path) -> None:
    """Compared with compiled blocks: eager norms differ in the last bit, which a rounding to float8 may enlarge."""
    changes = {**options("tensorwise"), "activation_checkpoint__mode": "full", "compile__backend": "aot_eager"}
    found, wanted = (
        losses(tiny(tmp_path / name, **changes, **gather, compile__enable=True), 2)
        for name, gather in (("float8", GATHER), ("high", {}))
    )
    assert found == wanted
    assert found == pytest.approx(one_process("tensorwise"), rel=1e-4)


def test_validation_takes_rows_whose_number_of_tokens_fits_nothing(tmp_path: Path) -> None:
    """The multiple of 32 tokens is the gradient's; a forward takes 3 x 7 of them."""
    validate = {
        "validation__enable": True, "validation__freq": 1, "validation__steps": 1, "validation__seq_len": 7,
        "validation__local_batch_size": 3, "validation__dataset": "embedded",
    }  # fmt: skip
    assert losses(tiny(tmp_path, **options("mxfp8_emulated"), **validate)) == one_process("mxfp8_emulated")


def travelled(resolved, narrow: bool) -> tuple[list[float], dict[str, int]]:
    """Losses of a run, and how many numbers its gathers along the sequence sent, by dtype."""
    from titan_core.parallel import exchange
    from titan_core.training import build

    sent: dict[str, int] = {}
    gather = exchange.all_gather

    def counting(x, dim, group):
        sent[str(x.dtype)] = sent.get(str(x.dtype), 0) + x.numel()
        return gather(x, dim, group)

    exchange.all_gather = counting
    if not narrow:
        build.wires = lambda *_: {}
    return _train(resolved, {}), sent


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_stream_travels_in_float8_to_regions_and_nothing_changes(dtype: str, tmp_path: Path) -> None:
    def run(narrow: bool) -> tuple[list[float], dict[str, int]]:
        changes = {TP: 2, "training__mixed_precision_param": dtype}
        resolved = tiny(tmp_path / str(narrow), **options("tensorwise"), **changes)
        return run_ranks(travelled, 2, resolved, narrow)[0]

    (found, sent), (expected, whole) = run(True), run(False)
    assert found == pytest.approx(expected, rel=1e-6 if dtype == "float32" else 1e-4)
    # two blocks gather twice forward, which is narrow, and twice backward; the head and the embedding once each
    assert sent["torch.uint8"] == whole[f"torch.{dtype}"] - sent[f"torch.{dtype}"]
    assert sent["torch.uint8"] / whole[f"torch.{dtype}"] == pytest.approx(2 * 2 / (2 * 4 + 2))


@pytest.mark.slow
def test_the_stream_travels_in_float8_in_compiled_blocks(tmp_path: Path) -> None:
    changes = {TP: 2, "compile__enable": True, "compile__backend": "aot_eager"}
    found = losses(tiny(tmp_path / "compiled", **options("tensorwise"), **changes), 2)
    assert found == pytest.approx(losses(tiny(tmp_path / "eager", **options("tensorwise"), **{TP: 2}), 2), rel=1e-5)


def test_the_stream_travels_as_it_is_to_a_region_with_a_layer_in_high_precision(tmp_path: Path) -> None:
    changes = {TP: 2, f"{FLOAT8}.filter_fqns": "wk,w1"}
    resolved = tiny(tmp_path, **options("tensorwise"), **changes)
    _, sent = run_ranks(travelled, 2, resolved, True)[0]
    assert "torch.uint8" not in sent


EXPERTS = {
    "model.name": "qwen3",
    "model.args.head_dim": 8,
    "model.args.num_experts": 4,
    "model.args.top_k": 2,
    "model.args.expert_dim": 32,
}


IN_MX = {**EXPERTS, "model.converters": MX_EXPERTS, f"{MX_EXPERTS}.recipe_name": "mxfp8_emulated"}


@functools.cache
def experts_alone(converter: str | None, recipe: str = "") -> list[float]:
    changes = {} if converter is None else {"model.converters": converter, f"{converter}.recipe_name": recipe}
    with tempfile.TemporaryDirectory() as folder:
        return losses(tiny(folder, **EXPERTS, **changes))


@pytest.mark.parametrize(
    ("converter", "recipe"),
    [
        (FLOAT8_EXPERTS, "blockwise"),
        (FLOAT8_EXPERTS, "rowwise"),
        (MX_EXPERTS, "mxfp8_emulated"),
        (MX_EXPERTS, "mxfp8_emulated_wgrad_with_hp"),
    ],
)
def test_experts_in_low_precision_learn_as_in_high_precision(converter: str, recipe: str) -> None:
    found, plain = experts_alone(converter, recipe), experts_alone(None)
    assert found != plain
    assert found == pytest.approx(plain, abs=0.03)


EP = {"parallelism.data_parallel_shard_degree": 2, "parallelism.expert_parallel_degree": 2}


def test_experts_in_float8_on_ranks_of_experts(tmp_path: Path) -> None:
    changes = {**EXPERTS, "model.converters": FLOAT8_EXPERTS}
    found = losses(tiny(tmp_path / "ranks", **changes, **EP), 2)
    assert found == pytest.approx(experts_alone(FLOAT8_EXPERTS, "blockwise"), abs=0.01)


WIDE = {**EXPERTS, "model.args.expert_dim": 64, "training__steps": 4}
EXACT = {"model.converters": MX_EXPERTS, f"{MX_EXPERTS}.recipe_name": "mxfp8_emulated_wgrad_with_hp"}


@functools.cache
def wide_experts_alone() -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        return losses(tiny(folder, **WIDE, **EXACT))


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        (EP, 2),
        ({**EP, "parallelism.expert_parallel_dispatch": "symmetric"}, 2),
        ({**EP, "parallelism.expert_parallel_dispatch": "allgather"}, 2),
        ({**EP, TP.replace("__", "."): 2, "parallelism.expert_tensor_parallel_degree": 2}, 4),
        ({**EP, TP.replace("__", "."): 2, "parallelism.expert_parallel_degree": 4}, 4),
    ],
    ids=["alltoall", "symmetric", "allgather", "split experts", "experts over tp"],
)
def test_experts_in_mxfp8_on_many_ranks(layout: dict[str, Any], ranks: int, tmp_path: Path) -> None:
    """Only the gradient of weights has scales that tokens share, so in high precision all layouts are one."""
    assert losses(tiny(tmp_path, **WIDE, **EXACT, **layout), ranks) == pytest.approx(wide_experts_alone(), rel=5e-5)


@pytest.mark.slow
def test_experts_in_mxfp8_may_be_compiled(tmp_path: Path) -> None:
    compiled = {"compile__enable": True, "compile__components": "model", "compile__backend": "aot_eager"}
    found = losses(tiny(tmp_path, **IN_MX, **compiled, training__steps=2))
    assert found == pytest.approx(experts_alone(MX_EXPERTS, "mxfp8_emulated")[:2], rel=1e-5)


@pytest.mark.parametrize("converter", [FLOAT8_EXPERTS, MX_EXPERTS])
def test_a_converter_finds_no_experts(converter: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(converter)} finds no experts"):
        losses(tiny(tmp_path, **{"model.converters": converter}))
    with pytest.raises(ConfigError, match=r"finds no experts named layers\.7") as caught:
        losses(tiny(tmp_path, **EXPERTS, **{"model.converters": converter, f"{converter}.fqns": "layers.7"}))
    assert caught.value.problems[0].key == f"{converter}.fqns"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.args.expert_dim": 48}, "w1.weight is 48 x 32, and mxfp8_emulated needs multiples of 32"),
        ({f"{MX_EXPERTS}.recipe_name": "mxfp8"}, "w1.weight is 32 x 32, and mxfp8 needs multiples of 128"),
    ],
)
def test_sides_of_experts_that_share_no_scales_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        losses(tiny(tmp_path, **{**IN_MX, **changes}))
