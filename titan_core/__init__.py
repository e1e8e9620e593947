"""titan's core: models, parallelism, training, checkpoints, data. `load(path)` gives a model to call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_core.jobs.load import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # torch is imported when it is used
        from titan_core.jobs.load import load

        return load
    raise AttributeError(name)
