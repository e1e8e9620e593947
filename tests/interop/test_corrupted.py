"""Inputs that are broken or hostile: each has its message, and nothing of an output is left behind."""

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.interop.samples import edit_json, llama, save
from titan_core.jobs import convert
from titan_core.runtime.errors import TitanError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "llama"
    save("llama3", folder)
    return folder


def first(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put(path: Path, tree: dict | str, body: bytes) -> None:
    text = (tree if isinstance(tree, str) else json.dumps(tree)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def edit(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Return what changes the header of the first file."""

    def work(folder: Path) -> None:
        tree, body = header(first(folder))
        change(tree)
        put(first(folder), tree, body)

    return work


def a_name(tree: dict) -> str:
    return next(name for name in tree if name != "__metadata__")


def truncate(folder: Path) -> None:
    data = first(folder).read_bytes()
    first(folder).write_bytes(data[: len(data) // 2])


def lying_length(folder: Path) -> None:
    data = first(folder).read_bytes()
    first(folder).write_bytes(struct.pack("<Q", 1 << 60) + data[8:])


def huge_offset(tree: dict) -> None:
    tree[a_name(tree)]["data_offsets"][1] += 8


def wrong_shape(tree: dict) -> None:
    tree[a_name(tree)]["shape"][0] += 1


def negative(tree: dict) -> None:
    tree[a_name(tree)]["data_offsets"] = [-4, 0]


def overlapping(tree: dict) -> None:
    names = [name for name in tree if name != "__metadata__"]
    tree[names[0]], tree[names[1]] = dict(tree[names[1]]), dict(tree[names[1]])


def unknown_dtype(tree: dict) -> None:
    tree[a_name(tree)]["dtype"] = "F3"


def no_offsets(tree: dict) -> None:
    del tree[a_name(tree)]["data_offsets"]


def renamed(tree: dict) -> None:
    tree["surprise"] = tree.pop(a_name(tree))


def duplicate_key(folder: Path) -> None:
    tree, body = header(first(folder))
    name = a_name(tree)
    text = json.dumps(tree)[:-1] + f', "{name}": {json.dumps(tree[name])}}}'
    put(first(folder), text, body)


def not_json(folder: Path) -> None:
    put(first(folder), "{not json", header(first(folder))[1])


def deep_json(folder: Path) -> None:
    put(first(folder), "[" * 100_000, b"")


def trailing_bytes(folder: Path) -> None:
    with first(folder).open("ab") as file:
        file.write(b"12345678")


def missing_file(folder: Path) -> None:
    first(folder).unlink()


def escape(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    text = index.read_text().replace(first(folder).name, "../../secret.safetensors")
    index.write_text(text)


def absolute(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(first(folder).name, "/etc/passwd"))


def symlink_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    first(folder).rename(outside)
    (
        folder / sorted(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())[0]
    ).symlink_to(outside)


def in_two_files(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-copy.safetensors").write_bytes(first(folder).read_bytes())


def index_of_others(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    tree = json.loads(path.read_text())
    tree["weight_map"]["model.extra"] = first(folder).name
    path.write_text(json.dumps(tree))


def unindexed(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    tree = json.loads(path.read_text())
    name = next(n for n, file in tree["weight_map"].items() if file == first(folder).name)
    del tree["weight_map"][name]
    path.write_text(json.dumps(tree))


def index_without_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1, 2]}')


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def twisted_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2")


def asset_link(folder: Path) -> None:
    (folder / "tokenizer.json").symlink_to("/etc/passwd")


def lost_tensor(folder: Path) -> None:
    from tests.interop.samples import hf_tensors

    tensors = hf_tensors(folder)
    for path in folder.glob("model*"):
        path.unlink()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(36)
    tensors["lm_head.weight"] = torch.zeros(67, 30)
    save_file(tensors, folder / "model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "it is truncated"),
    "header longer than the file": (lying_length, r"the header claims 1152921504606846976 bytes"),
    "offsets that lie": (edit(huge_offset), "but the header gives it"),
    "shape that lies": (edit(wrong_shape), "which takes .* bytes, but the header gives it"),
    "negative offsets": (edit(negative), "is malformed"),
    "overlapping tensors": (
        edit(overlapping),
        "overlaps another tensor|unused before it|belong to nothing|which takes",
    ),
    "unknown dtype": (edit(unknown_dtype), "has the unknown dtype `F3`"),
    "no offsets": (edit(no_offsets), "is malformed"),
    "another name than in the index": (edit(renamed), "that the index does not place there: surprise"),
    "duplicate key": (duplicate_key, "is there twice"),
    "no JSON": (not_json, "not valid JSON"),
    "JSON nested too deep": (deep_json, "not valid JSON"),
    "bytes after the end": (trailing_bytes, "8 bytes after the last tensor belong to nothing"),
    "a file is missing": (missing_file, "is missing"),
    "index leads out of the folder": (escape, "is no file of the folder"),
    "index with an absolute path": (absolute, "is no file of the folder"),
    "link out of the folder": (symlink_out, "is a link that leads out of the folder"),
    "one tensor in two files": (in_two_files, "is in two files"),
    "index of other weights": (index_of_others, "tensors that are not in their files: model.extra"),
    "tensor that the index lacks": (unindexed, "that the index does not place there"),
    "index without a map": (index_without_map, "has no `weight_map`"),
    "no config": (no_config, "the family of these weights is not known"),
    "config that is no JSON": (twisted_config, "not valid JSON"),
    "config of another architecture": (
        config(attention_bias=True),
        "`attention_bias` is True, and titan computes False",
    ),
    "config of another activation": (config(hidden_act="gelu"), "`hidden_act` is 'gelu'"),
    "config with a word for a number": (config(hidden_size="big"), "`hidden_size` cannot be 'big'"),
    "unknown rotation": (config(rope_parameters={"rope_type": "yarn"}), "scaling is `yarn`"),
    "unknown family": (config(model_type="mamba"), "model_type 'mamba'"),
    "quantized elsewhere": (config(quantization_config={"quant_method": "awq"}), "quantized by `awq`"),
    "missing, unknown and misshapen": (
        lost_tensor,
        r"1 tensors are missing: model.norm.weight. 1 tensors are unknown: .*q_proj.bias. 1 tensors have "
        r"another shape: lm_head.weight is \[67, 30\], wanted \[67, 36\]",
    ),
    "tokenizer that is a link": (asset_link, "leads out of the folder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder_is_named_and_leaves_nothing(name: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "llama"
    folder.mkdir(parents=True)
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil, message = BROKEN[name]
    spoil(folder)
    with pytest.raises(TitanError, match=message) as raised:
        convert.run("hf-to-dcp", str(folder), str(tmp_path / "out"))
    assert raised.value.where is None or str(folder) in raised.value.where or "config.json" in raised.value.where
    assert not (tmp_path / "out").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


# ---------------------------------------------------------------------------------------------- pickles


class Shell:
    def __reduce__(self) -> object:
        return os.system, ("touch /tmp/titan-was-here",)


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None], compression: int = zipfile.ZIP_STORED) -> None:
    """Unpack a torch.save file, change its entries, and pack it."""
    with zipfile.ZipFile(path) as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    change(entries)
    with zipfile.ZipFile(path, "w", compression) as file:
        for key, content in entries.items():
            file.writestr(key, content)


def with_shell(path: Path) -> None:
    def change(entries: dict[str, bytes]) -> None:
        entries[next(n for n in entries if n.endswith("data.pkl"))] = pickle.dumps({"a": Shell()}, 2)

    rewrite(path, change)


def short_storage(path: Path) -> None:
    def change(entries: dict[str, bytes]) -> None:
        name = next(n for n in entries if n.endswith("data/0"))
        entries[name] = entries[name][:-4]

    rewrite(path, change)


def no_storage(path: Path) -> None:
    rewrite(path, lambda entries: entries.pop(next(n for n in entries if n.endswith("data/0"))) and None)


def compressed(path: Path) -> None:
    rewrite(path, lambda entries: None, zipfile.ZIP_DEFLATED)


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("hello", b"x")


def cut_zip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def legacy(path: Path) -> None:
    torch.save({"tok_embeddings.weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)


def damaged_pickle(path: Path) -> None:
    def change(entries: dict[str, bytes]) -> None:
        name = next(n for n in entries if n.endswith("data.pkl"))
        entries[name] = entries[name][: len(entries[name]) // 2]

    rewrite(path, change)


def transposed(path: Path) -> None:
    torch.save({"tok_embeddings.weight": torch.zeros(3, 2).T}, path)


def beyond(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(4)[:2]}, buffer)
    path.write_bytes(buffer.getvalue())

    def change(entries: dict[str, bytes]) -> None:
        name = next(n for n in entries if n.endswith("data.pkl"))
        entries[name] = entries[name].replace(b"K\x02\x85", b"K\x09\x85", 1)  # a shape of 9 in a storage of 4

    rewrite(path, change)


def a_list(path: Path) -> None:
    torch.save([torch.zeros(2)], path)


PICKLES: dict[str, tuple[Callable[[Path], None], str]] = {
    "runs a command": (with_shell, r"wants to run `posix.system`"),
    "storage is short": (short_storage, "the file has .* bytes for it"),
    "storage is missing": (no_storage, "are not in the file"),
    "compressed": (compressed, "is compressed or encrypted"),
    "some other zip": (other_zip, "not one that torch.save wrote"),
    "truncated": (cut_zip, "damaged or no zip file"),
    "old format": (legacy, "an old torch.save file"),
    "damaged pickle": (damaged_pickle, "the pickle is damaged"),
    "not row by row": (transposed, "does not lie row by row"),
    "reaches beyond": (beyond, "reaches beyond its storage"),
    "no dict": (a_list, "the file holds a list"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_broken_pickle_is_named_and_runs_nothing(name: str, saved: Path, tmp_path: Path) -> None:
    convert.run("hf-to-dcp", str(saved), str(tmp_path / "dcp"))
    convert.run("dcp-to-meta", str(tmp_path / "dcp"), str(tmp_path / "meta"))
    spoil, message = PICKLES[name]
    marker = Path("/tmp/titan-was-here")
    marker.unlink(missing_ok=True)
    spoil(tmp_path / "meta/consolidated.00.pth")
    with pytest.raises(TitanError, match=message) as raised:
        convert.run("meta-to-dcp", str(tmp_path / "meta"), str(tmp_path / "out"))
    assert "consolidated.00.pth" in (raised.value.where or "")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_parts(tmp_path: Path) -> Path:
    llama(vocab_size=68).save_pretrained(tmp_path / "hf")
    convert.run("hf-to-dcp", str(tmp_path / "hf"), str(tmp_path / "dcp"))
    convert.run("dcp-to-meta", str(tmp_path / "dcp"), str(tmp_path / "meta"), convert.Options(parts=2))
    return tmp_path / "meta"


def test_part_that_is_missing(two_parts: Path, tmp_path: Path) -> None:
    (two_parts / "consolidated.00.pth").unlink()
    with pytest.raises(TitanError, match=r"missing: consolidated.00.pth"):
        convert.run("meta-to-dcp", str(two_parts), str(tmp_path / "out"))


def test_norms_of_two_parts_that_differ(two_parts: Path, tmp_path: Path) -> None:
    path = two_parts / "consolidated.01.pth"
    tree = torch.load(path, weights_only=True)
    torch.save({**tree, "norm.weight": tree["norm.weight"] + 1}, path)
    with pytest.raises(TitanError, match=r"`01/norm.weight` should hold the same numbers as `00/norm.weight`"):
        convert.run("meta-to-dcp", str(two_parts), str(tmp_path / "out"))


def test_parts_that_do_not_divide(saved: Path, tmp_path: Path) -> None:
    convert.run("hf-to-dcp", str(saved), str(tmp_path / "dcp"))
    with pytest.raises(TitanError, match=r"`tok_embeddings.weight` has 67 rows, which do not divide into 2 parts"):
        convert.run("dcp-to-meta", str(tmp_path / "dcp"), str(tmp_path / "meta"), convert.Options(parts=2))


def test_damaged_step_is_named_when_it_is_read(saved: Path, tmp_path: Path) -> None:
    from tests.checkpoint.saved import flip

    convert.run("hf-to-dcp", str(saved), str(tmp_path / "dcp"))
    flip(next((tmp_path / "dcp/step-0").glob("*.distcp")))
    with pytest.raises(TitanError, match="do not have the manifest's hash"):
        convert.run("dcp-to-hf", str(tmp_path / "dcp"), str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dcp"]
