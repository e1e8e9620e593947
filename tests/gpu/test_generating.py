"""Text and images from a GPU equal those of a CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gpu.runs import config, losses
from titan_core.generation.decode import decode
from titan_core.generation.sampler import Sampling
from titan_core.jobs import generate, generate_flux, validate
from titan_core.jobs.load import load_language
from titan_core.nn.attention import CAUSAL, Mask, attention, document_mask, visible

PROMPTS = [[5, 9, 33], [1], [60, 2, 2, 7, 41, 8, 19] * 9, [12, 13]]
SAVING = {"checkpoint.enable": True, "checkpoint.interval": 6}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def trained(model: str, folder: Path) -> str:
    path = folder / model
    if not path.exists():
        losses(config(path, model, **SAVING))
    return str(path)


@pytest.mark.parametrize("model", ["llama3", "deepseek_v3", "llama4 packed", "qwen3 experts"])
def test_decoding_equals_a_cpu(model: str, runs: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        made = load_language(trained(model, runs), device=device, dtype=torch.float32)
        found[device] = decode(
            made.model, made.family.attentions(made.sizes), PROMPTS,
            max_new_tokens=24, sampling=Sampling(temperature=0.0), prompt_log_probs=True,
        )  # fmt: skip
    for mine, theirs in zip(found["cuda"], found["cpu"], strict=True):
        assert mine.ids == theirs.ids
        assert mine.log_probs == pytest.approx(theirs.log_probs, abs=1e-3)
        assert mine.prompt_log_probs == pytest.approx(theirs.prompt_log_probs, abs=1e-3)


def test_a_prompt_in_pieces_equals_one_at_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("llama3", "deepseek_v3"):
        made = load_language(trained(model, runs), dtype=torch.float32)
        attentions, greedy = made.family.attentions(made.sizes), Sampling(temperature=0.0)
        whole = decode(made.model, attentions, [PROMPTS[2]], max_new_tokens=8, sampling=greedy)
        monkeypatch.setattr("titan_core.generation.decode._PREFILL", 20)
        pieces = decode(made.model, attentions, [PROMPTS[2]], max_new_tokens=8, sampling=greedy)
        monkeypatch.undo()
        assert pieces[0].ids == whole[0].ids
        assert pieces[0].log_probs == pytest.approx(whole[0].log_probs, abs=1e-3)


def test_the_command_generates_in_bf16_and_measures(runs: Path) -> None:
    run = trained("llama3", runs)
    result = generate.run(run, ["import os", "def "], max_new_tokens=16)
    assert result.tokens >= 16
    assert result.tokens_per_second > 0
    on_gpu, on_cpu = (validate.loss(run, "embedded", batches=2, device=device) for device in ("cuda", "cpu"))
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-2)


@pytest.mark.parametrize("quantize", [None, "float8"])
def test_images_equal_those_of_a_cpu(quantize, runs: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    run, pixels = trained("flux", runs), {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        options = generate_flux.Options(steps=4, out=str(out), quantize=quantize, num_images=2)
        result = generate_flux.run(run, ["a red square", "a blue circle"], options, device=device)
        pixels[device] = np.stack([np.asarray(image.open(one.path)).astype(int) for one in result.images])
    gap = np.abs(pixels["cuda"] - pixels["cpu"])
    assert pixels["cpu"].std() > 1
    assert gap.mean() < (0.5 if quantize is None else 8)


# ---------------------------------------------------------------------------------------------- attention alone

DOCUMENTS = torch.tensor([[0] * 50 + [1] * 100 + [2] * 42 + [-1] * 8, [0] * 200], dtype=torch.int32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("widths", [(16, 16), (64, 64), (96, 64), (192, 128)], ids=str)
@pytest.mark.parametrize("case", ["causal", "documents", "last queries", "last query", "full"])
def test_attention_equals_a_dense_mask(case: str, widths: tuple[int, int], dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    tokens = {"last queries": 77, "last query": 1}.get(case, 200)
    wide, narrow = widths
    q = torch.randn(2, tokens, 4, wide, dtype=torch.float64)
    k, v = torch.randn(2, 200, 2, wide, dtype=torch.float64), torch.randn(2, 200, 2, narrow, dtype=torch.float64)
    queries = torch.arange(200 - tokens, 200)
    documents = DOCUMENTS if case == "documents" else torch.zeros_like(DOCUMENTS)
    seen = visible(documents, queries, torch.arange(200))[:, None]
    seen = torch.ones_like(seen) if case == "full" else seen
    needs_grad = case in ("causal", "documents", "full")
    inputs = [x.to("cuda", dtype).requires_grad_(needs_grad) for x in (q, k, v)]
    exact = [x.detach().double().cpu().requires_grad_(needs_grad) for x in inputs]
    wanted = attention(*exact, Mask(dense=seen))
    mask = {"documents": document_mask(documents.cuda(), queries.cuda()), "full": Mask(causal=False)}.get(case, CAUSAL)
    found = attention(*inputs, mask)
    counted = (documents[:, queries] >= 0)[..., None, None]  # what padding sees is nobody's business
    gap = ((found.double().cpu() - wanted) * counted).abs().max().item()
    assert gap <= tolerance * max(1.0, wanted.abs().max().item())
    if needs_grad:
        slope = torch.randn(wanted.shape, dtype=torch.float64) * counted
        wanted.backward(slope)
        found.backward(slope.to("cuda", dtype))
        for mine, theirs in zip(inputs, exact, strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            gap = (mine.grad.double().cpu() - theirs.grad).abs().max().item()
            assert gap <= 4 * tolerance * max(1.0, theirs.grad.abs().max().item())
