"""Where numbers go besides the console: JSON lines always, TensorBoard and Weights & Biases if asked."""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path
from typing import Any

from titan_core.config.schema import Config
from titan_core.runtime.errors import missing_extra
from titan_core.runtime.events import Event, Saved, StepDone, Validated, as_dict

LOGGED = (StepDone, Validated, Saved)


class JsonLines:
    """`metrics.jsonl`: one record a line, appended; a crash can cost the last line, never an earlier one."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            with path.open("ab") as file:  # the run before died while it wrote
                file.write(b"\n")
        self._file = path.open("a", encoding="utf-8")

    def record(self, kind: str, **data: Any) -> None:
        """Write a record of its own kind."""
        self._file.write(json.dumps({"event": kind, "time": time.time(), **data}) + "\n")
        self._file.flush()

    def __call__(self, event: Event) -> None:
        """Write an event, if it is one that is kept."""
        if isinstance(event, LOGGED):
            data = as_dict(event)
            self.record(data.pop("event"), **data)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing_extra("tensorboard", "logging") from None
        self._writer = SummaryWriter(str(folder), max_queue=1000)

    def __call__(self, event: Event) -> None:
        """Write the numbers of an event."""
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, getattr(event, "step", 0))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandB:
    """Weights & Biases. The run's id is kept in the dump folder, so that a resumed run is the same run."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise missing_extra("wandb", "logging") from None
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb-run-id"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        id_file.write_text(run_id)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "titan"),
            entity=os.environ.get("WANDB_TEAM"),
            name=os.environ.get("WANDB_RUN_NAME"),
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=config,
        )

    def __call__(self, event: Event) -> None:
        """Log the numbers of an event."""
        numbers = scalars(event)
        if numbers:
            self._run.log(numbers, step=getattr(event, "step", 0))

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
        return {"validation_metrics/loss": event.loss, "validation_metrics/seconds": event.seconds}
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
        **event.extra,
    }
    return {name: value for name, value in numbers.items() if value is not None}
