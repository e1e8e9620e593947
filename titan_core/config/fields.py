"""The schema as a flat table: dotted key -> type, default, help.

Everything that lists, completes, suggests, prints or converts keys reads this table, so a key is described in one
place only: its dataclass field.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any

from titan_core.config import schema
from titan_core.config.schema import Config

# What other toolkits call our keys. Only for suggestions: an alias is never accepted silently.
ALIASES = {
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "batch_size": "training.local_batch_size",
    "micro_batch_size": "training.local_batch_size",
    "per_device_train_batch_size": "training.local_batch_size",
    "global_batch": "training.global_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "max_steps": "training.steps",
    "num_steps": "training.steps",
    "train_steps": "training.steps",
    "max_seq_len": "training.seq_len",
    "max_seq_length": "training.seq_len",
    "sequence_length": "training.seq_len",
    "max_grad_norm": "training.max_norm",
    "grad_clip": "training.max_norm",
    "clip_grad_norm": "training.max_norm",
    "seed": "training.seed",
    "tp": "parallelism.tensor_parallel_degree",
    "tp_size": "parallelism.tensor_parallel_degree",
    "pp": "parallelism.pipeline_parallel_degree",
    "pp_size": "parallelism.pipeline_parallel_degree",
    "cp": "parallelism.context_parallel_degree",
    "ep": "parallelism.expert_parallel_degree",
    "fsdp": "parallelism.data_parallel_shard_degree",
    "dp": "parallelism.data_parallel_replicate_degree",
    "warmup": "lr_scheduler.warmup_steps",
    "num_warmup_steps": "lr_scheduler.warmup_steps",
    "save_steps": "checkpoint.interval",
    "save_interval": "checkpoint.interval",
    "save_total_limit": "checkpoint.keep_latest_k",
    "logging_steps": "metrics.log_freq",
    "log_interval": "metrics.log_freq",
    "eval_steps": "validation.freq",
    "output_dir": "job.dump_folder",
    "bf16": "training.mixed_precision_param",
    "precision": "training.mixed_precision_param",
    "gradient_checkpointing": "activation_checkpoint.mode",
    "tokenizer": "model.hf_assets_path",
    "model_name": "model.name",
    "max_iters": "training.steps",
    "num_epochs": "training.steps",
    "epochs": "training.steps",
    "grad_accum_steps": "training.global_batch_size",
    "gradient_accumulation": "training.global_batch_size",
    "context_length": "training.seq_len",
    "block_size": "training.seq_len",
    "gradient_clipping": "training.max_norm",
    "clip": "training.max_norm",
    "random_seed": "training.seed",
    "dp_shard": "parallelism.data_parallel_shard_degree",
    "dp_replicate": "parallelism.data_parallel_replicate_degree",
    "betas": "optimizer.beta1",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "save_freq": "checkpoint.interval",
    "batch": "training.local_batch_size",
    "path": "training.dataset_path",
    "every": "checkpoint.interval",
    "keep": "checkpoint.keep_latest_k",
    "resume_from_checkpoint": "checkpoint.initial_load_path",
    "eval_interval": "validation.freq",
    "dataset_name": "training.dataset",
    "wandb": "metrics.enable_wandb",
    "tensorboard": "metrics.enable_tensorboard",
    "fp16": "training.mixed_precision_param",
    "hidden_size": "model.args",
    "num_layers": "model.args",
    "n_layers": "model.args",
    "vocab_size": "model.args",
    "workers": "data.num_workers",
}
SECTION_ALIASES = {
    "optim": "optimizer",
    "train": "training",
    "trainer": "training",
    "scheduler": "lr_scheduler",
    "parallel": "parallelism",
    "eval": "validation",
    "val": "validation",
    "ckpt": "checkpoint",
    "ac": "activation_checkpoint",
    "activation_checkpointing": "activation_checkpoint",
    "log": "metrics",
    "logging": "metrics",
    "profile": "profiling",
    "profiler": "profiling",
    "dataset": "data",
    "dataloader": "data",
}


@dataclass(frozen=True)
class Field:
    """One leaf of the config tree."""

    key: str
    type: Any
    default: Any
    help: str


@cache
def fields() -> dict[str, Field]:
    """Return every leaf of the schema, in file order, by dotted key."""
    return {field.key: field for field in _walk(Config, "")}


@cache
def sections() -> dict[str, str]:
    """Return every section and subsection with its one-line description."""
    found: dict[str, str] = {}

    def visit(cls: type, prefix: str) -> None:
        for name, hint in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(hint):
                key = f"{prefix}{name}"
                found[key] = (hint.__doc__ or "").strip()
                visit(typing.cast(type, hint), key + ".")

    visit(Config, "")
    return found


def suggest(key: str) -> str | None:
    """Return the known key nearest to an unknown one, or None if none is near."""
    known = fields()
    section, _, rest = key.replace("-", "_").lower().partition(".")
    section = SECTION_ALIASES.get(section, section)
    key = f"{section}.{rest}" if rest else section
    if key in known:
        return key
    last = key.rsplit(".", 1)[-1]
    if last in ALIASES:
        here = f"{section}.{ALIASES[last].rsplit('.', 1)[-1]}"  # `validation.batch_size` means that section's
        return here if here in known else ALIASES[last]
    same_name = [k for k in known if k.rsplit(".", 1)[-1] == last]
    if len(same_name) == 1:
        return same_name[0]
    if last in sections():  # `training.compile`: a section, which is switched on or named elsewhere
        return next((k for k in (f"{last}.enable", f"{last}.name") if k in known), None)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if near:
        return near[0]
    in_section = {k.rsplit(".", 1)[-1]: k for k in known if k.startswith(section + ".")}
    for choice, cutoff in ((in_section, 0.6), ({k.rsplit(".", 1)[-1]: k for k in known}, 0.75)):
        with_words = [k for k in choice if set(last.split("_")) <= set(k.split("_"))]
        if len(with_words) == 1:
            return choice[with_words[0]]
        near = difflib.get_close_matches(last, choice, n=1, cutoff=cutoff)
        if near:
            return choice[near[0]]
    return None


def get(config: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def replace(config: Any, changes: dict[str, Any]) -> Any:
    """Return a copy of a config with some dotted keys replaced."""
    here: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            below.setdefault(head, {})[rest] = value
        else:
            here[head] = value
    for head, sub in below.items():
        here[head] = replace(getattr(config, head), sub)
    return dataclasses.replace(config, **here)


def _walk(cls: type, prefix: str):
    helps = _helps().get(cls.__name__, {})
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            yield from _walk(typing.cast(type, hint), key + ".")
            continue
        if field.default is not dataclasses.MISSING:
            default = field.default
        else:
            default = field.default_factory()  # pyright: ignore[reportCallIssue]
        yield Field(key, hint, default, helps.get(field.name, ""))


@cache
def _helps() -> dict[str, dict[str, str]]:
    """Read the docstring under each field; Python keeps it in the source only."""
    tree = ast.parse(inspect.getsource(schema))
    helps: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = helps.setdefault(node.name, {})
        for statement, follower in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(follower, ast.Expr)
                and isinstance(follower.value, ast.Constant)
            ):
                texts[statement.target.id] = " ".join(str(follower.value.value).split())
    return helps
