"""What lies beside exported weights: config, generation config, tokenizer, model card; or Meta's params."""

from __future__ import annotations

import json
from typing import Any

import torch

from titan_core.data.tokenizer import tokenizer_from_files
from titan_core.interop.boxes import Index
from titan_core.jobs.foreign import Opened, weights_of
from titan_core.runtime.errors import UsageError

_NOT_EXPORTED = ("params.json",)
_CARD = """---
library_name: {library}
tags:
- titan
---

# {name}

{sentence}

Written by titan. Describe here what the model is for, what it was trained on, and under which licence it may be used.
"""


def hf_files(opened: Opened, index: Index, dtype: str | None) -> dict[str, bytes]:
    """Return the files of a Hugging Face folder; what came with the weights is kept as it was where it still holds."""
    files = {name: content for name, content in opened.assets.items() if name not in _NOT_EXPORTED}
    config = _config(opened, index)
    if config:
        plain = _library(opened) == "diffusers"  # whose configs say nothing of dtypes and tokens
        changed = config if plain else _with_dtype(config, index, dtype)
        stored = opened.assets.get("config.json")
        same = stored is not None and json.loads(stored) == changed
        files["config.json"] = stored if same and stored else json.dumps(changed, indent=2).encode() + b"\n"
        if not plain:
            files.setdefault("generation_config.json", _generation_config(changed))
    files.setdefault("README.md", _card(opened).encode())
    return files


def meta_files(opened: Opened) -> dict[str, bytes]:
    """Return the files of a Meta folder."""
    assert opened.family is not None
    meta = weights_of(opened.family).meta
    assert meta is not None
    kept = {name: content for name, content in opened.assets.items() if name.startswith("tokenizer")}
    stored = opened.assets.get("params.json")
    if stored is not None and meta.read_params(json.loads(stored)) == opened.sizes:
        return {**kept, "params.json": stored}
    params = meta.write_params(opened.sizes)
    if meta.read_params(params) != opened.sizes:
        different = "its tied head, its scaling of the rotation or its length"
        if not _says_enough(meta.read_params(params), opened.sizes):
            raise UsageError(f"params.json cannot say these sizes of {opened.family.name} ({different})")
    return {**kept, "params.json": json.dumps(params, indent=2).encode() + b"\n"}


def _says_enough(read: Any, sizes: Any) -> bool:
    """Are two sizes the same but for what `params.json` has no word for and no weight depends on?"""
    fields = ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "norm_eps", "rope_theta", "tied")
    return all(getattr(read, name) == getattr(sizes, name) for name in fields)


def _config(opened: Opened, index: Index) -> dict[str, Any]:
    """Return the `config.json`: the one that came with the weights if it says the same sizes, else one of our own."""
    stored = opened.config_json()
    if opened.family is None:
        return stored
    weights = weights_of(opened.family)
    if stored:
        try:
            if weights.held(weights.read_config(stored), index) == opened.sizes:
                return stored
        except UsageError:
            pass  # it is of another model than the weights
    written = weights.write_config(opened.sizes)
    return written if weights.library == "diffusers" else {**written, **_token_ids(opened)}


def _library(opened: Opened) -> str:
    """Return which library reads such folders."""
    return "transformers" if opened.family is None else weights_of(opened.family).library


def _token_ids(opened: Opened) -> dict[str, int | None]:
    """Return the begin and end tokens of the tokenizer that lies beside the weights."""
    names = ("tokenizer.json", "tokenizer_config.json")
    if not all(name in opened.assets for name in names):
        return {"bos_token_id": None, "eos_token_id": None}
    try:
        tokenizer = tokenizer_from_files({name: opened.assets[name] for name in names})
    except (KeyError, ValueError):  # a tokenizer that came from elsewhere need not name them
        return {"bos_token_id": None, "eos_token_id": None}
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _with_dtype(config: dict[str, Any], index: Index, dtype: str | None) -> dict[str, Any]:
    """Return a config that says how these weights are stored."""
    changed = dict(config)
    floats = [kind for _, kind in index.values() if kind.is_floating_point and kind.itemsize > 1]
    if dtype == "fp8-block":
        changed["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
        floats = [kind for kind in floats if kind != torch.float32] or floats  # the scales are fp32
    else:
        changed.pop("quantization_config", None)
    if not floats:
        return changed
    name = str(max(floats, key=floats.count)).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in changed] or ["torch_dtype"]
    return {**changed, **dict.fromkeys(keys, name)}


def _generation_config(config: dict[str, Any]) -> bytes:
    kept = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    return json.dumps({"_from_model_config": True, **kept}, indent=2).encode() + b"\n"


def _card(opened: Opened) -> str:
    if opened.family is None:
        return _CARD.format(library="transformers", name="Weights", sentence="Re-sharded weights.")
    count = sum(p.numel for p in opened.family.parameters(opened.sizes) if p.tied_to is None)
    sentence = f"A {opened.family.name} of {count:,} parameters"
    if opened.shared is not None and opened.shared.get("step"):
        sentence += f", trained for {opened.shared['step']:,} steps on {opened.shared['tokens']:,} tokens"
    name = f"{opened.family.name}, {count:,} parameters"
    return _CARD.format(library=_library(opened), name=name, sentence=sentence + ".")
