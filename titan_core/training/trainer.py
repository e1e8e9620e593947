"""The life of a run: resume, step, log, validate, save, stop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from titan_core.checkpoint import Checkpointer
from titan_core.config.schema import Checkpoint
from titan_core.estimation.flops import flops_per_token
from titan_core.observe.metrics import StepMeter
from titan_core.observe.oom import explain_out_of_memory
from titan_core.observe.profiler import Profiler
from titan_core.optim.schedule import lr_factor
from titan_core.parallel.data_parallel import DTYPES
from titan_core.runtime import events
from titan_core.runtime.distributed import set_timeout
from titan_core.runtime.errors import RunFailed
from titan_core.runtime.events import Listener, Note, StepDone, Warned
from titan_core.training import state
from titan_core.training.build import Parts
from titan_core.training.guards import Guard, dump
from titan_core.training.housekeeping import GarbageCollector
from titan_core.training.signals import StopRequest
from titan_core.training.state import Progress
from titan_core.training.step import Outcome, forward_backward
from titan_core.training.validate import Validator


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    tokens: int
    first_loss: float | None
    last_loss: float | None
    checkpoint: str | None
    finished: bool
    stopped_by: str | None


class Trainer:
    """Runs built parts from wherever they are to the last step."""

    def __init__(self, parts: Parts, checkpointer: Checkpointer | None, listener: Listener) -> None:
        self.parts = parts
        self.checkpointer = checkpointer
        self.listener = listener
        config = parts.config
        self.progress = Progress()
        self.guard = Guard(config.guard)
        self.validator = Validator(parts, listener) if config.validation.enable else None
        self.profiler = Profiler(config, parts.world.rank, parts.world.device)
        self.first_loss: float | None = None
        self.last_saved: int | None = None
        self._validation_loss: float | None = None
        self._steps_to_skip = 0
        self._reached_target = False
        self._meter = StepMeter(
            device=parts.world.device,
            world_size=parts.world.size,
            steps=config.training.steps,
            flops_per_token=flops_per_token(
                parts.family.parameters(parts.sizes),
                parts.family.attentions(parts.sizes),
                parts.family.lengths(config),
            ),
        )

    def resume(self, shared: dict[str, Any], own: dict[str, Any] | None, exclude: Sequence[str] = ()) -> None:
        """Take over a loaded checkpoint's progress; its tensors are in place already."""
        self.progress = state.restore(self.parts, shared, own, list(exclude))
        if "train_state" not in exclude:
            self.guard.load_state_dict(shared["guard"])
        self.last_saved = self.progress.step

    def fit(self, until: int | None = None) -> Result:
        """Train to the last step, or to step `until`, or until a signal or the time limit asks to stop."""
        config = self.parts.config
        last = min(config.training.steps, until or config.training.steps)
        group = dist.new_group(backend="gloo", group_desc="stop") if self.parts.world.size > 1 else None
        set_timeout(config.comm.init_timeout_seconds)  # torch gives every group but the first one half an hour
        first = True
        stopped_by = None
        collector = GarbageCollector(config.training.gc_freq, config.training.gc_debug)
        stop = StopRequest(group, config.training.time_limit_minutes, self._unsaved_steps)
        explained = explain_out_of_memory(
            config, self.parts.world.rank, images=self.parts.family.task == "flow_matching"
        )
        with stop, collector, self.profiler, explained:
            self.profiler.before_first_step(self.progress.step)
            self._meter.begin()
            while self.progress.step < last and stopped_by is None:
                self._one_step()
                step = self.progress.step
                collector.after_step(step)
                self.profiler.after_step(step)
                if self.validator is not None and self.validator.due(step):
                    stopped_by = self._validate(step, stop)
                stopped_by = stopped_by or stop.agreed()
                self._save_if_due(step, last=step >= last or stopped_by is not None)
                if first:  # of this start, wherever it resumed; what is compiled is compiled, validation included
                    set_timeout(config.comm.train_timeout_seconds)
                    for report in self.parts.reports:
                        self.listener(Note(report()))
                first = False
            if self.checkpointer is not None:
                self.checkpointer.finish()
                if self._finished() and config.checkpoint.last_save_model_only:
                    self._export_weights()
        return self._result(stopped_by)

    # ------------------------------------------------------------------------------------------ a step

    def _one_step(self) -> None:
        """Compute, judge, update; a step that is skipped counts as a step, one that is rolled back does not."""
        step = self.progress.step + 1
        self._read_past_bad_data()
        rows = self.parts.loader.rows
        lr = self.parts.config.optimizer.lr * lr_factor(
            step - 1, self.parts.config.training.steps, self.parts.config.lr_scheduler
        )
        outcome = forward_backward(self.parts, self._read)
        verdict = self.guard.judge(outcome.loss, outcome.grad_norm)
        if verdict == "stop":
            self._fail(step, rows)
        if verdict == "rollback":
            self._roll_back(step)
            return
        if self.checkpointer is not None:
            self.checkpointer.wait_staged()
        if verdict == "skip":
            self._warn(f"step {step} is skipped: {self.guard.reason}")
        else:
            self.parts.update(lr)
        self._count(step, outcome, lr)

    def _read(self) -> Any:
        return next(self.parts.loader)

    def _count(self, step: int, outcome: Outcome, lr: float) -> None:
        tokens = self.parts.global_batch * self.parts.sample_tokens
        self.progress.step = step
        self.progress.tokens += tokens
        self.progress.loss = outcome.loss
        self.progress.skipped = self.guard.skipped
        if self.first_loss is None:
            self.first_loss = outcome.loss
        self._meter.add(tokens, self.parts.loader.wait_seconds)
        self.parts.loader.wait_seconds = 0.0
        freq = self.parts.config.metrics.log_freq
        if step == 1 or step % freq == 0 or step == self.parts.config.training.steps:
            self._log(step, outcome, lr)
        else:
            self.listener(events.Progress("step", step, self.parts.config.training.steps, "steps"))

    def _log(self, step: int, outcome: Outcome, lr: float) -> None:
        done: StepDone = self._meter.report(
            step=step,
            loss=outcome.loss,
            max_loss=outcome.max_loss,
            grad_norm=outcome.grad_norm,
            lr=lr,
            total_tokens=self.progress.tokens,
        )
        done.extra.update({**outcome.further, **self.parts.balance.metrics()})
        self.listener(done)

    def _validate(self, step: int, stop: StopRequest) -> str | None:
        """Validate, and return why to stop if that was asked for meanwhile."""
        assert self.validator is not None
        validated = self.validator.run(step, stop.agreed)
        if isinstance(validated, str):
            return validated
        began = time.perf_counter()
        self.validator.show(step)
        self._validation_loss = validated.loss
        self._meter.pause(validated.seconds + time.perf_counter() - began)
        target = self.parts.config.validation.target_loss
        if target is not None and validated.loss <= target:
            self._reached_target = True
            return "validation.target_loss"
        return None

    # ------------------------------------------------------------------------------------------ saving

    def _save_if_due(self, step: int, *, last: bool) -> None:
        config = self.parts.config.checkpoint
        if self.checkpointer is None or config.load_only or self.last_saved == step:
            return
        first = step == 1 and config.enable_first_step_checkpoint
        if last or first or step % config.interval == 0:
            self.save(blocking=last or config.async_mode == "disabled")

    def save(self, *, blocking: bool) -> None:
        """Save a full checkpoint of the present step."""
        assert self.checkpointer is not None
        began = time.perf_counter()
        snapshot = state.snapshot(self.parts, self.progress, {"guard": self.guard.state_dict()})
        metrics = {} if self._validation_loss is None else {"validation_loss": self._validation_loss}
        self.checkpointer.save(self.progress.step, snapshot, blocking=blocking, metrics=metrics)
        self.last_saved = self.progress.step
        self._meter.pause(time.perf_counter() - began)

    def _unsaved_steps(self) -> int:
        """Return how many steps would be lost by stopping now, the one under way not counted."""
        return self.progress.step - (self.last_saved or 0)

    def _export_weights(self) -> None:
        """Write the weights alone, in the export dtype, beside the full checkpoints."""
        assert self.checkpointer is not None
        if self.checkpointer.config.load_only:
            return
        root = f"{self.checkpointer.storage.root}/weights"
        parts, step = self.parts, self.progress.step
        exporter = Checkpointer(
            root, self.checkpointer.config, rank=parts.world.rank, size=parts.world.size, listener=self.listener
        )
        if step in exporter.steps():
            return
        whole = state.snapshot(parts, self.progress, {"guard": self.guard.state_dict()}, model_only=True)
        dtype = DTYPES[parts.config.checkpoint.export_dtype]
        cast = {name: tensor.detach().to(dtype) for name, tensor in whole.tensors.items()}
        exporter.save(step, dataclasses.replace(whole, tensors=cast), blocking=True)

    # ------------------------------------------------------------------------------------------ when a step goes wrong

    def _fail(self, step: int, rows: int) -> None:
        norms = self._grad_norms()
        message = f"step {step} went wrong: {self.guard.reason}"
        where = None
        if self.parts.world.is_main:
            where = dump(self.parts.config.job.dump_folder, step, self.guard.reason, norms, rows, self.guard)
        if self.checkpointer is not None:
            self.checkpointer.finish()
        raise RunFailed(
            message,
            where=where,
            tip="the weights are not updated and not saved; guard.non_finite and guard.spike can `skip` or `rollback`",
        )

    def _grad_norms(self) -> dict[str, float]:
        from torch.distributed.tensor import DTensor

        norms = {}
        for name, parameter in self.parts.parameters.items():
            if parameter.grad is not None:
                norm = torch.linalg.vector_norm(parameter.grad)
                norms[name] = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        return norms

    def _roll_back(self, step: int) -> None:
        """Go back to the last checkpoint; the data that led here will be passed over when the run is here again."""
        skipped, reason = self.guard.skipped, self.guard.reason
        if self.checkpointer is None or self.checkpointer.newest() is None:
            raise RunFailed(
                f"step {step} went wrong ({reason}), and there is no checkpoint to roll back to",
                tip="set checkpoint.enable, a smaller checkpoint.interval, or another guard policy",
            )
        loaded = self.checkpointer.load(state.tensors(self.parts))
        assert loaded is not None
        self.resume(loaded.shared, loaded.own)
        self.guard.skipped = skipped
        self._steps_to_skip = step - loaded.step
        self._warn(f"step {step} went wrong ({reason}): back to step {loaded.step}, past {self._steps_to_skip} batches")

    def _read_past_bad_data(self) -> None:
        if self._steps_to_skip:
            self.parts.loader.skip_steps(self._steps_to_skip)
            self._steps_to_skip = 0

    def _warn(self, text: str) -> None:
        if self.parts.world.is_main:
            self.listener(Warned(text))

    def _result(self, stopped_by: str | None) -> Result:
        path = None
        if self.checkpointer is not None and self.last_saved is not None:
            path = self.checkpointer.path(self.last_saved)
        step = self.progress.step
        return Result(
            step,
            self.progress.tokens,
            self.first_loss,
            self.progress.loss,
            path,
            self._finished(),
            stopped_by,
        )

    def _finished(self) -> bool:
        return self._reached_target or self.progress.step >= self.parts.config.training.steps


def restore_newest(trainer: Trainer, checkpoint: Checkpoint, step: int, listener: Listener) -> bool:
    """Resume from the run's own newest complete checkpoint (or from `step`); return whether there was one."""
    parts, checkpointer = trainer.parts, trainer.checkpointer
    if checkpointer is None:
        return False
    exclude = checkpoint.exclude_from_loading
    tensors = state.tensors(parts)
    if "optimizer" in exclude:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}
    if "model" in exclude:
        tensors = {name: t for name, t in tensors.items() if name.startswith("optimizer.")}
    loaded = checkpointer.load(tensors, step)
    if loaded is None:
        return False
    trainer.resume(loaded.shared, loaded.own, exclude)
    if parts.world.is_main:
        rows = trainer.parts.loader.rows
        text = f"resumed at step {trainer.progress.step}: {trainer.progress.tokens:,} tokens, {rows:,} sequences read"
        listener(Note(text if loaded.own is not None else text + "; another number of ranks than before"))
    return True
