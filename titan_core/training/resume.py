"""May this config go on with that checkpoint? What changes the loss must be asked for."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from typing import Any

from titan_core.config.fields import fields, get
from titan_core.config.schema import Config
from titan_core.config.values import toml_value
from titan_core.runtime.errors import ConfigError, Problem

# Keys that decide what is computed. All others (logging, layout, saving, ...) may change freely.
DECISIVE = (
    "model.name",
    "model.flavor",
    "model.args",
    "model.converters",
    "optimizer.*",
    "lr_scheduler.*",
    "training.dataset",
    "training.dataset_path",
    "training.seq_len",
    "training.img_size",
    "training.classifier_free_guidance_prob",
    "training.test_mode",
    "encoder.*",
    "flow_matching.*",
    "training.max_norm",
    "training.mtp_loss_weight",
    "training.dtype",
    "training.mixed_precision_param",
    "training.mixed_precision_reduce",
    "data.shuffle",
    "data.text_key",
    "data.image_key",
    "data.caption_key",
    "data.split",
    "data.subset",
    "data.streaming",
    "data.shuffle_window",
    "data.split_documents",
)
# Decisive keys that say how something is computed, not what.
HARMLESS = ("optimizer.implementation",)


def compare(config: Config, saved: Config, allowed: Sequence[str]) -> list[str]:
    """Return a line for each decisive key that changed with permission; raise `ConfigError` for the others.

    `allowed` are keys or globs, as given to `--allow-change`.
    """
    problems, said = [], []
    for key in fields():
        if not any(fnmatch.fnmatchcase(key, pattern) for pattern in DECISIVE) or key in HARMLESS:
            continue
        new, old = get(config, key), get(saved, key)
        if new == old:
            continue
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in allowed):
            said.append(f"{key} changes from {toml_value(old)} to {toml_value(new)}")
        else:
            message = f"`{key}` is {toml_value(new)}, but the run was started with {toml_value(old)}"
            tip = f"`--allow-change {key}` to go on with the new value, or `--run` for another run"
            problems.append(Problem(key, message, tip=tip))
    if problems:
        raise ConfigError(problems)
    return said


def check_allowed(allowed: Sequence[str]) -> None:
    """Refuse names in `--allow-change` that are no keys."""
    for pattern in allowed:
        if not any(fnmatch.fnmatchcase(key, pattern) for key in fields()):
            near = difflib.get_close_matches(pattern, fields(), n=1, cutoff=0.5)
            tip = f"did you mean `{near[0]}`?" if near else "`titan config list` shows every key"
            problem = Problem(pattern, f"no key `{pattern}`", "--allow-change", tip)
            raise ConfigError([problem])


def saved_global_batch(shared: dict[str, Any] | None) -> int | None:
    """Return the sequences a step of the run that is resumed."""
    return None if shared is None else int(shared["global_batch"])
