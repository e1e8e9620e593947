"""Training from Hugging Face folders, and into them: every layout starts from the same weights."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.interop.samples import LLAMA3_ROPE, hf_tensors, llama
from tests.runs import losses, tiny
from titan_core.config import checks
from titan_core.jobs import convert
from titan_core.jobs.convert import Options
from titan_core.jobs.foreign import open_weights
from titan_core.runtime.errors import CheckpointError


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "llama"
    llama(vocab_size=2048, rope_parameters={**LLAMA3_ROPE, "factor": 8.0}).save_pretrained(
        folder, max_shard_size="100KB"
    )
    return folder


def run(start: Path, folder: Path, **changes: Any) -> Any:
    sizes = dataclasses.asdict(open_weights(str(start)).sizes)
    kept = ("dim", "n_heads", "n_kv_heads", "ffn_dim", "norm_eps", "n_layers")
    args = {f"model.args.{name}": sizes[name] for name in kept}
    args["model.args.rope_scaling.original_max_seq_len"] = 32
    return tiny(folder, **args, **{"training__steps": 3, "optimizer__lr": 1e-3, **changes})


def test_every_layout_starts_from_the_same_weights(start: Path, tmp_path: Path) -> None:
    hf = {"checkpoint__initial_load_in_hf": True, "checkpoint__initial_load_path": start}
    convert.run("hf-to-dcp", str(start), str(tmp_path / "dcp"))
    expected = losses(run(start, tmp_path / "a", checkpoint__initial_load_path=tmp_path / "dcp"))
    assert losses(run(start, tmp_path / "b", **hf)) == expected
    assert losses(run(start, tmp_path / "c", **hf), 2) == pytest.approx(expected, rel=1e-5)
    shapes = {"parallelism__data_parallel_replicate_degree": 2, "training__local_batch_size": 2}
    assert losses(run(start, tmp_path / "d", **hf, **shapes), 4) == pytest.approx(expected, rel=1e-5)


def test_last_step_is_exported_and_the_run_can_be_extended(start: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "run"
    saving = {"checkpoint__enable": True, "checkpoint__last_save_in_hf": True, "checkpoint__export_dtype": "float32"}
    first = losses(run(start, folder, **saving), 2)
    out = folder / "checkpoint/hf/step-3"
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= {p.name for p in out.iterdir()}
    assert hf_tensors(out)["lm_head.weight"].dtype == torch.float32
    tokens = torch.randint(0, 2048, (1, 16))
    import titan_core

    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out).eval()(tokens).logits
        assert (titan_core.load(str(folder))(tokens) - theirs).abs().max() < 1e-5
        assert (titan_core.load(str(out))(tokens) - theirs).abs().max() < 1e-5
    more = losses(run(start, folder, **{**saving, "training__steps": 5}), 2, allow_change=["lr_scheduler.*"])
    assert len(first) == 3
    assert len(more) == 2
    assert (folder / "checkpoint/hf/step-5/config.json").exists()


def test_block_scaled_weights_must_be_asked_for(start: Path, tmp_path: Path) -> None:
    convert.run("hf-to-hf", str(start), str(tmp_path / "fp8"), Options(dtype="fp8-block"))
    hf = {"checkpoint__initial_load_in_hf": True, "checkpoint__initial_load_path": tmp_path / "fp8"}
    with pytest.raises(CheckpointError, match=r"block-scaled float8.*initial_load_in_hf_quantized"):
        losses(run(start, tmp_path / "a", **hf))
    found = losses(run(start, tmp_path / "b", **hf, checkpoint__initial_load_in_hf_quantized=True))
    plain = losses(run(start, tmp_path / "c", **{**hf, "checkpoint__initial_load_path": start}))
    assert found == pytest.approx(plain, rel=0.05)
    assert found != plain


def test_a_foreign_folder_is_named_where_a_checkpoint_was_meant(start: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"is a Hugging Face folder, not a titan checkpoint.*initial_load_in_hf = true"
    ):
        losses(run(start, tmp_path, checkpoint__initial_load_path=start))


def test_config_rules(start: Path, tmp_path: Path) -> None:
    def messages(**changes: Any) -> str:
        return " ".join(problem.message for problem in checks.check(tiny(tmp_path, **changes)))

    assert "no key says where" in messages(checkpoint__initial_load_in_hf=True)
    wanted = {"checkpoint__initial_load_in_hf": True, "checkpoint__initial_load_path": start}
    assert messages(**wanted) == ""
    assert "holds nothing but weights" in messages(**wanted, checkpoint__initial_load_model_only=False)
    assert "initial_load_in_hf_quantized` needs" in messages(checkpoint__initial_load_in_hf_quantized=True)
    assert "last_save_in_hf` needs checkpoints" in messages(checkpoint__last_save_in_hf=True)
