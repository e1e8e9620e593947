"""The stages of `titan validate config`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import call


def stages(*words: str, capsys) -> tuple[int, dict[str, bool | None], dict]:
    code, out, err = call("validate", "config", *words, "--json", capsys=capsys)
    assert err == ""
    found = json.loads(out)
    return code, {check["name"]: check["ok"] for check in found["checks"]}, found


def test_a_sound_config_passes_all(capsys) -> None:
    code, out, _ = call("validate", "config", "llama3_debugmodel", "--world", "4", capsys=capsys)
    assert code == 0
    assert "fsdp 4" in out
    assert "6,163,712 parameters" in out
    assert "[7/7] memory" in out
    assert "fail" not in out
    assert "skip" not in out


def test_every_stage_runs_though_others_fail(capsys) -> None:
    words = ["llama3_debugmodel", "--model.flavor", "9B", "--training.dataset", "c5", "--guard.spike", "rollback"]
    words += ["--checkpoint.enable=false", "--world", "6", "--parallelism.data_parallel_replicate_degree", "4"]
    code, found, _ = stages(*words, capsys=capsys)
    assert code == 1
    assert found == {
        "keys and types": True,
        "rules": False,
        "layout": False,
        "model": False,
        "tokenizer": True,
        "data": False,
        "memory": None,
    }


@pytest.mark.parametrize(
    ("words", "stage", "said"),
    [
        (["--training.global_batch_size", "20", "--world", "8"], "layout", "try 64"),
        (["--model.args.n_heads", "7"], "model", "n_heads 7 does not divide dim 256"),
        (["--model.args.n_kv_heads", "3"], "model", "n_kv_heads 3 does not divide n_heads 16"),
        (["--model.args.dim", "16"], "model", "odd"),
        (["--model.args.n_layers", "0"], "model", ">= 1"),
        (["--model.args.rope_scaling.factr", "2"], "model", "did you mean `factor`"),
        (["--training.seq_len", "200000"], "model", "131072"),
        (["--model.args.vocab_size", "100"], "tokenizer", "--model.args.vocab_size 2048"),
        (["--model.hf_assets_path", "none"], "tokenizer", "no tokenizer at"),
        (["--validation.dataset_path", "none.jsonl"], "data", "does not exist"),
        (["--training.dataset", "local"], "data", "dataset_path"),
        (["--optimizer.early_step_in_backward"], "rules", "early_step_in_backward = true"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_what_is_wrong_fails_its_stage(words: list[str], stage: str, said: str, capsys) -> None:
    code, found, whole = stages("llama3_debugmodel", *words, capsys=capsys)
    assert code == 1
    assert [name for name, ok in found.items() if ok is False] == [stage]
    assert said in json.dumps(whole)


def test_wrong_keys_are_a_failed_stage_and_a_missing_file_is_an_error(tmp_path: Path, capsys) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[training]\nstps = 1\nseq_len = 'long'\n")
    code, found, whole = stages(str(path), capsys=capsys)
    assert code == 1
    assert [name for name, ok in found.items() if ok is None] == list(found)[1:]
    assert [problem["where"] for problem in whole["checks"][0]["problems"]] == [f"{path}:2", f"{path}:3"]
    assert call("validate", "config", str(tmp_path / "none.toml"), capsys=capsys)[0] == 2


def test_local_data_is_counted_and_not_read(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jsonl").write_text("this is not JSON\n" * 1000)
    words = ["llama3_debugmodel", "--training.dataset_path", str(tmp_path), "--validation.enable=false"]
    code, out, _ = call("validate", "config", *words, capsys=capsys)
    assert code == 0
    assert "1 files" in out


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys; from titan_cli.main import run; run(['validate', 'config', 'llama3_8b', '--world', '8']); "
        "print('loaded:', sorted({'torch', 'numpy', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("loaded: []\n")
