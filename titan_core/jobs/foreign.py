"""Any folder of weights, opened: which format, which family, which sizes, and its tensors under titan's names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from titan_core.checkpoint import find_step, read_shared
from titan_core.checkpoint.inspect import read_file
from titan_core.checkpoint.manifest import read_manifest
from titan_core.checkpoint.places import split
from titan_core.checkpoint.streaming import StepSource
from titan_core.config import schema
from titan_core.config.load import to_dict
from titan_core.data.tokenizer import load_tokenizer
from titan_core.declare.family import Family
from titan_core.declare.weights import Composite, MetaLayout, SingleFile, Weights
from titan_core.interop.boxes import Source
from titan_core.interop.files import inside
from titan_core.interop.mapping import Mapping as WeightMap
from titan_core.interop.mapping import work_out
from titan_core.interop.pth import MetaSource, PthSource
from titan_core.interop.safetensors import SafetensorsSource, parse_json
from titan_core.interop.views import SCALE, Dequantised, InsideView, OurView, unequal_copies
from titan_core.models import FAMILIES, family, resolve, sizes_from_dict
from titan_core.runtime.errors import CheckpointError, DataError, UsageError

Format = Literal["dcp", "hf", "meta", "torch", "bfl"]
SAYS = {
    "dcp": "a titan checkpoint",
    "hf": "a Hugging Face folder",
    "meta": "a Meta folder",
    "torch": "a torch.save file",
    "bfl": "a single safetensors file",
}
# Small files that belong to a model and are passed on as they are.
ASSETS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "params.json",
)
_MOST_ASSET = 200_000_000
_ASSET_FOLDER = "assets"  # in a step


@dataclass
class Opened:
    """Weights in some format. `raw` has the names of the format, `ours` titan's; `family` and `sizes` may be unknown
    for Hugging Face folders, of which only `raw` can then be used."""

    format: Format
    path: str
    raw: Source
    assets: dict[str, bytes] = field(default_factory=dict)
    family: Family | None = None
    sizes: Any = None
    shared: dict[str, Any] | None = None
    mapping: WeightMap | None = None
    scaled: frozenset[str] = frozenset()
    """Names whose numbers were stored as float8 with block scales; `raw` reads them as plain numbers."""
    left_out: int = 0
    """Number of tensors that belong to other parts of a larger model."""

    @property
    def ours(self) -> Source:
        """The tensors under titan's names. Raises `UsageError` where the family is not known."""
        self.known_family()
        return self.raw if self.mapping is None else OurView(self.raw, self.mapping)

    def known_family(self) -> Family:
        """Return the family. Raises `UsageError` where it is not known."""
        if self.family is None:
            raise UsageError(f"the family of these weights is not known: {self._model_type()}", where=self.path)
        return self.family

    def config_json(self) -> dict[str, Any]:
        """Return its `config.json`, empty if it has none."""
        data = self.assets.get("config.json")
        return {} if data is None else parse_json(data, Path(self.path) / "config.json")

    def _model_type(self) -> str:
        if self.format == "bfl":
            return "its tensors are those of no family with a form in a single file"
        found = _said_type(self.config_json())
        return (
            f"config.json says model_type {found!r}; titan has {', '.join(FAMILIES)}, and --family and --flavor set it"
        )


def kind_of(path: str) -> Format:
    """Return the format of a folder or file. Raises `CheckpointError` that says what was looked for."""
    place = Path(path)
    if place.is_file():
        return "bfl" if place.suffix == ".safetensors" else "torch"
    if place.is_dir():
        if any(place.glob("*.safetensors")) or any(place.glob("*.safetensors.index.json")):
            return "hf"
        if any(place.glob("consolidated.*.pth")):
            return "meta"
        if (place / "model_index.json").exists():
            parts = [sub.name for sub in sorted(place.iterdir()) if any(sub.glob("*.safetensors*"))]
            message = f"the folder is a pipeline of diffusers, whose parts are in {', '.join(parts) or 'no folder'}"
            raise CheckpointError(message, where=path, tip="name the folder of a part, e.g. its `transformer`")
        if any(place.glob("pytorch_model*.bin")):
            message = "the folder holds `pytorch_model*.bin`, pickles that titan does not read"
            tip = "convert them to safetensors with transformers: `save_pretrained(..., safe_serialization=True)`"
            raise CheckpointError(message, where=path, tip=tip)
    try:
        find_step(path)
    except CheckpointError as error:
        if error.message.endswith("holds no complete checkpoint"):
            message = f"{error.message}, no *.safetensors and no consolidated.*.pth"
            tip = "give a Hugging Face folder, a Meta folder, a run folder or one of its step-N folders"
            raise CheckpointError(message, where=error.where, tip=tip) from None
        raise
    return "dcp"


def open_weights(path: str, *, family_name: str | None = None, flavor: str | None = None, check: bool = True) -> Opened:
    """Open weights of any format; nothing but headers and small files is read.

    `family_name` and `flavor` replace what the folder says of itself. Every tensor is accounted for, with its shape.
    """
    if flavor is not None and family_name is None:
        raise UsageError("`--flavor` needs `--family`")
    kind = kind_of(path)
    openers = {"hf": open_hf, "meta": _open_meta, "torch": _open_torch, "bfl": _open_bfl}
    opened = _open_step(path, check) if kind == "dcp" else openers[kind](path)
    _identify(opened, family_name, flavor)
    if opened.family is not None:
        _map(opened, opened.family)
    return opened


def check_copies(opened: Opened) -> None:
    """Raise `CheckpointError` if a tensor that should repeat another one does not (tied heads, norms of every part)."""
    if opened.mapping is None:
        return
    odd = unequal_copies(opened.raw, opened.mapping)
    if odd:
        first = opened.mapping.copies[odd[0]]
        message = f"`{odd[0]}` should hold the same numbers as `{first}`, and does not"
        raise CheckpointError(message, where=opened.path, tip="is the model tied? --family and --flavor can say else")


def shared_of(opened: Opened) -> dict[str, Any]:
    """Return what a step says of its model, for weights that come from elsewhere."""
    if opened.shared is not None:
        return opened.shared
    assert opened.family is not None
    sizes = dataclasses.asdict(opened.sizes)
    flavor = next((name for name, value in opened.family.flavors.items() if value == opened.sizes), "")
    model = dataclasses.replace(schema.Model(), name=opened.family.name, flavor=flavor)
    config = dataclasses.replace(schema.Config(), model=model)
    return {
        "step": 0,
        "tokens": 0,
        "model": {"family": opened.family.name, "flavor": flavor, "sizes": sizes},
        "config": to_dict(config),
        "origin": {"format": opened.format, "path": str(opened.path)},
    }


def step_files(opened: Opened) -> dict[str, bytes]:
    """Return the files of a step made of these weights: shared state, tokenizer, what came with them."""
    texts = {"shared.json": json.dumps(shared_of(opened)).encode()}
    texts.update({f"{_ASSET_FOLDER}/{name}": content for name, content in opened.assets.items()})
    if opened.format in ("hf", "meta"):
        try:
            tokenizer = load_tokenizer(opened.path)
        except DataError:
            return texts  # it has none, or one that titan cannot use: what lies beside the weights is passed on
        texts.update({f"tokenizer/{name}": content for name, content in tokenizer.files().items()})
    return texts


# ---------------------------------------------------------------------------------------------- by format


def _open_step(path: str, check: bool = True) -> Opened:
    step_path = find_step(path)
    shared = read_shared(step_path, check=check)
    names = read_manifest(*split(step_path)).files
    assets = {}
    for name in names:
        folder, _, short = name.partition("/")
        if folder == _ASSET_FOLDER and short in ASSETS:
            assets[short] = read_file(step_path, name) or b""
    for name in names:  # the tokenizer of a run that titan trained
        folder, _, short = name.partition("/")
        if folder == "tokenizer" and not {"tokenizer.json", "tokenizer.model"} & set(assets):
            assets.update({n.partition("/")[2]: read_file(step_path, n) or b"" for n in names if n.startswith(folder)})
    return Opened("dcp", step_path, StepSource(step_path, check=check), assets, shared=shared)


def open_hf(path: str) -> Opened:
    """Open all tensors of a Hugging Face folder, without asking which model they are."""
    raw: Source = SafetensorsSource(path)
    opened = Opened("hf", path, raw, _read_assets(Path(path)))
    quantization = opened.config_json().get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method not in (None, "fp8"):
        message = f"the weights are quantized by `{method}`; titan reads plain numbers and block-scaled fp8"
        raise UsageError(message, where=f"{path}/config.json", tip="use the weights that were quantized")
    if any(name.endswith(SCALE) for name in raw.index):
        block = (quantization or {}).get("weight_block_size") or [128, 128]
        if len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise UsageError(f"`weight_block_size` cannot be {block!r}", where=f"{path}/config.json")
        view = Dequantised(raw, _plain_dtype(opened.config_json()), (block[0], block[1]))
        opened.raw, opened.scaled = view, frozenset(view.scales)
    return opened


def _open_meta(path: str) -> Opened:
    return Opened("meta", path, MetaSource(path), _read_assets(Path(path)))


def _open_torch(path: str) -> Opened:
    return Opened("torch", path, PthSource(path))


def _open_bfl(path: str) -> Opened:
    return Opened("bfl", path, SafetensorsSource(path))


def _plain_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that a config says its weights have when they are not quantized."""
    name = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    return {"float32": torch.float32, "float16": torch.float16}.get(str(name), torch.bfloat16)


def _read_assets(folder: Path) -> dict[str, bytes]:
    found = {}
    for name in ASSETS:
        if (folder / name).is_symlink() or (folder / name).exists():
            path = inside(folder, name)
            if path.stat().st_size > _MOST_ASSET:
                raise CheckpointError(f"`{name}` has {path.stat().st_size} bytes", where=str(folder))
            found[name] = path.read_bytes()
    return found


# ---------------------------------------------------------------------------------------------- which model


def _identify(opened: Opened, family_name: str | None, flavor: str | None) -> None:
    """Note family and sizes: as told, else as the folder says."""
    if family_name is not None:
        opened.family = family(family_name)
        if flavor is not None:
            opened.family, opened.sizes = resolve(schema.Model(name=family_name, flavor=flavor))
            return
    if opened.format == "dcp":
        assert opened.shared is not None
        try:
            model = opened.shared["model"]
            opened.family = opened.family or family(model["family"])
            opened.sizes = sizes_from_dict(opened.family, model["sizes"])
        except (KeyError, ValueError) as error:
            message = f"the checkpoint does not say which model it is: {error}"
            raise CheckpointError(message, where=opened.path) from error
    elif opened.format == "hf":
        _identify_hf(opened)
    elif opened.format == "meta":
        _identify_meta(opened)
    elif opened.format == "bfl":
        _identify_bfl(opened)
    elif opened.family is not None:
        raise UsageError("a torch.save file does not say its sizes", tip="--flavor names them")


def _identify_hf(opened: Opened) -> None:
    config = opened.config_json()
    if opened.family is None:
        opened.family = next((chosen for name in FAMILIES if _means(config, chosen := family(name))), None)
    if opened.family is None:
        return
    if not config:
        raise UsageError("the folder has no config.json", where=opened.path, tip="--family and --flavor say what it is")
    weights = weights_of(opened.family)
    if weights.composite is not None and _said_type(config) in weights.composite.model_types:
        config = _look_inside(opened, config, weights.composite)
    opened.sizes = weights.held(weights.read_config(config), opened.raw.index)


def _means(config: Mapping[str, Any], chosen: Family) -> bool:
    """Does a config say that its model is of a family, or has one inside?"""
    weights = chosen.weights
    if weights is None:
        return False
    around = weights.composite.model_types if weights.composite else ()
    return _said_type(config) in (*weights.model_types, *around)


def _look_inside(opened: Opened, config: Mapping[str, Any], composite: Composite) -> dict[str, Any]:
    """Let a larger model look like the part of it that titan computes, and return the part's config."""
    inside = config.get(composite.config)
    if not isinstance(inside, dict):
        raise UsageError(f"config.json has no `{composite.config}`", where=opened.path)
    if "dtype" in config or "torch_dtype" in config:
        inside = {"dtype": config.get("dtype", config.get("torch_dtype")), **inside}
    view = InsideView(opened.raw, composite.prefix, composite.others)
    opened.scaled = frozenset(short for short, name in view.names.items() if name in opened.scaled)
    opened.raw, opened.left_out = view, len(opened.raw.index) - len(view.index)
    opened.assets["config.json"] = json.dumps(inside, indent=2).encode() + b"\n"
    return inside


def _said_type(config: Mapping[str, Any]) -> Any:
    """Return how a config names its model: transformers by a type, diffusers by a class."""
    return config.get("model_type", config.get("_class_name"))


def _identify_bfl(opened: Opened) -> None:
    """Find the family whose tensors these are, by names and shapes."""
    shapes = {name: shape for name, (shape, _) in opened.raw.index.items()}
    for name in [opened.family.name] if opened.family is not None else FAMILIES:
        single = weights_of(family(name)).single
        if single is None:
            continue
        try:
            sizes = single.read_shapes(shapes)
        except ValueError as error:
            raise UsageError(f"{name} cannot have such tensors: {error}", where=opened.path) from None
        if sizes is not None:
            opened.family, opened.sizes = family(name), sizes
            return
    if opened.family is not None:
        raise UsageError(f"the file does not hold the tensors of {opened.family.name}", where=opened.path)


def _identify_meta(opened: Opened) -> None:
    if "params.json" not in opened.assets:
        raise UsageError("the folder has no params.json", where=opened.path, tip="--family and --flavor say what it is")
    params = parse_json(opened.assets["params.json"], Path(opened.path) / "params.json")
    opened.family = opened.family or family("llama3")
    meta = weights_of(opened.family).meta
    if meta is None:
        raise UsageError(f"titan knows no Meta form of {opened.family.name}", where=opened.path)
    if params.get("vocab_size", -1) == -1:  # Llama 2 left it to the tokenizer
        rows = opened.raw.index.get("00/output.weight", ((1,), None))[0][0]
        params = {**params, "vocab_size": rows * opened.raw.parts}  # pyright: ignore[reportAttributeAccessIssue]
    opened.sizes = meta.read_params(params)


def weights_of(chosen: Family) -> Weights:
    """Return a family's map. Raises `UsageError` if it has none."""
    if chosen.weights is None:
        raise UsageError(f"{chosen.name} has no map to foreign weights yet")
    return chosen.weights


def single_of(chosen: Family) -> SingleFile:
    """Return a family's map to a single file. Raises `UsageError` if it has none."""
    single = weights_of(chosen).single
    if single is None:
        raise UsageError(f"titan knows no form of {chosen.name} in a single file")
    return single


def _map(opened: Opened, chosen: Family) -> None:
    """Work out the map of the format and hold the tensors against it."""
    parameters = chosen.parameters(opened.sizes)
    if opened.format in ("dcp", "torch"):
        work_out(weights_of(chosen).rules(opened.sizes), parameters).check_ours(opened.raw.index, opened.path)
        return
    if opened.format == "hf":
        opened.mapping = work_out(weights_of(chosen).rules(opened.sizes), parameters)
    elif opened.format == "bfl":
        opened.mapping = work_out(single_of(chosen).rules(opened.sizes), parameters)
    else:
        meta = weights_of(chosen).meta
        assert meta is not None
        opened.mapping = work_out(meta.rules(opened.sizes, _layout(opened)), parameters)
    opened.mapping.check_theirs(opened.raw.index, opened.path)


def _layout(opened: Opened) -> MetaLayout:
    """Read off a Meta folder's headers how it was cut."""
    assert isinstance(opened.raw, MetaSource)
    index = opened.raw.index
    fused = any(name.endswith("attention.wqkv.weight") for name in index)
    embedding = index.get("00/tok_embeddings.weight", ((0, 0), None))[0]
    width = opened.sizes.dim
    return MetaLayout(opened.raw.parts, fused, 1 if opened.raw.parts > 1 and embedding[1] != width else 0)
