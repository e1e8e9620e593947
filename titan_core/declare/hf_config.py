"""Reading `config.json` of transformers: typed values, and no silent pass for what titan does not compute."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from titan_core.declare.rope import RopeScaling, Yarn
from titan_core.runtime.errors import UsageError

Sizes = TypeVar("Sizes")
_UNSET: Any = object()


class Config:
    """A config as read; every method raises `UsageError` with the key and the value if that is not what is needed."""

    def __init__(self, tree: Mapping[str, Any], name: str = "config.json") -> None:
        self.tree = tree
        self.name = name

    def integer(self, key: str, default: int = _UNSET) -> int:
        """Return a positive integer."""
        value = self._value(key, default)
        if type(value) is not int or value < 1:
            raise UsageError(f"`{key}` cannot be {value!r}", where=self.name, tip="a positive integer")
        return value

    def number(self, key: str, default: float = _UNSET) -> float:
        """Return a positive number."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise UsageError(f"`{key}` cannot be {value!r}", where=self.name, tip="a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise UsageError(f"`{key}` cannot be {value!r}", where=self.name, tip="true or false")
        return value

    def first(self, *keys: str) -> str:
        """Return the first of the keys that is there, or the last: releases of transformers call one thing by several
        names."""
        return next((key for key in keys if self.tree.get(key) is not None), keys[-1])

    def only(self, **values: Any) -> None:
        """Refuse any other value than these, where a key is there at all."""
        for key, accepted in values.items():
            value = self.tree.get(key)
            if value is not None and value != accepted:
                message = f"`{key}` is {value!r}, and titan computes {accepted!r} only"
                raise UsageError(message, where=self.name, tip="another family, or none, has this architecture")

    def rope(self) -> dict[str, Any]:
        """Return what the config says of the rotation: `rope_parameters` (transformers 5) or `rope_scaling` (4)."""
        found = self.tree.get("rope_parameters") or self.tree.get("rope_scaling") or {}
        if not isinstance(found, dict):
            raise UsageError(f"`rope_parameters` cannot be {found!r}", where=self.name)
        return found

    def rope_theta(self, default: float) -> float:
        """Return the base of the rotary frequencies."""
        return Config({"rope_theta": self.rope().get("rope_theta", self.tree.get("rope_theta"))}, self.name).number(
            "rope_theta", default
        )

    def rope_type(self) -> str:
        """Return the kind of stretch of the rotary frequencies; `default` is none."""
        rope = self.rope()
        return rope.get("rope_type") or rope.get("type") or "default"

    def sizes(self, cls: type[Sizes], **values: Any) -> Sizes:
        """Make a family's sizes; a combination that it refuses is an error of the config."""
        try:
            return cls(**values)
        except ValueError as error:
            raise UsageError(str(error), where=self.name) from None

    def _value(self, key: str, default: Any) -> Any:
        value = self.tree.get(key)
        if value is not None:
            return value
        if default is _UNSET:
            raise UsageError(f"`{key}` is missing", where=self.name, tip="the folder is not of this family, or damaged")
        return default


def read_llama3_scaling(config: Config) -> RopeScaling | None:
    """Return Llama 3's stretch of the rotary frequencies, None if there is none; other kinds are refused."""
    kind, rope = config.rope_type(), config.rope()
    if kind == "default":
        return None
    if kind != "llama3":
        message = f"the rotation's scaling is `{kind}`, and titan's Llama computes `llama3` or none"
        raise UsageError(message, where=config.name)
    read = Config(rope, f"{config.name}, rope_scaling")
    return read.sizes(
        RopeScaling,
        factor=read.number("factor"),
        low_freq_factor=read.number("low_freq_factor"),
        high_freq_factor=read.number("high_freq_factor"),
        original_max_seq_len=read.integer("original_max_position_embeddings"),
    )


def write_llama3_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return `rope_scaling` as transformers reads it."""
    if scaling is None:
        return None
    values = dataclasses.asdict(scaling)
    original = values.pop("original_max_seq_len")
    return {"rope_type": "llama3", **values, "original_max_position_embeddings": original}


def read_yarn(config: Config) -> Yarn | None:
    """Return YaRN's stretch of the rotary frequencies, None if there is none; other kinds are refused."""
    kind, rope = config.rope_type(), config.rope()
    if kind == "default":
        return None
    if kind != "yarn":
        raise UsageError(f"the rotation's scaling is `{kind}`, and titan computes `yarn` or none", where=config.name)
    read = Config(rope, f"{config.name}, rope_scaling")
    read.only(truncate=True)
    if rope.get("attention_factor") is not None:
        raise UsageError("`attention_factor` is set, and titan computes it from the mscales", where=read.name)
    return read.sizes(
        Yarn,
        factor=read.number("factor"),
        original_max_seq_len=read.integer("original_max_position_embeddings"),
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        **{key: read.number(key) if rope.get(key) else 0.0 for key in ("mscale", "mscale_all_dim")},
    )


def write_yarn(scaling: Yarn | None) -> dict[str, Any] | None:
    """Return `rope_scaling` as transformers reads it."""
    if scaling is None:
        return None
    values = dataclasses.asdict(scaling)
    original = values.pop("original_max_seq_len")
    return {"rope_type": "yarn", "type": "yarn", **values, "original_max_position_embeddings": original}
