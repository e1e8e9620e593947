"""Weights go in and come out exact: transformers is the oracle for names, numbers and logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import titan_core
from tests.interop.samples import MODELS, assert_same, hf_tensors, llama4_with_eyes, save, step_tensors
from tests.ranks import run_ranks
from titan_core.interop.loading import fill
from titan_core.jobs import convert
from titan_core.jobs.convert import Options
from titan_core.jobs.foreign import open_weights

TOKENS = torch.randint(0, 67, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Each model once, as transformers saves it, with its logits."""
    known: dict[str, tuple[Path, torch.Tensor]] = {}

    def of(name: str) -> tuple[Path, torch.Tensor]:
        if name not in known:
            folder = tmp_path_factory.mktemp("saved") / name
            with torch.no_grad():
                known[name] = folder, save(name, folder)(TOKENS).logits
        return known[name]

    return of


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out_is_bit_identical_and_logits_are_equal(name: str, saved, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, logits = saved(name)
    convert.run("hf-to-dcp", str(folder), str(tmp_path / "dcp"))
    with torch.no_grad():
        assert (titan_core.load(str(tmp_path / "dcp"))(TOKENS) - logits).abs().max() < 1e-5
        assert (titan_core.load(str(folder))(TOKENS) - logits).abs().max() < 1e-5
    convert.run("dcp-to-hf", str(tmp_path / "dcp"), str(tmp_path / "hf"), Options(max_shard=30_000))
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    assert_same(hf_tensors(tmp_path / "hf"), hf_tensors(folder))
    assert (tmp_path / "hf/config.json").read_bytes() == (folder / "config.json").read_bytes()
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        assert torch.equal(loaded(TOKENS).logits, logits)


@pytest.mark.parametrize("name", MODELS)
def test_config_of_our_own_loads_in_transformers(name: str, saved, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder, logits = saved(name)
    convert.run("hf-to-dcp", str(folder), str(tmp_path / "dcp"))
    shutil.rmtree(tmp_path / "dcp/step-0/assets")  # as if titan had trained it
    opened = open_weights(str(folder))
    opened.assets.clear()
    from titan_core.interop.views import TheirView
    from titan_core.jobs.export_files import hf_files

    assert opened.mapping is not None
    for name, content in hf_files(opened, TheirView(opened.ours, opened.mapping).index, None).items():
        (tmp_path / name).write_bytes(content)
    for path in folder.glob("model*"):
        shutil.copy(path, tmp_path)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(TOKENS).logits, logits)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_any_number_of_ranks_makes_the_same(ranks: int, saved, tmp_path: Path) -> None:
    folder, _ = saved("llama3")

    def both() -> int:
        made = convert.run("hf-to-dcp", str(folder), str(tmp_path / "dcp"))
        convert.run("dcp-to-hf", str(tmp_path / "dcp"), str(tmp_path / "hf"), Options(max_shard=30_000))
        return made.bytes

    assert len(set(run_ranks(both, ranks))) == 1
    assert_same(hf_tensors(tmp_path / "hf"), hf_tensors(folder))
    assert set(step_tensors(tmp_path / "dcp")) == set(open_weights(str(folder)).ours.index)


LAYOUTS = {
    "Shard(0)": ((-1,), [Shard(0)]),
    "Shard(1)": ((-1,), [Shard(1)]),
    "Shard(0) x Shard(1)": ((-1, 2), [Shard(0), Shard(1)]),
    "Replicate x Shard(0)": ((2, -1), [Replicate(), Shard(0)]),
    "Shard(0) x Shard(0)": ((2, -1), [Shard(0), Shard(0)]),
}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_each_rank_fills_its_shards_and_reads_no_more(ranks: int, saved) -> None:
    folder, _ = saved("llama3")
    opened = open_weights(str(folder))
    wanted = {name: opened.ours.read(name, (0,) * len(s), s) for name, (s, _) in opened.ours.index.items()}

    def load(shape: tuple[int, ...], placements: list) -> tuple[int, int]:
        mesh = init_device_mesh(
            "cpu", tuple(ranks // 2 if n == -1 and len(shape) > 1 else ranks if n == -1 else n for n in shape)
        )
        opened = open_weights(str(folder))
        headers, needed = opened.raw.reader.bytes_read, 0  # pyright: ignore[reportAttributeAccessIssue]
        tensors = {}
        for name, value in wanted.items():
            kept = [Replicate() if isinstance(p, Shard) and p.dim >= value.dim() else p for p in placements]
            tensors[name] = distribute_tensor(torch.zeros_like(value), mesh, kept)
            needed += tensors[name].to_local().nbytes
        fill(opened.ours, tensors)
        for name, tensor in tensors.items():
            assert isinstance(tensor, DTensor)
            assert torch.equal(tensor.full_tensor(), wanted[name]), name
        dist.barrier()
        return opened.raw.reader.bytes_read - headers, needed  # pyright: ignore[reportAttributeAccessIssue]

    for name, (shape, placements) in LAYOUTS.items():
        if len(shape) > 1 and ranks < 4:
            continue
        for read, needed in run_ranks(load, ranks, shape, placements):
            # a shard's edge within a head makes that head be read whole: at most 6 rows of 36 numbers, twice, in
            # wq and wk of two layers
            assert read <= needed + 4 * 2 * 6 * 36 * 4, name
            assert read >= needed


def test_titan_trains_from_what_was_converted(saved, tmp_path: Path) -> None:
    import dataclasses

    from tests.runs import losses, tiny

    folder, _ = saved("llama3")
    convert.run("hf-to-dcp", str(folder), str(tmp_path / "dcp"))
    sizes = dataclasses.asdict(open_weights(str(folder)).sizes)
    args = {f"model.args.{k}": v for k, v in sizes.items() if k in ("dim", "n_heads", "n_kv_heads", "ffn_dim")}
    args |= {"model.args.vocab_size": 2048, "checkpoint.initial_load_path": str(tmp_path / "dcp"), "training.steps": 1}
    from titan_core.runtime.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"tok_embeddings.weight is \(67, 36\), wanted \(2048, 36\)"):
        losses(tiny(tmp_path / "run", **args))


def test_the_text_model_within_one_that_sees(tmp_path: Path) -> None:
    model = llama4_with_eyes()
    model.save_pretrained(tmp_path / "seeing", max_shard_size="20KB")
    config = json.loads((tmp_path / "seeing/config.json").read_text())
    config["text_config"] |= {"no_rope_layers": [], "attn_temperature_tuning": 4}  # so it was published
    (tmp_path / "seeing/config.json").write_text(json.dumps(config))
    with torch.no_grad():
        logits = model.language_model(TOKENS).logits
    said: list[str] = []
    convert.run("hf-to-dcp", str(tmp_path / "seeing"), str(tmp_path / "dcp"), listener=lambda e: said.append(str(e)))
    others = sum(not name.startswith("language_model.") for name in hf_tensors(tmp_path / "seeing"))
    assert any(f"{others} tensors are of parts that llama4 has not: left out" in text for text in said)
    for place in ("seeing", "dcp"):
        assert (titan_core.load(str(tmp_path / place))(TOKENS) - logits).abs().max() < 1e-5
    convert.run("dcp-to-hf", str(tmp_path / "dcp"), str(tmp_path / "text"))
    text = {n.removeprefix("language_model."): t for n, t in hf_tensors(tmp_path / "seeing").items() if "language" in n}
    assert_same(hf_tensors(tmp_path / "text"), text)
    convert.run("hf-to-hf", str(tmp_path / "seeing"), str(tmp_path / "again"))
    assert_same(hf_tensors(tmp_path / "again"), hf_tensors(tmp_path / "seeing"))
