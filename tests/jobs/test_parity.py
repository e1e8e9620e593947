"""`titan validate parity`: same, rounded, different; tensors and logits."""

from pathlib import Path

import pytest
import torch

from tests.interop.samples import llama, save
from titan_core.jobs import convert, parity
from titan_core.jobs.convert import Options


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as `hf` and `dcp`, rounded as `half`; `other` has one number that differs."""
    folder = tmp_path_factory.mktemp("places")
    save("llama3", folder / "hf")
    convert.run("hf-to-dcp", str(folder / "hf"), str(folder / "dcp"))
    convert.run("hf-to-dcp", str(folder / "hf"), str(folder / "half"), Options(dtype="bfloat16"))
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1.0
    model.save_pretrained(folder / "other")
    llama(vocab_size=50).save_pretrained(folder / "smaller")
    return folder


def stages(a: Path, b: Path, tolerance: float = 0.0) -> dict[str, tuple[bool | None, str]]:
    return {check.name: (check.ok, check.text) for check in parity.run(str(a), str(b), tolerance=tolerance).checks}


def test_same_weights_in_two_formats(places: Path) -> None:
    found = stages(places / "hf", places / "dcp")
    assert found["numbers"] == (True, "21 tensors are bit-identical")
    assert found["logits"][0] is True
    assert "titan's equal transformers' to" in found["logits"][1]


def test_rounded_weights_need_a_tolerance(places: Path) -> None:
    exact = stages(places / "dcp", places / "half")
    assert exact["numbers"][0] is False
    assert exact["logits"][0] is None
    assert stages(places / "dcp", places / "half", 2**-8)["numbers"][0] is True
    assert stages(places / "hf", places / "half", 2**-8)["logits"][0] is False  # bf16 weights, logits beyond 1e-4


def test_one_number_that_differs_is_named(places: Path) -> None:
    found = stages(places / "dcp", places / "other")
    assert found["numbers"][0] is False
    assert "1 of 21 tensors differ" in found["numbers"][1]
    assert "layers.1.feed_forward.w3.weight by" in found["numbers"][1]
    assert found["logits"][0] is False


def test_other_shapes_are_named(places: Path) -> None:
    found = stages(places / "hf", places / "smaller")
    assert found["names and shapes"][0] is False
    assert "tok_embeddings.weight is [67, 36] and [50, 36]" in found["names and shapes"][1]
    assert "numbers" not in found


def test_unreadable_weights_are_a_failed_stage(places: Path, tmp_path: Path) -> None:
    assert stages(places / "hf", tmp_path)["readable"][0] is False
