"""`titan train`: a resolved config in, a result out."""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from titan_core.checkpoint import Checkpointer, find_step, load_tensors, read_shared
from titan_core.checkpoint.agreement import Ranks
from titan_core.config.load import Resolved, from_dict, to_dict
from titan_core.config.schema import Config
from titan_core.interop.loading import fill
from titan_core.jobs import convert, foreign
from titan_core.observe.loggers import JsonLines, Logger, open_loggers
from titan_core.runtime import distributed
from titan_core.runtime.distributed import World
from titan_core.runtime.errors import CheckpointError, ConfigError, Problem
from titan_core.runtime.events import Event, Listener, Note, Planned, Warned, silent
from titan_core.runtime.flight_recorder import FlightRecorder
from titan_core.runtime.host_memory import keep_freed_memory
from titan_core.training import resume as resuming
from titan_core.training import state
from titan_core.training.build import Parts, build
from titan_core.training.trainer import Result, Trainer, restore_newest


@dataclass(frozen=True)
class TrainResult:
    """What a training job did. `stopped_by` names the signal or limit that ended it early."""

    run: str
    step: int
    steps: int
    tokens: int
    first_loss: float | None
    last_loss: float | None
    checkpoint: str | None
    seconds: float
    finished: bool
    stopped_by: str | None


def run(
    resolved: Resolved,
    *,
    listener: Listener = silent,
    resume: str = "auto",
    until: int | None = None,
    allow_change: Sequence[str] = (),
) -> TrainResult:
    """Train, on every rank of the job that the environment describes.

    `resume` is `auto` (go on from the newest complete checkpoint, else start), `never`, a step number, or a path to
    start from. `allow_change` names config keys that may differ from the resumed run's.
    """
    config = resolved.config
    if config.experimental.custom_import:
        importlib.import_module(config.experimental.custom_import)
    began = time.perf_counter()
    resuming.check_allowed(allow_change)
    recorder = _flight_recorder(config)
    world = distributed.start(config.comm.init_timeout_seconds, always_group=config.training.enable_cpu_offload)
    if world.device.type == "cpu":
        keep_freed_memory()
    loggers: list[Logger] = []
    parts: Parts | None = None
    try:
        with recorder.watch(world):
            loggers = open_loggers(config, world.rank)
            tell = _fan_out(listener, loggers, world)
            for note in resolved.notes:
                tell(Note(note))
            trainer, restored = _set_up(config, world, tell, resume, allow_change)
            parts = trainer.parts
            _record_start(loggers, parts.config, trainer, restored)
            tell(Planned(_plan(parts)))
            if config.model.print_after_conversion:
                for model in parts.models:
                    tell(Note(f"the model:\n{model}"))
            if config.checkpoint.create_seed_checkpoint:
                trainer.save(blocking=True)
                result = trainer._result(None)
            else:
                result = trainer.fit(until)
                _export_hf(parts.config, result, tell)
            return _result(config, result, time.perf_counter() - began)
    finally:
        if parts is not None:
            parts.loader.close()
        for logger in loggers:
            logger.close()
        distributed.stop()


def _set_up(
    config: Config, world: World, listener: Listener, resume: str, allow_change: Sequence[str]
) -> tuple[Trainer, bool]:
    """Build the run and put it where it should start."""
    checkpointer = None
    if config.checkpoint.enable:
        checkpointer = Checkpointer(
            checkpoint_root(config), config.checkpoint, rank=world.rank, size=world.size, listener=listener
        )
    step = int(resume) if resume.isdigit() else config.checkpoint.load_step
    own = resume == "auto" or resume.isdigit()
    saved = checkpointer.peek(step) if checkpointer is not None and own else None
    if saved is not None:
        for line in resuming.compare(config, from_dict(saved["config"]), allow_change):
            listener(Note(line))
        config = _with_seed(config, saved["seed"])
    elif resume == "never" and checkpointer is not None and checkpointer.newest() is not None:
        raise ConfigError(
            [
                Problem(
                    "job.dump_folder",
                    f"`{config.job.dump_folder}` holds checkpoints, and `--resume never` would overwrite them",
                    tip="choose another `--run` folder, or remove this one",
                )
            ]
        )
    parts = build(config, world, listener, resuming.saved_global_batch(saved))
    trainer = Trainer(parts, checkpointer, listener)
    restored = own and restore_newest(trainer, config.checkpoint, step, listener)
    if not restored:
        _load_initial(trainer, resume, listener)
    return trainer, restored


def _load_initial(trainer: Trainer, resume: str, listener: Listener) -> None:
    """Start from somebody else's weights, if the config or `--resume PATH` names them."""
    config = trainer.parts.config.checkpoint
    path = config.initial_load_path
    model_only = config.initial_load_model_only
    if resume not in ("auto", "never") and not resume.isdigit():
        path, model_only = resume, False
    if config.initial_load_in_hf and resume in ("auto", "never"):
        _load_foreign(trainer, path or trainer.parts.config.model.hf_assets_path, listener)
        return
    if path is None:
        return
    kind = foreign.kind_of(path)
    if kind != "dcp":
        tip = (
            "checkpoint.initial_load_in_hf = true" if kind == "hf" else f"`titan convert {kind}-to-dcp` makes one of it"
        )
        raise CheckpointError(f"`{path}` is {foreign.SAYS[kind]}, not a titan checkpoint", tip=tip)
    step_path = find_step(path)
    load_tensors(step_path, state.tensors(trainer.parts, model_only=model_only), check=config.verify)
    if not model_only:
        trainer.resume(read_shared(step_path), None, config.exclude_from_loading)
    listener(Note(f"started from the {'weights' if model_only else 'state'} of {step_path}"))


def _load_foreign(trainer: Trainer, path: str, listener: Listener) -> None:
    """Start from the weights of a foreign folder: every rank reads the bytes of its own shards."""
    parts, config = trainer.parts, trainer.parts.config.checkpoint

    def work() -> None:
        opened = foreign.open_weights(path, check=config.verify)
        if opened.scaled and not config.initial_load_in_hf_quantized:
            tip = "checkpoint.initial_load_in_hf_quantized = true"
            raise CheckpointError("the weights are block-scaled float8", where=path, tip=tip)
        found = opened.known_family().name
        if found != parts.family.name:
            message = f"the weights are of {found}, the run's model is {parts.family.name}"
            raise CheckpointError(message, where=path, tip=f"--model.name {found}")
        fill(opened.ours, state.tensors(parts, model_only=True))

    Ranks.present().agree(work, path)
    listener(Note(f"started from the weights of {path}"))


def _export_hf(config: Config, result: Result, listener: Listener) -> None:
    """Write the last step as a Hugging Face folder, all ranks together, from the checkpoint that was just written."""
    wanted = config.checkpoint.last_save_in_hf and not config.checkpoint.load_only
    if not wanted or result.checkpoint is None or not result.finished:
        return
    root = checkpoint_root(config)
    if "://" in root:
        command = f"titan convert dcp-to-hf {result.checkpoint} DST"
        listener(Warned(f"checkpoint.last_save_in_hf writes to folders only: `{command}`"))
        return
    target = os.path.join(root, "hf", f"step-{result.step}")
    if Ranks.present().agree(lambda: os.path.exists(target), target, share=True):
        return
    made = convert.run("dcp-to-hf", result.checkpoint, target, convert.Options(dtype=config.checkpoint.export_dtype))
    listener(Note(f"exported to {made.path}: {made.tensors} tensors, {made.bytes / 1e9:.2f} GB"))


def checkpoint_root(config: Config) -> str:
    """Return where a run's checkpoints lie: under the dump folder, or at a URL."""
    folder = config.checkpoint.folder
    return folder if "://" in folder else os.path.join(config.job.dump_folder, folder)


def _with_seed(config: Config, seed: int) -> Config:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, seed=seed))


def _fan_out(listener: Listener, loggers: list[Logger], world: World) -> Listener:
    """Tell everyone; ranks other than the main one pass on only warnings, with their number."""

    def tell(event: Event) -> None:
        for logger in loggers:
            logger(event)
        if world.is_main:
            listener(event)
        elif isinstance(event, Warned):
            listener(Warned(event.text, rank=world.rank))

    return tell


def _record_start(loggers: list[Logger], config: Config, trainer: Trainer, restored: bool) -> None:
    for logger in loggers:
        if isinstance(logger, JsonLines):
            kind = "resumed" if restored else "started"
            logger.record(kind, step=trainer.progress.step, config=to_dict(config))


def _plan(parts: Parts) -> list[tuple[str, str]]:
    """Say in a few rows what is about to be done."""
    from titan_core.estimation.flops import count_parameters

    config, layout = parts.config, parts.mesh.layout
    training = config.training
    counts = count_parameters(parts.family.parameters(parts.sizes))
    tokens = parts.global_batch * parts.sample_tokens
    return [
        ("run", config.job.dump_folder),
        ("model", f"{parts.family.name} {config.model.flavor}, {counts.total:,} parameters"),
        ("layout", f"{parts.world.device.type}, {layout}, {training.mixed_precision_param}; " + ", ".join(parts.said)),
        (
            "batch",
            f"{parts.global_batch} x {parts.sample_tokens} = {tokens:,} tokens a step, {training.steps:,} steps, "
            f"{tokens * training.steps:,} tokens",
        ),
        ("data", training.dataset_path or training.dataset),
    ]


def _result(config: Config, result: Result, seconds: float) -> TrainResult:
    return TrainResult(
        run=config.job.dump_folder,
        step=result.step,
        steps=config.training.steps,
        tokens=result.tokens,
        first_loss=result.first_loss,
        last_loss=result.last_loss,
        checkpoint=result.checkpoint,
        seconds=seconds,
        finished=result.finished,
        stopped_by=result.stopped_by,
    )


def _flight_recorder(config: Config) -> FlightRecorder:
    comm = config.comm
    folder = os.path.join(config.job.dump_folder, comm.save_traces_folder)
    recorder = FlightRecorder(folder, comm.save_traces_file_prefix, comm.trace_buf_size)
    recorder.put_earlier_traces_aside()
    return recorder
