"""Rules across sections."""

import pytest

from titan_core.config.checks import NOT_YET, check, check_layout
from titan_core.config.fields import fields, get
from titan_core.config.load import load

# flags -> (where, part of the message, part of the tip)
RULES = {
    "batch of zero": (["training.global_batch_size=0"], "--training.global_batch_size", "cannot be 0", "-1"),
    "batch below the microbatch": (
        ["training.global_batch_size=4"], "--training.global_batch_size", "local_batch_size 8", "lower",
    ),
    "validation of no batch": (["validation.steps=0"], "--validation.steps", "cannot be 0", "-1"),
    "warmup and decay": (
        ["training.steps=100", "lr_scheduler.warmup_steps=60", "lr_scheduler.decay_ratio=0.5"],
        "--lr_scheduler.decay_ratio", "60 warmup steps and 50 of decay", "training.steps",
    ),
    "role": (["optimizer.no_decay_roles=norms"], "--optimizer.no_decay_roles", "`norms`", "norm"),
    "budget": (["activation_checkpoint.mode=memory_budget"], "--activation_checkpoint.mode", "compile.enable", "set"),
    "every n-th": (
        ["activation_checkpoint.selective_ac_option=0"], "--activation_checkpoint.selective_ac_option", "`0`", "`op`",
    ),
    "offload without FSDP": (
        ["training.enable_cpu_offload", "parallelism.data_parallel_replicate_degree=2",
         "parallelism.data_parallel_shard_degree=1"], "--training.enable_cpu_offload", "FSDP", "-1",
    ),
    "module": (["experimental.custom_import=no.such"], "--experimental.custom_import", "no Python module", "installed"),
    "profiler": (
        ["profiling.enable_profiling", "profiling.profile_freq=3"], "--profiling.profile_freq", "do not fit", "4",
    ),
    "no folder": (["job.dump_folder="], "--job.dump_folder", "is empty", "outputs"),
    "seed checkpoint": (["checkpoint.create_seed_checkpoint"], "--checkpoint.create_seed_checkpoint", "is off", "set"),
    "rollback": (["guard.non_finite=rollback"], "--guard.non_finite", "checkpoint.enable", "set"),
    "rollback of a spike": (["guard.spike=rollback"], "--guard.spike", "checkpoint.enable", "set"),
    "best without validation": (["checkpoint.keep_best_k=1"], "--checkpoint.keep_best_k", "validation.enable", "set"),
    "part": (
        ["checkpoint.exclude_from_loading=optimzer"], "--checkpoint.exclude_from_loading", "`optimzer`", "`optimizer`",
    ),
    "converter": (["model.converters=quantize.linear.float"], "--model.converters", "no converter", "linear.float8`?"),
    "converter of another sort": (["model.converters=lora"], "--model.converters", "`lora`", "known: quantize.linear"),
    "two converters of experts": (
        ["model.converters=quantize.grouped_mm.mx,quantize.grouped_mm.float8"], "--model.converters",
        "an expert can be", "leave one",
    ),
    "two converters": (
        ["model.converters=quantize.linear.mx,quantize.linear.float8"], "--model.converters", "once", "leave one",
    ),
    "tokens for float8": (
        ["model.converters=quantize.linear.float8", "training.local_batch_size=3", "training.seq_len=40"],
        "--training.seq_len", "= 120 tokens, and quantize.linear.float8 needs a multiple of 16", "16",
    ),
    "tokens for MX": (
        ["model.converters=quantize.linear.mx", "training.local_batch_size=3", "training.seq_len=16"],
        "--training.seq_len", "= 48 tokens, and quantize.linear.mx needs a multiple of 32", "32",
    ),
    "gather of rows": (
        ["model.converters=quantize.linear.float8", "quantize.linear.float8.recipe_name=rowwise",
         "quantize.linear.float8.enable_fsdp_float8_all_gather"],
        "--quantize.linear.float8.enable_fsdp_float8_all_gather", "rowwise has one a row", "tensorwise",
    ),
    "gather beside tensor parallelism": (
        ["model.converters=quantize.linear.float8", "quantize.linear.float8.enable_fsdp_float8_all_gather",
         "parallelism.tensor_parallel_degree=2"],
        "--quantize.linear.float8.enable_fsdp_float8_all_gather", "`parallelism.tensor_parallel_degree` is 2", "leave",
    ),
    "gather by views": (
        ["model.converters=quantize.linear.float8", "quantize.linear.float8.enable_fsdp_float8_all_gather",
         "parallelism.data_parallel_backend=simple"],
        "--quantize.linear.float8.enable_fsdp_float8_all_gather", "`parallelism.data_parallel_backend` is sim", "leave",
    ),
    "tokens of a piece of the sequence": (
        ["model.converters=quantize.linear.mx", "training.local_batch_size=1", "training.seq_len=96",
         "parallelism.context_parallel_degree=2"],
        "--training.seq_len", "/ parallelism.context_parallel_degree 2 = 48 tokens", "a multiple of 64",
    ),
    "tokens of a microbatch": (
        ["model.converters=quantize.linear.mx", "training.seq_len=48", "parallelism.pipeline_parallel_degree=2"],
        "--training.seq_len", "parallelism.pipeline_parallel_microbatch_size 1 x training.seq_len 48 = 48", "32",
    ),
    "no thresholds": (
        ["model.converters=quantize.linear.float8", "quantize.linear.float8.recipe_name=rowwise_with_gw_hp",
         "quantize.linear.float8.filter_fqns=auto_filter_small_kn"],
        "--quantize.linear.float8.filter_fqns", "nobody has measured", "rowwise",
    ),
    "no thresholds for MX": (
        ["model.converters=quantize.linear.mx", "quantize.linear.mx.filter_fqns=auto_filter_small_kn"],
        "--quantize.linear.mx.filter_fqns", "nobody has measured", "name layers",
    ),
}  # fmt: skip


def flags(words: list[str]) -> list[tuple[str, str | None]]:
    return [(key, value if equals else None) for key, equals, value in (word.partition("=") for word in words)]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_that_is_broken_is_named_with_its_flag(name: str) -> None:
    words, where, said, advised = RULES[name]
    (found,) = check(load(None, flags(words)))
    assert found.where == where
    assert said in found.message
    assert advised in (found.tip or "")


def test_what_is_not_supported_yet_is_one_problem_with_every_place() -> None:
    words = ["optimizer.early_step_in_backward", "job.custom_config_module=x", "fault_tolerance.enable"]
    (found,) = check(load(None, flags(words)))
    for word in words:
        assert f"(--{word.partition('=')[0]})" in found.message
    assert "leave" in (found.tip or "")


def test_the_table_of_unsupported_keys_accepts_the_defaults() -> None:
    config = load(None).config
    assert set(NOT_YET) <= set(fields())
    assert [key for key, accepted in NOT_YET.items() if get(config, key) not in accepted] == []


@pytest.mark.parametrize(
    ("world", "words", "said", "advised"),
    [
        (5, ["parallelism.data_parallel_replicate_degree=2"], "5 ranks do not divide", "`fsdp 5` or `replicate 5`"),
        (5, ["parallelism.tensor_parallel_degree=2"], "5 ranks do not divide", "`fsdp 5` or `tensor 5`"),
        (8, ["parallelism.pipeline_parallel_degree=3"], "8 ranks do not divide", "`pipeline 2 x fsdp 4`"),
        (8, ["parallelism.data_parallel_shard_degree=3"], "8 ranks do not divide", "`fsdp 8`"),
        (8, ["parallelism.data_parallel_shard_degree=0"], "8 ranks do not divide", "`fsdp 8`"),
        (4, ["parallelism.data_parallel_shard_degree=2"], "4 ranks do not divide", "`fsdp 4`"),
        (1, ["parallelism.tensor_parallel_degree=4"], "1 rank does not divide", "`one device`, or start 4 ranks"),
        (1, ["parallelism.expert_parallel_degree=2"], "these are 1", "try 1, or start 2 ranks"),
        (6, ["parallelism.expert_parallel_degree=4"], "these are 6", "3 or 6, or start 12 ranks"),
        (3, ["training.global_batch_size=32"], "does not divide into", "24 or 48"),
        (8, ["training.global_batch_size=32"], "does not divide into", "64"),
    ],
)
def test_degrees_and_batch_must_fit_the_ranks(world: int, words: list[str], said: str, advised: str) -> None:
    (found,) = check_layout(load(None, flags(words)), world)
    assert said in found.message
    assert advised in (found.tip or "")
    assert found.where == f"--{words[0].partition('=')[0]}"


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (1, []),
        (7, []),
        (8, ["parallelism.data_parallel_replicate_degree=2"]),
        (8, ["parallelism.data_parallel_replicate_degree=8", "parallelism.data_parallel_shard_degree=1"]),
        (8, ["training.global_batch_size=128"]),
    ],
)
def test_layouts_that_fit(world: int, words: list[str]) -> None:
    assert check(load(None, flags(words)), world) == []
