"""The largest models, as files with holes: true names and shapes, planned from headers in seconds and little memory."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from titan_core.interop.mapping import work_out
from titan_core.interop.safetensors import NAMES, SafetensorsSource
from titan_core.interop.sizes import parse_size
from titan_core.interop.views import Dequantised, OurView
from titan_core.models import family
from titan_core.runtime.errors import UsageError

Entry = tuple[tuple[int, ...], torch.dtype]


def write_with_holes(folder: Path, tensors: dict[str, Entry], shard: int) -> None:
    """Write safetensors files that have headers and no data: the file system stores nothing for it."""
    groups: list[dict[str, Entry]] = [{}]
    size = 0
    for name, (shape, dtype) in tensors.items():
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if size + num_bytes > shard and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = shape, dtype
        size += num_bytes
    placed = {}
    for number, group in enumerate(groups, 1):
        file, at, header = f"model-{number:05d}-of-{len(groups):05d}.safetensors", 0, {}
        for name, (shape, dtype) in group.items():
            end = at + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at, placed[name] = end, file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def plan(*words: str) -> dict:
    """Plan in a process of its own, so that its memory is its own."""
    command = [sys.executable, "-m", "titan_cli", "convert", *words, "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return json.loads(done.stdout)


def test_llama_405b_is_planned_from_headers(tmp_path: Path) -> None:
    llama = family("llama3")
    sizes = llama.flavors["405B"]
    assert llama.weights is not None
    shapes = work_out(llama.weights.rules(sizes), llama.parameters(sizes)).their_shapes
    write_with_holes(tmp_path, {name: (shape, torch.bfloat16) for name, shape in shapes.items()}, 5_000_000_000)
    (tmp_path / "config.json").write_text(json.dumps(llama.weights.write_config(sizes)))
    found = plan("hf-to-dcp", str(tmp_path), str(tmp_path / "out"))
    assert found["bytes"] == 2 * 405_853_388_800
    assert found["peak_rss"] < 1.2e9


@pytest.mark.slow
def test_deepseek_671b_with_block_scales_is_planned_from_headers(tmp_path: Path) -> None:
    deepseek = family("deepseek_v3")
    assert deepseek.weights is not None
    sizes = deepseek.flavors["671B"]
    mapping = work_out(deepseek.weights.rules(sizes), deepseek.parameters(sizes))
    further = 11_610_068_224  # the layer that predicts a second token; files repeat embedding and head for it
    ours = sum(torch.Size(shape).numel() for shape in mapping.our_shapes.values())
    assert ours - further == pytest.approx(671.026e9, rel=1e-4)
    stored: dict[str, Entry] = {}
    copies = {name: mapping.their_shapes[first] for name, first in mapping.copies.items()}
    assert len(copies) == 2
    for name, shape in {**mapping.their_shapes, **copies}.items():
        scaled = "_proj" in name and "eh_proj" not in name
        stored[name] = shape, torch.float8_e4m3fn if scaled else torch.bfloat16
        if scaled:
            stored[f"{name}_scale_inv"] = tuple(-(-n // 128) for n in shape), torch.float32
    write_with_holes(tmp_path, stored, 4_300_000_000)
    assert len(stored) > 90_000
    found = plan("hf-to-hf", str(tmp_path), str(tmp_path / "out"))
    assert found["tensors"] == len(mapping.their_shapes) + len(copies)
    assert found["bytes"] == 2 * (ours + 2 * 129280 * 7168)
    assert found["peak_rss"] < 1.5e9

    view = OurView(Dequantised(SafetensorsSource(tmp_path)), mapping)
    mapping.check_theirs(view.source.index, str(tmp_path))
    assert view.read("layers.60.moe.experts.w1.weight", (250, 0, 0), (3, 200, 128)).eq(0).all()  # holes read as zeros


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1GiB", 1 << 30), ("1.5 MB", 1_500_000), ("77", 77)])
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5 parsecs", "GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="`--memory` cannot be"):
        parse_size(text, "--memory")
