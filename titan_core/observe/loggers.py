"""Where numbers go besides the console: JSON lines always, TensorBoard and Weights & Biases if asked."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
from pathlib import Path
from typing import Any

from titan_core.config.schema import Config
from titan_core.runtime.errors import RemoteError, RunFailed, missing_extra
from titan_core.runtime.events import Event, Sampled, Saved, StepDone, Validated, Warned, as_dict

LOGGED = (StepDone, Validated, Saved, Warned)
_BLOCK = 1 << 16


class JsonLines:
    """`metrics.jsonl`: one record a line, appended; a crash can cost the last line, never an earlier one.

    Numbers that are not finite become null, which JSON has instead. Raises `RunFailed` where it cannot write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                _drop_torn_line(path)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            tip = "choose another folder with `--run` (job.dump_folder)"
            raise RunFailed(f"cannot write the log: {error.strerror}", where=str(path), tip=tip) from error

    def record(self, kind: str, **data: Any) -> None:
        """Write a record of its own kind."""
        record = {"event": kind, "time": time.time(), **data}
        line = json.dumps(_finite(record), allow_nan=False) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            tip = "the same command goes on from the last checkpoint"
            raise RunFailed(f"cannot write the log: {error.strerror}", where=str(self.path), tip=tip) from error

    def __call__(self, event: Event) -> None:
        """Write an event, if it is one that is kept."""
        if isinstance(event, LOGGED):
            data = as_dict(event)
            self.record(data.pop("event"), **data)

    def close(self) -> None:
        """Close the file; every record is in it already."""
        with contextlib.suppress(OSError):  # what could not be written has been reported
            self._file.close()


def _drop_torn_line(path: Path) -> None:
    """Cut what follows the last newline: the run before died while it wrote that."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class TensorBoard:
    """Event files for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing_extra("tensorboard", "logging") from None
        self._writer = SummaryWriter(str(folder), max_queue=1000)

    def __call__(self, event: Event) -> None:
        """Write the numbers of an event, or its images."""
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, getattr(event, "step", 0))
        if isinstance(event, Sampled):
            for number, image in enumerate(event.images):
                self._writer.add_image(f"samples/{number}", image, event.step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandB:
    """Weights & Biases. The run's id is kept in the dump folder, so that a resumed run is the same run.

    `step` is a number of its own, the axis of all others: W&B drops what is logged at a step that it has passed, as a
    run does that resumes from a checkpoint before its last line.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
            from wandb.errors import Error as WandBError
        except ImportError:
            raise missing_extra("wandb", "logging") from None
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb-run-id"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        id_file.write_text(run_id)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "titan"),
                entity=os.environ.get("WANDB_TEAM"),
                name=os.environ.get("WANDB_RUN_NAME"),
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=config,
            )
        except WandBError as error:
            raise RemoteError(
                f"Weights & Biases did not start: {error}",
                where="metrics.enable_wandb",
                tip="`wandb login`, or WANDB_MODE=offline to log into the run's folder",
            ) from None
        self._run.define_metric("*", step_metric="step")

    def __call__(self, event: Event) -> None:
        """Log the numbers of an event, or its images."""
        if isinstance(event, Sampled):
            import wandb

            pairs = zip(event.images, event.captions, strict=True)
            images = [wandb.Image(image, caption=caption) for image, caption in pairs]
            self._run.log({"step": event.step, "samples": images})
        numbers = scalars(event)
        if numbers:
            self._run.log({"step": getattr(event, "step", 0), **numbers})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


Logger = JsonLines | TensorBoard | WandB


def open_loggers(config: Config, rank: int) -> list[Logger]:
    """Open the loggers of a rank: the main rank's, or every rank's with `metrics.save_for_all_ranks`."""
    if rank and not config.metrics.save_for_all_ranks:
        return []
    from titan_core.config.load import to_dict

    base = Path(config.job.dump_folder)
    suffix = f"-rank{rank}" if rank else ""
    loggers: list[Logger] = [JsonLines(base / f"metrics{suffix}.jsonl")]
    if config.metrics.enable_tensorboard:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        loggers.append(TensorBoard(base / config.metrics.save_tb_folder / f"{stamp}{suffix}"))
    if config.metrics.enable_wandb:
        loggers.append(WandB(base / f"wandb{suffix}", to_dict(config)))
    return loggers


def scalars(event: Event) -> dict[str, float]:
    """Return an event's numbers by the names that torchtitan's dashboards know."""
    if isinstance(event, Validated):
        parts = {f"validation_metrics/loss {name}": value for name, value in event.parts.items()}
        return {"validation_metrics/loss": event.loss, "validation_metrics/seconds": event.seconds, **parts}
    if not isinstance(event, StepDone):
        return {}
    numbers: dict[str, float | None] = {
        "loss_metrics/global_avg_loss": event.loss,
        "loss_metrics/global_max_loss": event.max_loss,
        "grad_norm": event.grad_norm,
        "lr": event.lr,
        "n_tokens_seen": event.tokens,
        "throughput(tps)": event.tokens_per_second,
        "tflops": event.tflops,
        "mfu(%)": None if event.mfu is None else 100 * event.mfu,
        "time_metrics/end_to_end(s)": event.seconds,
        "time_metrics/data_loading(%)": 100 * event.data_share,
        "memory/max_reserved(GiB)": event.memory_gib,
        "memory/max_reserved(%)": None if event.memory_share is None else 100 * event.memory_share,
        **event.extra,
    }
    return {name: value for name, value in numbers.items() if value is not None}
