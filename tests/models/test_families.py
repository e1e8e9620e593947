"""Every family against transformers: logits, gradients, generation; and its declarations against itself."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.interop.samples import MODELS, gradients, tensors
from tests.interop.test_mapping import Memory
from titan_core.generation.decode import decode
from titan_core.generation.sampler import Sampling
from titan_core.interop.views import OurView
from titan_core.jobs.foreign import open_weights
from titan_core.jobs.load import load_trained
from titan_core.models import FAMILIES, family

TOKENS = torch.randint(0, 67, (2, 24), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", MODELS)
def test_logits_gradients_and_generation_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = MODELS[name]()
    theirs.save_pretrained(tmp_path)
    opened = open_weights(str(tmp_path))
    trained = load_trained(str(tmp_path), device="cpu")
    ours = trained.model.train().requires_grad_(True)
    our_logits, their_logits = ours(TOKENS), theirs(TOKENS).logits
    assert (our_logits - their_logits).abs().max() <= 1e-5 * max(1.0, their_logits.abs().max().item())

    labels = TOKENS.roll(-1, 1).flatten()
    for logits in (our_logits, their_logits):
        F.cross_entropy(logits.flatten(0, 1), labels).backward()
    assert opened.mapping is not None
    slopes = gradients(theirs)
    expected = tensors(OurView(Memory(slopes), opened.mapping))
    for parameter_name, parameter in ours.named_parameters():
        wanted = expected[parameter_name]
        gap = (parameter.grad - wanted).abs().max().item()
        assert gap <= 1e-5 * max(wanted.abs().max().item(), 1e-2), parameter_name

    ours.eval().requires_grad_(False)
    prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :5].tolist()]
    attentions = trained.family.attentions(trained.sizes)
    found = decode(ours, attentions, prompts, max_new_tokens=15, sampling=Sampling(0.0, 0, 1.0, 0))
    for prompt, continuation in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(15):
            with torch.no_grad():
                ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
        assert continuation.ids == ids[len(prompt) :]


@pytest.mark.parametrize(("name", "flavor"), [(n, f) for n in FAMILIES for f in family(n).flavors])
def test_declared_parameters_are_those_of_the_module(name: str, flavor: str) -> None:
    known = family(name)
    sizes = known.flavors[flavor]
    with torch.device("meta"):
        model = known.build(sizes)
    own = [p for p in known.parameters(sizes) if p.tied_to is None]
    assert [(p.name, p.shape) for p in own if p.trained] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert {p.name: p.shape for p in own} == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert known.weights is not None
    assert known.weights.read_config(known.weights.write_config(sizes)) == sizes or flavor.startswith("debugmodel_")


@pytest.mark.parametrize(
    ("name", "flavor", "count"),
    [
        ("qwen3", "0.6B", 596_049_920),
        ("qwen3", "1.7B", 1_720_574_976),
        ("qwen3", "4B", 4_022_468_096),
        ("qwen3", "8B", 8_190_735_360),
        ("qwen3", "14B", 14_768_307_200),
        ("qwen3", "32B", 32_762_123_264),
        ("qwen3", "30B-A3B", 30_532_122_624),
        ("qwen3", "235B-A22B", 235_093_634_560),
        ("llama4", "17bx16e", 107_769_861_120),
        ("llama4", "17bx128e", 400_711_848_960),
        ("deepseek_v3", "16B", 15_706_484_224),
        ("deepseek_v3", "236B", 235_741_434_880),
        # what the published files hold in bf16 and float8, without the second copies of embedding and head
        ("deepseek_v3", "671B", 684_489_830_400 - 2 * 129_280 * 7_168),
    ],
)
def test_published_sizes(name: str, flavor: str, count: int) -> None:
    from titan_core.estimation.flops import count_parameters

    known = family(name)
    assert count_parameters(known.parameters(known.flavors[flavor])).total == count


def test_what_only_training_needs_is_not_in_use() -> None:
    from titan_core.estimation.flops import count_parameters

    known = family("deepseek_v3")
    sizes = known.in_use(known.flavors["671B"])
    # without the biases of scores, which are not trained
    assert count_parameters(known.parameters(sizes)).total == 671_026_419_200 - 58 * 256


def test_mixtures_in_odd_layers_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    from titan_core.runtime.errors import UsageError

    config = Llama4TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, moe_layers=[0, 2], intermediate_size_mlp=8,
    )  # fmt: skip
    Llama4ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"`moe_layers` is \[0, 2\], and titan computes mixtures in every n-th layer"):
        open_weights(str(tmp_path))
