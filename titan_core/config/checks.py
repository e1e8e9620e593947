"""Rules across sections, in plain Python: everything that can be known to be wrong before anything is built."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from titan_core.config import quantize
from titan_core.config.fields import fields, get
from titan_core.config.layout import KEYS, Layout
from titan_core.config.load import Resolved
from titan_core.config.schema import Config, Parallelism
from titan_core.config.values import shown, toml_value
from titan_core.runtime.errors import Problem, UsageError

# What this version does not do yet: key -> the only values that it accepts. A feature that arrives removes its line.
NOT_YET: dict[str, tuple[Any, ...]] = {
    "parallelism.enable_compiled_autograd": (False,),
    "optimizer.early_step_in_backward": (False,),
    "job.custom_config_module": ("",),
    "experimental.custom_args_module": ("",),
    "memory_estimation.disable_fake_mode": (False,),
    "fault_tolerance.enable": (False,),
    "fault_tolerance.semi_sync_method": (None,),
}

PARTS = ("model", "optimizer", "lr_scheduler", "dataloader", "train_state")  # of a checkpoint


def check(resolved: Resolved, world_size: int | None = None) -> list[Problem]:
    """Return every problem of a config, for a number of ranks where that is known."""
    config = resolved.config
    rules = (
        _not_yet(resolved), _batch(config), _schedule(config), _memory(config), _overlap(config), _files(config),
        _saving(config), quantize.problems(config),
    )  # fmt: skip
    found = [placed(problem, resolved) for problems in rules for problem in problems]
    return found if world_size is None else found + check_layout(resolved, world_size)


def remarks(config: Config) -> list[str]:
    """Return what is allowed, but may not be what was meant."""
    warmup, steps = config.lr_scheduler.warmup_steps, config.training.steps
    said = quantize.remarks(config)
    if warmup > steps:
        said.append(f"`lr_scheduler.warmup_steps` {warmup} is shortened to the {steps} of `training.steps`")
    parallel, plain = config.parallelism, Parallelism()
    if parallel.expert_parallel_degree == 1:
        keys = ("expert_parallel_dispatch", "expert_parallel_capacity")
        changed = [key for key in keys if getattr(parallel, key) != getattr(plain, key)]
        said += [f"`parallelism.{key}` does nothing: `expert_parallel_degree` is 1" for key in changed]
    return said


def check_layout(resolved: Resolved, world_size: int) -> list[Problem]:
    """Return what is wrong with the degrees of parallelism and the batch on this number of ranks."""
    return [placed(problem, resolved) for problem in _layout(resolved.config, world_size)]


def _not_yet(resolved: Resolved) -> Iterator[Problem]:
    """Name all keys that are not supported in one problem, each with its place."""
    found = []
    for key, accepted in NOT_YET.items():
        value = get(resolved.config, key)
        if value not in accepted:
            source = resolved.sources.get(key)
            found.append(f"{key} = {toml_value(value)}" + (f" ({source.where})" if source else ""))
    if found:
        yield Problem("", f"not supported in this version: {', '.join(found)}", tip="leave these keys out")


def _batch(config: Config) -> Iterator[Problem]:
    training = config.training
    if training.global_batch_size == 0 or training.global_batch_size < -1:
        message = f"`training.global_batch_size` cannot be {training.global_batch_size}"
        yield Problem("training.global_batch_size", message, tip="a positive number, or -1 for one microbatch a rank")
    elif 0 < training.global_batch_size < training.local_batch_size:
        yield Problem(
            "training.global_batch_size",
            f"training.global_batch_size {training.global_batch_size} is smaller than "
            f"training.local_batch_size {training.local_batch_size}",
            tip="lower training.local_batch_size",
        )
    if config.validation.steps == 0 or config.validation.steps < -1:
        message = f"`validation.steps` cannot be {config.validation.steps}"
        yield Problem("validation.steps", message, tip="a positive number of batches, or -1 for all")


def _schedule(config: Config) -> Iterator[Problem]:
    training, schedule = config.training, config.lr_scheduler
    if schedule.decay_ratio is not None and schedule.warmup_steps < training.steps:
        decay = round(training.steps * schedule.decay_ratio)
        if schedule.warmup_steps + decay > training.steps + 1:
            yield Problem(
                "lr_scheduler.decay_ratio",
                f"{schedule.warmup_steps} warmup steps and {decay} of decay do not fit into {training.steps} steps",
                tip="lower lr_scheduler.warmup_steps or lr_scheduler.decay_ratio, or raise training.steps",
            )
    roles = {"embedding", "input", "condition", "hidden", "output", "norm", "bias", "expert", "router"}
    for role in config.optimizer.no_decay_roles:
        if role not in roles:
            yield Problem(
                "optimizer.no_decay_roles", f"no parameter role `{role}`", tip="one of " + ", ".join(sorted(roles))
            )


def _memory(config: Config) -> Iterator[Problem]:
    recompute = config.activation_checkpoint
    if recompute.mode == "memory_budget" and not config.compile.enable:
        message = "`activation_checkpoint.mode` memory_budget is the compiler's, and `compile.enable` is off"
        yield Problem("activation_checkpoint.mode", message, tip="set compile.enable, or use `selective`")
    option = recompute.selective_ac_option
    if option != "op" and not (option.isdigit() and int(option) > 0):
        message = f"`activation_checkpoint.selective_ac_option` cannot be `{option}`"
        tip = "`op`, or a number n to recompute every n-th block"
        yield Problem("activation_checkpoint.selective_ac_option", message, tip=tip)
    parallel = config.parallelism
    replicated_only = parallel.data_parallel_replicate_degree > 1 and parallel.data_parallel_shard_degree == 1
    if config.training.enable_cpu_offload and replicated_only:
        message = "host offload is FSDP's, and `parallelism.data_parallel_shard_degree` is 1 (DDP)"
        yield Problem("training.enable_cpu_offload", message, tip="set data_parallel_shard_degree to -1")


def _overlap(config: Config) -> Iterator[Problem]:
    """Asynchronous tensor parallelism is what the compiler makes of the tensor-parallel exchanges of blocks."""
    parallel, key = config.parallelism, "parallelism.enable_async_tensor_parallel"
    if not parallel.enable_async_tensor_parallel:
        return
    needed = {
        "parallelism.tensor_parallel_degree above 1": parallel.tensor_parallel_degree > 1,
        "parallelism.enable_sequence_parallel": parallel.enable_sequence_parallel,
        "compile.enable, with `model` among compile.components": config.compile.enable
        and "model" in config.compile.components,
    }
    missing = [name for name, there in needed.items() if not there]
    if missing:
        yield Problem(key, f"`{key}` needs {' and '.join(missing)}", tip=f"set {missing[0]}, or leave it off")


def _files(config: Config) -> Iterator[Problem]:
    for key in ("job.dump_folder", "checkpoint.folder"):
        if not get(config, key).strip():
            yield Problem(key, f"`{key}` is empty", tip=f"name a folder, e.g. `{fields()[key].default}`")
    if config.experimental.custom_import:
        import importlib.util

        try:
            found = importlib.util.find_spec(config.experimental.custom_import)
        except (ImportError, ValueError):
            found = None
        if found is None:
            message = f"no Python module `{shown(config.experimental.custom_import)}`"
            yield Problem("experimental.custom_import", message, tip="is it installed, or in the working folder?")
    if config.profiling.enable_profiling:
        needed = config.profiling.profiler_active + config.profiling.profiler_warmup
        if needed > config.profiling.profile_freq:
            message = f"profiler_warmup + profiler_active = {needed} steps do not fit into profile_freq"
            yield Problem("profiling.profile_freq", message, tip=f"raise profiling.profile_freq to {needed} or more")


def _saving(config: Config) -> Iterator[Problem]:
    """Options that ask something of the checkpoints, which are off."""
    saving, guard = config.checkpoint, config.guard
    for key, value, wants in (
        ("checkpoint.create_seed_checkpoint", saving.create_seed_checkpoint, True),
        ("guard.non_finite", guard.non_finite, "rollback"),
        ("guard.spike", guard.spike, "rollback"),
    ):
        if value == wants and not saving.enable:
            message = f"`{key}` {toml_value(value)} needs checkpoints, and `checkpoint.enable` is off"
            yield Problem(key, message, tip="set checkpoint.enable")
    yield from _foreign(config)
    if saving.keep_best_k and not config.validation.enable:
        message = (
            f"`checkpoint.keep_best_k` {saving.keep_best_k} goes by validation loss, and `validation.enable` is off"
        )
        yield Problem("checkpoint.keep_best_k", message, tip="set validation.enable, or keep_best_k to 0")
    for part in saving.exclude_from_loading:
        if part not in PARTS:
            near = difflib.get_close_matches(part, PARTS, n=1, cutoff=0.5)
            tip = f"did you mean `{near[0]}`?" if near else "one of " + ", ".join(PARTS)
            yield Problem("checkpoint.exclude_from_loading", f"a checkpoint has no part `{shown(part)}`", tip=tip)


def _foreign(config: Config) -> Iterator[Problem]:
    """Weights of Hugging Face folders, in and out."""
    saving = config.checkpoint
    if saving.initial_load_in_hf and not (saving.initial_load_path or config.model.hf_assets_path):
        message = "`checkpoint.initial_load_in_hf` says that there are weights to start from, and no key says where"
        yield Problem("checkpoint.initial_load_in_hf", message, tip="set checkpoint.initial_load_path")
    if saving.initial_load_in_hf and not saving.initial_load_model_only:
        message = "`checkpoint.initial_load_model_only` is off, but a Hugging Face folder holds nothing but weights"
        yield Problem("checkpoint.initial_load_model_only", message, tip="leave it on")
    if saving.initial_load_in_hf_quantized and not saving.initial_load_in_hf:
        message = "`checkpoint.initial_load_in_hf_quantized` needs `checkpoint.initial_load_in_hf`"
        yield Problem("checkpoint.initial_load_in_hf_quantized", message, tip="set checkpoint.initial_load_in_hf")
    if saving.last_save_in_hf and not saving.enable:
        message = "`checkpoint.last_save_in_hf` needs checkpoints, and `checkpoint.enable` is off"
        yield Problem("checkpoint.last_save_in_hf", message, tip="set checkpoint.enable")


def _layout(config: Config, world_size: int) -> Iterator[Problem]:
    """Do the degrees multiply to the number of ranks, and does the batch divide over them?"""
    try:
        layout = Layout.of(config.parallelism, world_size)
    except UsageError as error:
        named = error.where in fields()  # else it is about all degrees
        key = error.where if named and error.where else _degree(config, "parallelism.data_parallel_shard_degree")
        yield Problem(key, error.message, tip=error.tip)
        return
    unit = config.training.local_batch_size * layout.dp
    rows = config.training.global_batch_size
    if rows > 0 and rows % unit:
        below, above = rows // unit * unit, -(-rows // unit) * unit
        nearest = f"{below} or {above}" if below else str(above)
        yield Problem(
            "training.global_batch_size",
            f"training.global_batch_size {rows} does not divide into training.local_batch_size "
            f"{config.training.local_batch_size} x {layout.dp} data-parallel ranks",
            tip=f"try {nearest}, or another training.local_batch_size",
        )


def _degree(config: Config, key: str) -> str:
    """Return the key of the degree that is most likely wrong: the largest one that somebody set."""
    asked = {f"parallelism.{name}": getattr(config.parallelism, name) for name in KEYS.values()}
    largest = max(asked, key=lambda name: asked[name])
    return largest if asked[largest] > 1 else key


def placed(problem: Problem, resolved: Resolved) -> Problem:
    """Say where the key was set."""
    source = resolved.sources.get(problem.key)
    if problem.where is not None or source is None:
        return problem
    return Problem(problem.key, problem.message, source.where, problem.tip)
