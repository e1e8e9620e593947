"""Names and rules of quantization, in plain Python."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from titan_core.config.schema import Config
from titan_core.config.values import shown
from titan_core.runtime.errors import Problem

FLOAT8, MX = "quantize.linear.float8", "quantize.linear.mx"
FLOAT8_EXPERTS, MX_EXPERTS = "quantize.grouped_mm.float8", "quantize.grouped_mm.mx"
AUTO_FILTER = "auto_filter_small_kn"  # in filter_fqns: leave out the layers that are too small to gain from float8
MULTIPLE = {FLOAT8: 16, MX: 32}  # float8 matmuls want sides of 16 bytes, MX shares a scale among 32 numbers


def problems(config: Config) -> Iterator[Problem]:
    """Return what is wrong with `model.converters` and the options of those that it names."""
    names = config.model.converters
    known = (FLOAT8, MX, FLOAT8_EXPERTS, MX_EXPERTS)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            tip = f"did you mean `{near[0]}`? " if near else ""
            message = f"`model.converters` has no converter `{shown(name)}`"
            yield Problem("model.converters", message, tip=f"{tip}known: {', '.join(known)}")
    for kinds, what in (((FLOAT8, MX), "a layer"), ((FLOAT8_EXPERTS, MX_EXPERTS), "an expert")):
        if sum(name in kinds for name in names) > 1:
            found = " and ".join(name for name in names if name in kinds)
            message = f"`model.converters` names {found}, and {what} can be converted once"
            yield Problem("model.converters", message, tip="leave one")
    linear = [name for name in names if name in (FLOAT8, MX)]
    if len(linear) == 1:
        yield from _tokens(config, linear[0])
        yield from (_float8 if linear[0] == FLOAT8 else _mx)(config)


def rows_and_columns(recipe: str) -> int:
    """Return of what the sides of an expert must be multiples: what shares a scale, or what torchao's kernels take."""
    return 32 if "emulated" in recipe else 128


def remarks(config: Config) -> list[str]:
    """Return the options that do nothing because no converter reads them."""
    options, said = config.quantize.linear.float8, []
    if FLOAT8 not in config.model.converters:
        for key in ("recipe_name", "emulate", "enable_fsdp_float8_all_gather"):
            if getattr(options, key):
                said.append(f"`{FLOAT8}.{key}` does nothing: `model.converters` does not name {FLOAT8}")
    elif options.precompute_float8_dynamic_scale_for_fsdp and not options.enable_fsdp_float8_all_gather:
        said.append(
            f"`{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp` does nothing without `enable_fsdp_float8_all_gather`"
        )
    grouped = config.quantize.grouped_mm
    for name, section in ((FLOAT8_EXPERTS, grouped.float8), (MX_EXPERTS, grouped.mx)):
        if name not in config.model.converters:
            changed = [key for key, value in vars(section).items() if value != getattr(type(section)(), key)]
            said += [f"`{name}.{key}` does nothing: `model.converters` does not name {name}" for key in changed]
    return said


def _tokens(config: Config, name: str) -> Iterator[Problem]:
    """The weight's gradient is a matmul over the tokens that a rank sees at once, so their number must fit too."""
    training, parallel, multiple = config.training, config.parallelism, MULTIPLE[name]
    rows, key = training.local_batch_size, "training.local_batch_size"
    if parallel.pipeline_parallel_degree > 1:
        rows, key = parallel.pipeline_parallel_microbatch_size, "parallelism.pipeline_parallel_microbatch_size"
    pieces = parallel.context_parallel_degree
    tokens = rows * training.seq_len // pieces
    if tokens % multiple:
        over = f" / parallelism.context_parallel_degree {pieces}" if pieces > 1 else ""
        message = (
            f"{key} {rows} x training.seq_len {training.seq_len}{over} = {tokens} tokens, and {name} needs a multiple "
            f"of {multiple}"
        )
        yield Problem("training.seq_len", message, tip=f"a multiple of {multiple * pieces}")


def _float8(config: Config) -> Iterator[Problem]:
    options = config.quantize.linear.float8
    recipe = options.recipe_name or "tensorwise"
    if AUTO_FILTER in options.filter_fqns and recipe == "rowwise_with_gw_hp":
        message = f"`{FLOAT8}.filter_fqns`: nobody has measured which layers are too small for {recipe}"
        yield Problem(f"{FLOAT8}.filter_fqns", message, tip=f"name layers instead of {AUTO_FILTER}, or use rowwise")
    if options.enable_fsdp_float8_all_gather and recipe != "tensorwise":
        message = f"`{FLOAT8}.enable_fsdp_float8_all_gather` gathers one scale a weight, and {recipe} has one a row"
        yield Problem(f"{FLOAT8}.enable_fsdp_float8_all_gather", message, tip="use tensorwise, or gather in bf16")
    parallel = config.parallelism
    others = {
        "tensor_parallel_degree": parallel.tensor_parallel_degree > 1,
        "data_parallel_backend": parallel.data_parallel_backend != "fsdp2",
    }
    for key in (key for key, other in others.items() if other and options.enable_fsdp_float8_all_gather):
        message = (
            f"`{FLOAT8}.enable_fsdp_float8_all_gather` is for weights that FSDP2 alone splits, and "
            f"`parallelism.{key}` is {getattr(parallel, key)}"
        )
        yield Problem(f"{FLOAT8}.enable_fsdp_float8_all_gather", message, tip="leave one of the two out")


def _mx(config: Config) -> Iterator[Problem]:
    if AUTO_FILTER in config.quantize.linear.mx.filter_fqns:
        message = f"`{MX}.filter_fqns`: nobody has measured which layers are too small for MXFP8"
        yield Problem(f"{MX}.filter_fqns", message, tip=f"name layers instead of {AUTO_FILTER}")
