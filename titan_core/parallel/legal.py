"""Can this model be laid out like that? Asked before anything is built; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from titan_core.config.layout import Layout
from titan_core.config.quantize import FLOAT8_EXPERTS, MULTIPLE, MX_EXPERTS, rows_and_columns
from titan_core.config.schema import Config, Training
from titan_core.declare.family import Family
from titan_core.declare.parameters import Parameter
from titan_core.estimation.memory import BYTES
from titan_core.parallel import stages
from titan_core.runtime.errors import Problem, UsageError


def problems(config: Config, layout: Layout, family: Family, sizes: Any) -> list[Problem]:
    """Return why a model cannot be laid out over that many ranks on each axis."""
    return [
        *_tensor(config, layout, family, sizes),
        *_context(config, layout, family, sizes),
        *_pipeline(config, layout, family, sizes),
        *_experts(config, layout, family, sizes),
        *_products(config, family, sizes),
        *_backend(config, layout),
        *_quantized(config, layout, family),
        *_quantized_experts(config, layout, family, sizes),
        *_further_tokens(config, family, sizes),
        *family.problems(config, sizes),
    ]


def _tensor(config: Config, layout: Layout, family: Family, sizes: Any) -> Iterator[Problem]:
    if layout.tp == 1:
        return
    key = "parallelism.tensor_parallel_degree"
    inside = {"columns": family.sharding.columns, "rows": family.sharding.rows}
    heads = min((a.num_kv_heads for a in family.attentions(sizes)), default=layout.tp)
    if heads % layout.tp:
        fits = [n for n in range(1, layout.tp + 1) if heads % n == 0]
        yield Problem(key, f"{heads} key/value heads do not divide over {layout.tp} ranks", tip=f"try {fits[-1]}")
    for parameter in family.parameters(sizes):
        module = parameter.name.rpartition(".")[0]
        dim = family.sharding.split_dim(module)
        if (
            dim is None
            or len(parameter.shape) < -dim
            or not any(inside.values())
            or parameter.role in ("embedding", "output")
        ):
            continue
        if parameter.shape[dim] % layout.tp:
            what = f"{parameter.shape[dim]} {'columns' if dim == -1 else 'rows'}"
            message = f"{parameter.name} has {what}, not a multiple of {layout.tp}"
            yield Problem(key, message, tip="choose a degree that divides it")
            return
    if config.parallelism.enable_sequence_parallel:
        yield from _divides(config, layout.tp * _pieces(layout, family, sizes), key, family)


def _context(config: Config, layout: Layout, family: Family, sizes: Any) -> Iterator[Problem]:
    if layout.cp == 1:
        return
    key = "parallelism.context_parallel_degree"
    if layout.tp == 1 or not config.parallelism.enable_sequence_parallel:
        yield from _divides(config, _pieces(layout, family, sizes), key, family)
    windows = [a.window for a in family.attentions(sizes) if a.window is not None]
    masked = getattr(sizes, "attention_mask", "causal") == "block_causal"
    if windows and min(windows) < config.training.seq_len and not masked:
        message = f"attention within windows of {min(windows)} tokens over several ranks needs masks of documents"
        yield Problem(key, message, tip="set model.args.attention_mask to block_causal")
    if config.parallelism.context_parallel_rotate_method == "heads":
        heads = min((a.num_kv_heads for a in family.attentions(sizes)), default=0) // layout.tp
        if heads % layout.cp:
            yield Problem(
                "parallelism.context_parallel_rotate_method",
                f"`heads` deals key/value heads to {layout.cp} context-parallel ranks, and of them there are {heads}",
                tip="use `allgather` or `alltoall`",
            )


def _pieces(layout: Layout, family: Family, sizes: Any) -> int:
    """Return into how many pieces context parallelism cuts a sequence: two a rank if it is causal."""
    causal = any(attention.causal for attention in family.attentions(sizes))
    return layout.cp * 2 if layout.cp > 1 and causal else layout.cp


def _divides(config: Config, unit: int, key: str, family: Family) -> Iterator[Problem]:
    lengths = {"training.seq_len": config.training.seq_len}
    if family.task != "causal_lm":
        lengths = {f"{kind} rows": n for kind, n in family.lengths(config).items() if kind != "sample"}
    elif config.validation.enable:
        lengths["validation.seq_len"] = config.validation.seq_len
    for name, length in lengths.items():
        if length % unit:
            below, above = length // unit * unit, -(-length // unit) * unit
            near = f"{below} or {above}" if below else str(above)
            yield Problem(key, f"`{name}` {length} is not a multiple of {unit}, the pieces of a sequence", tip=near)


def _pipeline(config: Config, layout: Layout, family: Family, sizes: Any) -> Iterator[Problem]:
    if layout.pp == 1:
        return
    parallel, training = config.parallelism, config.training
    if not family.sharding.first:
        message = f"{family.name} is not cut into pipeline stages"
        yield Problem("parallelism.pipeline_parallel_degree", message, tip="use fsdp, tensor or context parallelism")
        return
    sharded = parallel.data_parallel_backend == "fsdp2" and (layout.dp * layout.cp > 1 or training.enable_cpu_offload)
    if sharded and parallel.fsdp_reshard_after_forward == "always" and stages.may_split(parallel):
        message = "weights that are freed after the forward get no gradients from a backward in two halves"
        tip = "use `default` or `never`, or a schedule that does not split backwards, as Interleaved1F1B"
        yield Problem("parallelism.fsdp_reshard_after_forward", message, tip=tip)
    rows = parallel.pipeline_parallel_microbatch_size
    lengths = {"training.local_batch_size": training.local_batch_size}
    if config.validation.enable:
        lengths["validation.local_batch_size"] = config.validation.local_batch_size
    for name, size in lengths.items():
        if size % rows:
            message = f"`{name}` {size} is not a multiple of `pipeline_parallel_microbatch_size` {rows}"
            yield Problem("parallelism.pipeline_parallel_microbatch_size", message, tip="1 always fits")
    try:
        own = (p.name.split(".") for p in family.parameters(sizes) if p.tied_to is None)
        names = dict.fromkeys(".".join(parts[:end]) for parts in own for end in range(1, len(parts)))
        stages.cuts(parallel, family, sizes, list(names))
    except UsageError as error:
        yield Problem(error.where or "parallelism", error.message, tip=error.tip)


def _experts(config: Config, layout: Layout, family: Family, sizes: Any) -> Iterator[Problem]:
    if layout.ep == 1:
        return
    key = "parallelism.expert_parallel_degree"
    shapes = [p.shape for p in family.parameters(sizes) if p.role == "expert"]
    if not shapes:
        yield Problem(key, f"this {family.name} has no experts to split over {layout.ep} ranks", tip="use 1")
        return
    count = shapes[0][0]
    if count % layout.ep:
        fits = [n for n in range(1, layout.ep + 1) if count % n == 0]
        yield Problem(key, f"{count} experts do not divide over {layout.ep} ranks", tip=f"try {fits[-1]}")
        return
    if layout.routed_by_parts and not config.parallelism.enable_sequence_parallel:
        message = "experts over tensor-parallel ranks take parts of the stream, and `enable_sequence_parallel` is off"
        tip = f"set it, or expert_tensor_parallel_degree to {layout.tp}"
        yield Problem("parallelism.enable_sequence_parallel", message, tip=tip)
    shards = layout.expert_fsdp
    if (count // layout.ep) % shards and any(shape[1] // layout.expert_tp % shards for shape in shapes):
        message = f"{count // layout.ep} experts a rank, {shapes[0][1]} wide, do not divide over {shards} shards"
        yield Problem(key, message, tip=f"raise it to {min(count, layout.ep * shards)}")


def _further_tokens(config: Config, family: Family, sizes: Any) -> Iterator[Problem]:
    key = "training.mtp_loss_weight"
    if config.training.mtp_loss_weight != Training().mtp_loss_weight and not getattr(sizes, "num_mtp_layers", 0):
        message = f"`{key}` does nothing: this {family.name} has no layers of multi-token prediction"
        tip = "set model.args.num_mtp_layers, or leave it out" if hasattr(sizes, "num_mtp_layers") else "leave it out"
        yield Problem(key, message, tip=tip)


def _products(config: Config, family: Family, sizes: Any) -> Iterator[Problem]:
    key, backend = "training.expert_backend", config.training.expert_backend
    if not any(p.role == "expert" for p in family.parameters(sizes)):
        forced = config.training.debug_moe_force_load_balance
        asked = {key: backend != "auto", "training.debug_moe_force_load_balance": forced}
        for name in (name for name, there in asked.items() if there):
            yield Problem(name, f"`{name}` does nothing: this {family.name} has no experts", tip="leave it out")
        return
    if backend == "loop" and config.compile.enable and "model" in config.compile.components:
        yield Problem(key, "the compiler cannot see through a `loop` over experts", tip="use `titan`, or `auto`")
    if backend == "grouped_mm":
        unit = 16 // BYTES[config.training.mixed_precision_param]
        odd = [p for p in family.parameters(sizes) if p.role == "expert" and any(n % unit for n in p.shape[1:])]
        if odd:
            message = (
                f"{odd[0].name} is {odd[0].shape[1]} x {odd[0].shape[2]}, and `grouped_mm` wants multiples of {unit}"
            )
            yield Problem(key, message, tip="use `titan`, or `auto`")


def _quantized(config: Config, layout: Layout, family: Family) -> Iterator[Problem]:
    """Rows of every kind must fit the granule of quantized matmuls; those of tokens alone are looked at before."""
    known = [name for name in config.model.converters if name in MULTIPLE]
    if family.task == "causal_lm" or not known:
        return
    for kind, count in family.lengths(config).items():
        rows = config.training.local_batch_size * count // layout.cp
        if kind != "sample" and rows % MULTIPLE[known[0]]:
            message = f"{rows} {kind} rows a microbatch, and {known[0]} needs a multiple of {MULTIPLE[known[0]]}"
            yield Problem("training.local_batch_size", message, tip="choose another training.local_batch_size")


def _quantized_experts(config: Config, layout: Layout, family: Family, sizes: Any) -> Iterator[Problem]:
    grouped = config.quantize.grouped_mm
    for name, fqns in ((FLOAT8_EXPERTS, grouped.float8.fqns), (MX_EXPERTS, grouped.mx.fqns)):
        if name not in config.model.converters:
            continue
        experts = [p for p in family.parameters(sizes) if p.role == "expert"]
        found = [p for p in experts if not fqns or any(part in p.name.rsplit(".", 2)[0] for part in fqns)]
        if not found:
            message = f"{name} finds no experts" + (f" named {', '.join(fqns)}" if fqns else "")
            key = f"{name}.fqns" if fqns else "model.converters"
            yield Problem(key, message, tip="a model with experts, or no such converter")
        elif name == MX_EXPERTS:
            yield from _fits_mx(grouped.mx.recipe_name, layout, family, found)


def _fits_mx(recipe: str, layout: Layout, family: Family, experts: list[Parameter]) -> Iterator[Problem]:
    """Forward and backward sum over both sides of what a rank has of a matrix."""
    multiple = rows_and_columns(recipe)
    for parameter in experts:
        sides = list(parameter.shape[1:])
        sides[family.sharding.split_dim(parameter.name.rpartition(".")[0]) or -1] //= layout.expert_tp
        if any(side % multiple for side in sides):
            part = f"{sides[0]} x {sides[1]}" + " on a rank" * (layout.expert_tp > 1)
            message = f"{parameter.name} is {part}, and {recipe} needs multiples of {multiple}"
            yield Problem("model.converters", message, tip=f"leave {MX_EXPERTS} out, or choose experts by its fqns")
            return


def _backend(config: Config, layout: Layout) -> Iterator[Problem]:
    if config.parallelism.data_parallel_backend == "simple":
        key = "parallelism.data_parallel_backend"
        if layout.ep > 1:
            yield Problem(key, "`simple` does not shard experts that are split over ranks", tip="use fsdp2")
        if layout.tp > 1:
            message = "`simple` shards whole parameters, not those that tensor parallelism has split"
            yield Problem(key, message, tip="use fsdp2")
        if config.training.enable_cpu_offload:
            yield Problem(key, "`simple` does not offload to the host", tip="use fsdp2")
