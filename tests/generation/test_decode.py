"""Decoding against transformers and against plain forwards."""

import pytest
import torch

from tests.models.test_llama3 import CASES, hugging_face, their_name, to_theirs
from titan_core.generation.decode import decode
from titan_core.generation.sampler import Sampling, sample
from titan_core.models import family
from titan_core.parallel.materialise import materialise
from titan_core.runtime.errors import UsageError

LLAMA = family("llama3")
SIZES = CASES["grouped queries"]
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        built = LLAMA.build(SIZES)
    materialise(built, LLAMA.parameters(SIZES), 3, torch.device("cpu"))
    return built.eval()


def run(model, prompts, **options):
    options = {"max_new_tokens": 12, "sampling": GREEDY, **options}
    return decode(model, LLAMA.attentions(SIZES), prompts, **options)


PROMPTS = [[5, 9, 33], [1], [60, 2, 2, 7, 41, 8, 19], [12, 13]]


def test_greedy_ids_equal_transformers(model) -> None:
    theirs = hugging_face(SIZES).eval()
    mapped = {their_name(n): to_theirs(n, p.detach(), SIZES) for n, p in model.named_parameters()}
    theirs.load_state_dict(mapped, strict=False)
    for prompt in PROMPTS:
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert run(model, [prompt])[0].ids == expected[0, len(prompt) :].tolist()


def test_a_batch_of_any_lengths_equals_one_by_one(model) -> None:
    together = run(model, PROMPTS)
    for prompt, found in zip(PROMPTS, together, strict=True):
        alone = run(model, [prompt])[0]
        assert found.ids == alone.ids
        assert found.log_probs == pytest.approx(alone.log_probs, abs=1e-5)


def test_draws_do_not_depend_on_the_neighbours(model) -> None:
    sampling = Sampling(temperature=1.0, seed=7)
    assert run(model, PROMPTS, sampling=sampling)[0].ids == run(model, PROMPTS[:1], sampling=sampling)[0].ids
    other = Sampling(temperature=1.0, seed=8)
    assert run(model, PROMPTS, sampling=sampling)[0].ids != run(model, PROMPTS, sampling=other)[0].ids


def test_log_probs_are_those_of_a_full_forward(model) -> None:
    for prompt, found in zip(PROMPTS, run(model, PROMPTS, prompt_log_probs=True), strict=True):
        ids = prompt + found.ids
        with torch.no_grad():
            table = model(torch.tensor([ids])).log_softmax(-1)[0]
        expected = [table[i - 1, ids[i]].item() for i in range(1, len(ids))]
        assert found.prompt_log_probs + found.log_probs == pytest.approx(expected, abs=1e-4)


def test_prefill_in_pieces_equals_at_once(model, monkeypatch) -> None:
    whole = run(model, PROMPTS[2:3])
    monkeypatch.setattr("titan_core.generation.decode._PREFILL", 3)
    assert run(model, PROMPTS[2:3])[0].ids == whole[0].ids


def test_end_token_ends_a_row_only(model) -> None:
    free = run(model, PROMPTS)
    eos = free[0].ids[4]
    found = run(model, PROMPTS, eos_id=eos)
    cut = free[0].ids.index(eos)
    assert found[0].ended
    assert found[0].ids == free[0].ids[:cut]
    for before, after in zip(free[1:], found[1:], strict=True):
        stop = before.ids.index(eos) if eos in before.ids else len(before.ids)
        assert after.ids == before.ids[:stop]


def test_limits(model) -> None:
    assert len(run(model, [[1, 2, 3]], max_seq_len=8)[0].ids) == 5
    with pytest.raises(UsageError, match="fills the model's length"):
        run(model, [[1, 2, 3]], max_seq_len=3)
    with pytest.raises(UsageError, match="empty"):
        run(model, [[]])
    seen = []
    run(model, [[1]], on_token=lambda row, token: seen.append((row, token)), stop=lambda: len(seen) >= 4)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), 6),
        (Sampling(temperature=0.5), 6),
        (Sampling(temperature=1.0, top_k=2), 2),
        (Sampling(temperature=1.0, top_p=0.6), 2),
        (Sampling(temperature=1.0, top_p=1e-6), 1),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling, kept: int) -> None:
    logits = torch.tensor([[2.0, 1.5, 0.0, -1.0, -2.0, -3.0]])
    uniform = (torch.arange(20000) + 0.5) / 20000
    ids, log_probs = sample(logits.expand(20000, -1), uniform, sampling)
    expected = (logits[0] / sampling.temperature).softmax(-1)
    expected[kept:] = 0
    found = torch.bincount(ids, minlength=6) / 20000
    assert torch.allclose(found, expected / expected.sum(), atol=1e-3)
    assert torch.equal(log_probs, logits[0].log_softmax(-1)[ids])


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -2}])
def test_impossible_sampling_is_refused(options: dict) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)
