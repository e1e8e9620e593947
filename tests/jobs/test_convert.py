"""Conversions: Meta's parts, dtypes, block scales, kills and resumes, verification, and the words of the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import titan_core
from tests.interop.samples import assert_same, hf_tensors, llama, save, step_tensors
from titan_core.interop import stream
from titan_core.interop.safetensors_writer import SafetensorsSink
from titan_core.jobs import convert
from titan_core.jobs.convert import Options
from titan_core.runtime.errors import CheckpointError, TitanError, UsageError
from titan_core.runtime.events import Progress


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "llama"
    save("llama3", folder)
    return folder


@pytest.fixture(scope="module")
def dcp(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp") / "llama"
    convert.run("hf-to-dcp", str(saved), str(folder))
    return folder


# ---------------------------------------------------------------------------------------------- Meta


def meta_parts(
    tensors: dict[str, torch.Tensor], parts: int, fused: bool, embedding_dim: int
) -> list[dict[str, torch.Tensor]]:
    """Cut titan's tensors as fairscale did: an independent spelling of Meta's format."""
    columns = ("attention.wo.weight", "feed_forward.w2.weight")
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(parts)]
    for name, tensor in tensors.items():
        dim = 1 if name.endswith(columns) else embedding_dim if name == "tok_embeddings.weight" else 0
        cut = [tensor] * parts if tensor.dim() == 1 else tensor.chunk(parts, dim)
        for part, piece in zip(found, cut, strict=True):
            part[name] = piece.clone().contiguous()
    for part in found if fused else []:
        for layer in range(2):
            prefix = f"layers.{layer}.attention"
            part[f"{prefix}.wqkv.weight"] = torch.cat([part.pop(f"{prefix}.{n}.weight") for n in ("wq", "wk", "wv")])
    for part in found:
        part["rope.freqs"] = torch.zeros(3)
    return found


PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 8,
    "vocab_size": 64,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}


def titan_tensors(kv_heads: int) -> dict[str, torch.Tensor]:
    from titan_core.models.llama3 import FAMILY

    sizes = FAMILY.weights.meta.read_params({**PARAMS, "n_kv_heads": kv_heads})  # pyright: ignore[reportOptionalMemberAccess]
    generator = torch.Generator().manual_seed(0)
    return {p.name: torch.randn(p.shape, generator=generator).bfloat16() for p in FAMILY.parameters(sizes)}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("parts", "kv_heads", "embedding_dim"), [(1, 2, 0), (2, 2, 1), (2, 8, 0), (8, 8, 0)])
def test_meta_folder_in_and_out_is_exact(
    parts: int, kv_heads: int, embedding_dim: int, fused: bool, tmp_path: Path
) -> None:
    tensors = titan_tensors(kv_heads)
    meta = tmp_path / "meta"
    meta.mkdir()
    written = meta_parts(tensors, parts, fused, embedding_dim)
    for number, part in enumerate(written):
        torch.save(part, meta / f"consolidated.{number:02d}.pth")
    (meta / "params.json").write_text(json.dumps({**PARAMS, "n_kv_heads": kv_heads}))
    convert.run("meta-to-dcp", str(meta), str(tmp_path / "dcp"))
    assert_same(step_tensors(tmp_path / "dcp"), tensors)
    assert titan_core.load(str(meta))(torch.tensor([[1, 2, 3]])).shape == (1, 3, 64)
    if embedding_dim == 0:
        convert.run("dcp-to-meta", str(tmp_path / "dcp"), str(tmp_path / "out"), Options(parts=parts, fused_qkv=fused))
        for number, part in enumerate(written):
            part.pop("rope.freqs")
            path = tmp_path / f"out/consolidated.{number:02d}.pth"
            assert_same(torch.load(path, weights_only=True, mmap=True), part)
        assert (tmp_path / "out/params.json").read_bytes() == (meta / "params.json").read_bytes()


def test_params_of_our_own_say_the_same_sizes(dcp: Path, tmp_path: Path) -> None:
    convert.run("dcp-to-meta", str(dcp), str(tmp_path / "meta"))
    convert.run("meta-to-dcp", str(tmp_path / "meta"), str(tmp_path / "again"))
    assert_same(step_tensors(tmp_path / "again"), step_tensors(dcp))


@pytest.mark.parametrize("flavor", ["8B", "70B", "405B", "1B", "3B"])
def test_params_of_the_published_flavors(flavor: str) -> None:
    from titan_core.models.llama3 import FAMILY

    params = {
        "8B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024},
        "70B": {"dim": 8192, "n_layers": 80, "n_heads": 64, "ffn_dim_multiplier": 1.3, "multiple_of": 4096},
        "405B": {"dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2, "multiple_of": 4096},
        "1B": {"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5, "multiple_of": 256},
        "3B": {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0, "multiple_of": 256},
    }[flavor]
    common = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}
    meta = FAMILY.weights.meta  # pyright: ignore[reportOptionalMemberAccess]
    assert meta is not None
    sizes = FAMILY.flavors[flavor]
    assert meta.read_params({**params, **common}) == sizes
    assert meta.read_params(meta.write_params(sizes)) == sizes


# ---------------------------------------------------------------------------------------------- one file, dtypes


def test_one_torch_file(dcp: Path, tmp_path: Path) -> None:
    convert.run("dcp-to-torch", str(dcp), str(tmp_path / "weights.pt"))
    assert_same(torch.load(tmp_path / "weights.pt", weights_only=True), step_tensors(dcp))
    with zipfile.ZipFile(tmp_path / "weights.pt") as file:
        assert file.testzip() is None  # every CRC is right, though no rank saw a whole tensor
    assert os.listdir(tmp_path) == ["weights.pt"]


def test_cast_on_the_fly_rounds_as_torch_does(saved: Path, tmp_path: Path) -> None:
    convert.run("hf-to-hf", str(saved), str(tmp_path / "out"), Options(dtype="bfloat16", max_shard=20_000))
    expected = {name: tensor.bfloat16() for name, tensor in hf_tensors(saved).items()}
    assert_same(hf_tensors(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) < 22_000


def test_unknown_families_are_resharded_too(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tensors = {f"t{i}": torch.randn(5, i + 1) for i in range(12)}
    save_file(tensors, tmp_path / "in/model.safetensors")
    convert.run("hf-to-hf", str(tmp_path / "in"), str(tmp_path / "out"), Options(max_shard=300))
    assert_same(hf_tensors(tmp_path / "out"), tensors)


# ---------------------------------------------------------------------------------------------- block scales


def reference_dequantise(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The published formula, block by block."""
    out = torch.empty(weight.shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            out[block] = weight[block].float() * scale[i, j]
    return out.bfloat16()


def test_block_scales_in_and_out(tmp_path: Path) -> None:
    wide = {"hidden_size": 288, "intermediate_size": 400, "num_hidden_layers": 1, "tie_word_embeddings": True}
    model = llama(**wide).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    convert.run("hf-to-dcp", str(tmp_path / "plain"), str(tmp_path / "dcp"))
    convert.run("dcp-to-hf", str(tmp_path / "dcp"), str(tmp_path / "fp8"), Options(dtype="fp8-block", memory=1 << 20))
    stored = hf_tensors(tmp_path / "fp8")
    scales = [name for name in stored if name.endswith("_scale_inv")]
    assert len(scales) == 7  # q, k, v, o, gate, up, down: not the embedding
    assert stored["model.layers.0.mlp.down_proj.weight_scale_inv"].shape == (3, 4)
    assert json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]["weight_block_size"] == [
        128,
        128,
    ]

    convert.run("hf-to-hf", str(tmp_path / "fp8"), str(tmp_path / "back"))
    plain, back = hf_tensors(tmp_path / "plain"), hf_tensors(tmp_path / "back")
    assert set(back) == set(plain)
    for scale in scales:
        name = scale.removesuffix("_scale_inv")
        assert torch.equal(back[name], reference_dequantise(stored[name], stored[scale])), name
        largest = plain[name].float().abs().max()
        assert (back[name].float() - plain[name].float()).abs().max() <= largest * (
            16 / 448 + 2**-8
        )  # half a step of e4m3, and of bf16
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())

    convert.run("hf-to-dcp", str(tmp_path / "fp8"), str(tmp_path / "dcp8"), Options(memory=1 << 20))
    convert.run("dcp-to-hf", str(tmp_path / "dcp8"), str(tmp_path / "hf8"))
    assert_same(hf_tensors(tmp_path / "hf8"), back)


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    weight = torch.zeros(130, 8).to(torch.float8_e4m3fn)
    save_file({"w": weight, "w_scale_inv": torch.ones(1, 1)}, tmp_path / "in/model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"`w_scale_inv` is \[1, 1\]; a \[130, 8\] weight in blocks of \[128, 128\]"
    ):
        convert.run("hf-to-hf", str(tmp_path / "in"), str(tmp_path / "out"))


# ---------------------------------------------------------------------------------------------- kills and damage


def test_killed_conversion_goes_on_and_is_right(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in the middle, from outside, then the same call again: what was done is not done twice."""
    script = """
import os, signal, sys, time
from titan_core.interop import stream
from titan_core.jobs import convert, partial
stream._JOB_BYTES = 4096, 4096
note = partial.Partial.record
def record(self, rank, job, entry):
    note(self, rank, job, entry)
    if job == 5:
        os.kill(os.getpid(), signal.SIGKILL)
partial.Partial.record = record
convert.run(sys.argv[1], sys.argv[2], sys.argv[3])
"""
    monkeypatch.setattr(stream, "_JOB_BYTES", (4096, 4096))
    expected = hf_tensors(saved)
    for route, source, target in (
        ("hf-to-dcp", saved, tmp_path / "dcp"),
        ("dcp-to-hf", tmp_path / "dcp", tmp_path / "hf"),
        ("dcp-to-torch", tmp_path / "dcp", tmp_path / "weights.pt"),
    ):
        words = [sys.executable, "-c", script, route, str(source), str(target)]
        killed = subprocess.run(words, env=os.environ, capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert not (target / "step-0").exists()
        assert not any(target.glob("*")) or route == "hf-to-dcp"
        made = convert.run(route, str(source), str(target))  # pyright: ignore[reportArgumentType]
        assert 0 < made.resumed_bytes < made.bytes
        assert not list(tmp_path.glob(".*"))
        assert not list(target.glob(".step*"))
    assert_same(hf_tensors(tmp_path / "hf"), expected)
    assert_same(torch.load(tmp_path / "weights.pt", weights_only=True), step_tensors(tmp_path / "dcp"))
    with zipfile.ZipFile(tmp_path / "weights.pt") as file:
        assert file.testzip() is None


def test_other_words_do_not_go_on_from_a_killed_call(saved: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial/journal"
    partial.mkdir(parents=True)
    (partial / "plan.json").write_text(json.dumps({"fingerprint": "of something else"}))
    (partial / "0.jsonl").write_text('{"job": 0, "record": {}}\n{"jo')
    assert convert.run("hf-to-hf", str(saved), str(tmp_path / "out")).resumed_bytes == 0
    assert_same(hf_tensors(tmp_path / "out"), hf_tensors(saved))


def test_verification_finds_what_the_disk_changed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.checkpoint.saved import flip

    write = SafetensorsSink.write

    def damaging(self: SafetensorsSink, job: stream.Job, pieces: stream.Pieces) -> dict:
        record = write(self, job, pieces)
        flip(self.folder / job.file)
        return record

    monkeypatch.setattr(SafetensorsSink, "write", damaging)
    with pytest.raises(CheckpointError, match="differ from what was written"):
        convert.run("hf-to-hf", str(saved), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []
    convert.run("hf-to-hf", str(saved), str(tmp_path / "out"), Options(verify=False))


def test_one_tensor_in_many_slabs(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    tensors = {"big": torch.randn(700, 1000), "small": torch.randn(3)}
    save_file(tensors, tmp_path / "in/model.safetensors")
    seen: list[Progress] = []
    made = convert.run(
        "hf-to-hf",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        Options(memory=1 << 20),
        listener=lambda event: seen.append(event) if isinstance(event, Progress) else None,
    )
    assert_same(hf_tensors(tmp_path / "out"), tensors)
    assert made.bytes == 2_800_012
    assert [e.done for e in seen if e.what == "convert"][-1] == made.bytes
    assert {e.unit for e in seen} == {"bytes"}


# ---------------------------------------------------------------------------------------------- words


def test_wrong_words_are_explained(saved: Path, dcp: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a Hugging Face folder, not a titan checkpoint.*titan convert hf-to-dcp"):
        convert.run("dcp-to-hf", str(saved), str(tmp_path / "out"))
    with pytest.raises(TitanError, match="there is nothing at"):
        convert.run("dcp-to-hf", str(tmp_path / "none"), str(tmp_path / "out"))
    with pytest.raises(UsageError, match="there is nothing at") as caught:
        convert.run("hf-to-dcp", str(tmp_path / "none"), str(tmp_path / "out"))
    assert "config.json and *.safetensors" in (caught.value.tip or "")
    with pytest.raises(UsageError, match="is there already"):
        convert.run("dcp-to-hf", str(dcp), str(saved))
    with pytest.raises(CheckpointError, match="another shape"):
        convert.run("hf-to-dcp", str(saved), str(tmp_path / "out"), Options(family="llama3", flavor="debugmodel"))
    with pytest.raises(UsageError, match="`--flavor` needs `--family`"):
        convert.run("hf-to-dcp", str(saved), str(tmp_path / "out"), Options(flavor="8B"))
    assert os.listdir(tmp_path) == []


def test_object_stores_are_read_from_and_not_written_to(dcp: Path, saved: Path, tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(str(dcp), "memory://titan-convert/run", recursive=True)
    try:
        convert.run("dcp-to-hf", "memory://titan-convert/run", str(tmp_path / "hf"))
        assert_same(hf_tensors(tmp_path / "hf"), hf_tensors(saved))
        with pytest.raises(UsageError, match="`s3://bucket/out` is not a local folder") as caught:
            convert.run("hf-to-dcp", str(saved), "s3://bucket/out")
        assert caught.value.tip == "convert to a folder and copy it"
        with pytest.raises(UsageError, match="`s3://bucket/in` is not a local folder"):
            convert.run("hf-to-dcp", "s3://bucket/in", str(tmp_path / "out"))
    finally:
        store.rm("/titan-convert", recursive=True)


def test_command(saved: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "titan_cli", "convert"]
    out = str(tmp_path / "dcp")
    done = subprocess.run(
        [*words, "hf-to-dcp", str(saved), out, "--nproc", "2", "--json"],
        env=os.environ,
        capture_output=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["schema"] == "titan.convert-hf-to-dcp/1"
    assert result["tensors"] == 21
    wrong = subprocess.run(
        [*words, "dcp-to-hf", out, str(tmp_path / "hf"), "--memory", "lots"],
        env=os.environ,
        capture_output=True,
        check=False,
    )
    assert wrong.returncode == 2
    assert "`--memory` cannot be `lots`" in wrong.stderr.decode()


def test_interrupted_command_goes_on(tmp_path: Path) -> None:
    """Ctrl-C in the middle leaves what is needed to go on, and says so."""
    (tmp_path / "in").mkdir()
    save_file({f"t{i}": torch.zeros(1 << 20) for i in range(64)}, tmp_path / "in/model.safetensors")
    words = [sys.executable, "-m", "titan_cli", "convert", "hf-to-hf", str(tmp_path / "in"), str(tmp_path / "out")]
    process = subprocess.Popen(words, env=os.environ, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    journals = ".out.partial/journal/*.jsonl"
    while not any(path.stat().st_size for path in tmp_path.glob(journals)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate()[1].decode()
    if process.returncode == 0:
        pytest.skip("it was done before the signal came")
    assert process.returncode == 130, stderr
    assert "the same command goes on" in stderr
    assert (tmp_path / ".out.partial").exists()
    again = subprocess.run([*words, "--json"], env=os.environ, capture_output=True, check=True)
    assert json.loads(again.stdout)["resumed_bytes"] > 0
    assert_same(load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "in/model.safetensors"))
    shutil.rmtree(tmp_path / "out")
