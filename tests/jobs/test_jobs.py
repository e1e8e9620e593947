"""Using what was trained: load, generate, validate; from Python and from the command line."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import titan_core
from tests.cli.test_cli import call
from tests.runs import losses, tiny
from titan_core.config.schema import Data
from titan_core.data.sources import open_source
from titan_core.jobs import generate, validate
from titan_core.jobs.load import load_trained
from titan_core.runtime.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    losses(tiny(folder, checkpoint__enable=True, training__steps=30, training__local_batch_size=8))
    return folder


def test_load_gives_a_model_to_call(trained: Path) -> None:
    model = titan_core.load(str(trained))
    tokens = torch.randint(2048, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    assert logits.shape == (2, 16, 2048)
    assert not logits.requires_grad
    half = titan_core.load(str(trained), dtype=torch.bfloat16)
    assert torch.allclose(half(tokens).float(), logits, atol=0.2)


def test_generate_continues_text_and_ids(trained: Path) -> None:
    tokenizer = load_trained(str(trained)).tokenizer
    text = generate.run(str(trained), ["import os"], max_new_tokens=8, log_probs=True)
    ids = generate.run(
        str(trained), [], prompt_ids=[tokenizer.encode("import os", add_bos=True, add_eos=False)], max_new_tokens=8
    )
    assert text.outputs[0].ids == ids.outputs[0].ids
    assert text.step == 30
    assert len(text.outputs[0].prompt_log_probs) == len(text.outputs[0].prompt_ids) - 1
    with pytest.raises(UsageError, match="not below the vocabulary"):
        generate.run(str(trained), [], prompt_ids=[[5000]])
    with pytest.raises(UsageError, match="no prompt"):
        generate.run(str(trained), [])


def test_generated_text_is_streamed_whole(trained: Path) -> None:
    pieces: list[str] = []
    result = generate.run(
        str(trained), ["def"], max_new_tokens=20, listener=lambda event: pieces.append(getattr(event, "text", ""))
    )
    assert "".join(pieces[1:] if "trained on" in pieces[0] else pieces).rstrip("\n") == result.outputs[0].text.rstrip(
        "\n"
    )


def test_generate_from_the_command_line(trained: Path, tmp_path: Path, capsys) -> None:
    words = ["generate", "llm", "--checkpoint", str(trained)]
    code, out, _ = call(*words, "--prompt-ids", "5,6,7", "--greedy", "--max-new-tokens", "4", "--json", capsys=capsys)
    found = json.loads(out)
    assert code == 0
    (one,) = found["outputs"]
    assert len(one["ids"]) == len(one["log_probs"]) == 4
    assert len(one["prompt_log_probs"]) == 2
    assert all(p < 0 for p in one["log_probs"])

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "import"}\n\n{"prompt": "class"}\n')
    code, out, err = call(*words, "--prompts", str(prompts), "--max-new-tokens", "3", capsys=capsys)
    assert code == 0
    assert "--- import" in out
    assert "--- class" in out
    assert "tok/s" in err
    prompts.write_text('{"promt": "import"}\n')
    assert call(*words, "--prompts", str(prompts), capsys=capsys)[0] == 2


def test_loss_equals_a_plain_computation(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("def f(x):\n    return x + 1\n" * 20)
    found = validate.loss(str(trained), str(path), batch_size=2)
    used = load_trained(str(trained))
    ids = torch.tensor(used.tokenizer.encode(path.read_text(), add_bos=True, add_eos=True))
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, 32):
        piece = ids[start : start + 33]
        if len(piece) > 1:
            logits = used.model(piece[None, :-1])[0]
            total += F.cross_entropy(logits, piece[1:], reduction="sum").item()
            count += len(piece) - 1
    assert found.tokens == count == len(ids) - 1
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / len(path.read_bytes()), rel=1e-4)


def test_validate_loss_of_the_embedded_text(trained: Path, capsys) -> None:
    code, out, _ = call("validate", "loss", str(trained), "--batches", "2", "--json", capsys=capsys)
    found = json.loads(out)
    assert code == 0
    assert found["tokens"] == 2 * 8 * 32
    assert 3 < found["loss"] < 8


def test_validate_checkpoint(trained: Path, tmp_path: Path, capsys) -> None:
    code, out, _ = call("validate", "checkpoint", str(trained), "--world", "1", capsys=capsys)
    assert code == 0
    assert out.count("ok") >= 5
    import shutil

    shutil.copytree(trained, tmp_path / "copy")
    data = tmp_path / "copy" / "checkpoint" / "step-30" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 3] ^= 1
    data.write_bytes(content)
    code, out, _ = call("validate", "checkpoint", str(tmp_path / "copy"), "--json", capsys=capsys)
    found = json.loads(out)
    assert code == 1
    assert not found["ok"]
    assert [check["name"] for check in found["checks"] if not check["ok"]] == ["undamaged"]
    assert len(found["checks"]) == 5
    code, out, _ = call("validate", "checkpoint", str(trained), "--world", "3", capsys=capsys)
    assert code == 1
    assert "do not divide" in out


def test_validate_checkpoint_sees_numbers_that_are_not_finite(tmp_path: Path) -> None:
    from titan_core.checkpoint import Checkpointer, Snapshot
    from titan_core.config.schema import Checkpoint

    tensors = {"w": torch.tensor([1.0, math.nan])}
    Checkpointer(str(tmp_path), Checkpoint()).save(1, Snapshot(tensors, {"step": 1, "tokens": 0}, {}), blocking=True)
    report = validate.checkpoint(str(tmp_path))
    assert {check.name: check.ok for check in report.checks}["undamaged"] is False


def test_validate_data(tmp_path: Path, capsys) -> None:
    code, out, err = call("validate", "data", "llama3_debugmodel", "--samples", "1", capsys=capsys)
    assert code == 0
    assert "--- row 0" in err
    empty = tmp_path / "a.txt"
    empty.write_text("")
    code, out, _ = call("validate", "data", "llama3_debugmodel", "--training.dataset_path", str(empty), capsys=capsys)
    assert code == 1
    assert "fail" in out
    code, out, _ = call(
        "validate", "data", "llama3_debugmodel", "--model.args.vocab_size", "100", "--json", capsys=capsys
    )
    assert code == 1
    assert [c["name"] for c in json.loads(out)["checks"] if not c["ok"]] == ["tokenizer"]


def test_not_a_checkpoint_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing at"):
        titan_core.load(str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        titan_core.load(str(tmp_path))


def test_embedded_documents_are_many() -> None:
    source = open_source("embedded", None, Data(), validation=False, listener=print)
    assert len(source) > 300
