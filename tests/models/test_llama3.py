"""Llama 3 against transformers' LlamaForCausalLM, and its declarations against itself."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from titan_core.declare.rope import RopeScaling
from titan_core.models import family
from titan_core.models.llama3.flavors import LlamaSizes
from titan_core.parallel.materialise import materialise

VOCAB, LENGTH = 64, 24
CASES = {
    "grouped queries": LlamaSizes(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=VOCAB),
    "one head each": LlamaSizes(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=48, vocab_size=VOCAB),
    "tied": LlamaSizes(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=VOCAB, tied=True),
    "unscaled": LlamaSizes(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=1, ffn_dim=48, vocab_size=VOCAB, rope_scaling=None
    ),
    "scaled in the blend": LlamaSizes(
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        ffn_dim=48,
        vocab_size=VOCAB,
        rope_scaling=RopeScaling(factor=4.0, original_max_seq_len=16),
    ),
}


def hugging_face(sizes: LlamaSizes) -> transformers.LlamaForCausalLM:
    scaling = sizes.rope_scaling
    rope = {"rope_type": "default", "rope_theta": sizes.rope_theta}
    if scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    options = {"rope_parameters": rope} if transformers.__version__ >= "5" else {}
    if not options:
        options = {"rope_theta": sizes.rope_theta, "rope_scaling": rope if scaling else None}
    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.dim,
        intermediate_size=sizes.ffn_dim,
        num_hidden_layers=sizes.n_layers,
        num_attention_heads=sizes.n_heads,
        num_key_value_heads=sizes.n_kv_heads,
        rms_norm_eps=sizes.norm_eps,
        max_position_embeddings=sizes.max_seq_len,
        tie_word_embeddings=sizes.tied,
        **options,
    )
    return transformers.LlamaForCausalLM(config).float()


def their_name(name: str) -> str:
    for ours, theirs in {
        "tok_embeddings": "model.embed_tokens",
        "layers.": "model.layers.",
        "attention.w": "self_attn.w",
        ".wq": ".q_proj",
        ".wk": ".k_proj",
        ".wv": ".v_proj",
        ".wo": ".o_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }.items():
        name = name.replace(ours, theirs)
    return {"norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}.get(name, name)


def to_theirs(name: str, tensor: torch.Tensor, sizes: LlamaSizes) -> torch.Tensor:
    """Their rotary embedding pairs the halves of a head, ours its neighbours."""
    if name.endswith(("wq.weight", "wk.weight")):
        heads = sizes.n_heads if "wq" in name else sizes.n_kv_heads
        return tensor.view(heads, -1, 2, sizes.dim).transpose(1, 2).reshape(tensor.shape)
    return tensor


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    sizes = CASES[name]
    llama = family("llama3")
    with torch.device("meta"):
        ours = llama.build(sizes)
    materialise(ours, llama.parameters(sizes), 0, torch.device("cpu"))
    theirs = hugging_face(sizes)
    mapped = {their_name(n): to_theirs(n, p.detach(), sizes) for n, p in ours.named_parameters()}
    missing, unexpected = theirs.load_state_dict(mapped, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}

    tokens = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    our_logits, their_logits = ours(tokens), theirs(tokens).logits
    assert torch.allclose(our_logits, their_logits, rtol=1e-5, atol=1e-5)

    labels = tokens.roll(-1, 1)
    for logits in (our_logits, their_logits):
        F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    gradients = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        expected = gradients[their_name(parameter_name)].grad
        found = to_theirs(parameter_name, parameter.grad, sizes)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6), parameter_name


@pytest.mark.parametrize("flavor", family("llama3").flavors)
def test_declared_parameters_are_those_of_the_module(flavor: str) -> None:
    llama = family("llama3")
    sizes = llama.flavors[flavor]
    with torch.device("meta"):
        model = llama.build(sizes)
    declared = [(p.name, p.shape) for p in llama.parameters(sizes) if p.tied_to is None]
    assert declared == [(name, tuple(p.shape)) for name, p in model.named_parameters()]


def test_fresh_model_predicts_uniformly() -> None:
    """The published init gives logits of deviation 1, so a loss of about ln V + 1/2."""
    llama = family("llama3")
    sizes = llama.flavors["debugmodel"]
    with torch.device("meta"):
        model = llama.build(sizes)
    materialise(model, llama.parameters(sizes), 0, torch.device("cpu"))
    tokens = torch.randint(2048, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens)
    assert logits.std().item() == pytest.approx(1.0, abs=0.05)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten()).item()
    assert loss == pytest.approx(8.07, abs=0.1)
