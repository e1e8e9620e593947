"""Multi-token prediction of DeepSeek-V3 against transformers: logits, loss, gradients, and weights both ways."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import titan_core
from tests.interop.samples import assert_same, hf_tensors
from tests.interop.test_mapping import Memory
from titan_core.data.loader import Batch
from titan_core.interop.mapping import work_out
from titan_core.interop.views import TheirView
from titan_core.jobs import convert
from titan_core.jobs.convert import Options
from titan_core.jobs.foreign import check_copies, open_weights
from titan_core.models import family
from titan_core.runtime.errors import CheckpointError, UsageError
from titan_core.tasks.causal_lm import CausalLM, ahead

DEEPSEEK = family("deepseek_v3")
SIZES = dataclasses.replace(
    DEEPSEEK.flavors["671B"],
    dim=36, n_layers=2, n_dense_layers=1, n_heads=6, q_lora_rank=14, kv_lora_rank=10, qk_nope_dim=6, qk_rope_dim=8,
    v_dim=7, ffn_dim=50, vocab_size=67, num_experts=8, top_k=3, expert_dim=12, num_groups=4, top_groups=2,
    max_seq_len=512, rope_scaling=None, num_mtp_layers=2,
)  # fmt: skip
TOKENS = torch.randint(0, 67, (2, 24), generator=torch.Generator().manual_seed(2))
LABELS = torch.cat((TOKENS[:, 1:], torch.full((2, 1), -100)), 1)
ONE_DOCUMENT = torch.zeros(2, 24, dtype=torch.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the names of DeepSeek's own."""
    generator = torch.Generator().manual_seed(0)
    ours = {p.name: 0.3 * torch.randn(p.shape, generator=generator) for p in _declared(SIZES)}
    assert DEEPSEEK.weights is not None
    view = TheirView(Memory(ours), work_out(DEEPSEEK.weights.rules(SIZES), DEEPSEEK.parameters(SIZES)))
    tensors = {name: view.read(name, (0,) * len(shape), shape).clone() for name, (shape, _) in view.index.items()}
    path = tmp_path_factory.mktemp("deepseek")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = {**DEEPSEEK.weights.write_config(SIZES), "torch_dtype": "float32"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def _declared(sizes: Any) -> list[Any]:
    return [p for p in DEEPSEEK.parameters(sizes) if p.tied_to is None]


class Theirs(nn.Module):
    """transformers' model with its module of multi-token prediction."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import DeepseekV3ForCausalLM
        from transformers.modeling_layers import MtpModel

        self.main = DeepseekV3ForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        self.main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[23].*"]  # else 61, as the published model's
        self.mtp: Any = MtpModel.from_pretrained(self.main).eval()

    def forward(self, tokens_BT: Tensor) -> list[Tensor]:
        """Return the logits of the next token, and of those one and two places further."""
        from transformers.cache_utils import MtpCache

        hidden = self.main.model(tokens_BT).last_hidden_state
        logits = [self.main.lm_head(hidden)]
        cache = MtpCache(config=self.main.config.get_mtp_config())
        told = tokens_BT
        for layer in range(2):
            told, hidden = told[:, 1:], hidden[:, :-1]
            positions = torch.arange(told.shape[1])[None] + layer + 1
            hidden = self.mtp.forward_layer(layer, hidden, positions, cache, input_ids=told)
            logits.append(self.main.lm_head(hidden))
        return logits


def ours_with_mtp(folder: Path) -> nn.Module:
    """All of the model: `load` leaves out what only training needs."""
    from titan_core.interop.loading import fill
    from titan_core.parallel.materialise import stored_buffers

    model = DEEPSEEK.build(SIZES)
    opened = open_weights(str(folder))
    assert opened.sizes == SIZES
    check_copies(opened)
    fill(opened.ours, dict(model.named_parameters()) | stored_buffers(model))
    return model.eval()


def test_logits_losses_and_gradients_equal_transformers(folder: Path) -> None:
    theirs, ours = Theirs(folder), ours_with_mtp(folder)
    wanted = theirs(TOKENS)
    told, targets = ahead(TOKENS, LABELS, ONE_DOCUMENT, 2)
    positions = torch.arange(24)
    hidden = ours.hidden(TOKENS, positions)  # pyright: ignore[reportCallIssue]
    for layer in range(3):
        if layer:
            task = CausalLM(ours, document_masks=False)
            mask = task.mask(Batch(TOKENS, LABELS, ONE_DOCUMENT))
            hidden = ours.ahead(layer - 1, hidden, told[..., layer - 1], positions, mask)  # pyright: ignore[reportCallIssue]
        logits = (hidden @ ours.head_weight.T)[:, : wanted[layer].shape[1]]  # pyright: ignore[reportAttributeAccessIssue]
        assert (logits - wanted[layer]).abs().max() <= 1e-5 * max(1.0, wanted[layer].abs().max().item())

    task = CausalLM(ours, document_masks=False)
    task.look_ahead(2, 0.3)
    batch = Batch(TOKENS, LABELS, ONE_DOCUMENT, tokens_ahead=told, labels_ahead=targets)
    means = task(batch) / task.weight(batch)
    expected = torch.stack(
        [F.cross_entropy(x[:, : 23 - k].flatten(0, 1), TOKENS[:, k + 1 :].flatten()) for k, x in enumerate(wanted)]
    )
    assert task.weight(batch).tolist() == [2 * 23, 2 * 22, 2 * 21]
    assert torch.allclose(means, expected, rtol=1e-5)

    factors = torch.tensor([1.0, 0.15, 0.15])
    assert list(task.factors.values()) == pytest.approx(factors.tolist())
    (means @ factors).backward()
    (expected @ factors).backward()
    pairs = {
        "mtp.0.proj": theirs.mtp.layers[0].eh_proj,
        "mtp.1.hidden_norm": theirs.mtp.layers[1].hnorm,
        "mtp.1.norm": theirs.mtp.layers[1].post_norm,
        "mtp.0.block.attention.wkv_b": theirs.mtp.layers[0].mtp_block.self_attn.kv_b_proj,
        "mtp.1.block.moe.router.gate": theirs.mtp.layers[1].mtp_block.mlp.gate,
        "mtp.1.block.moe.shared_experts.w2": theirs.mtp.layers[1].mtp_block.mlp.shared_experts.down_proj,
        "tok_embeddings": theirs.main.model.embed_tokens,
        "output": theirs.main.lm_head,
        "norm": theirs.main.model.norm,
        "layers.0.attention.wo": theirs.main.model.layers[0].self_attn.o_proj,
    }
    for name, module in pairs.items():
        found, slope = ours.get_submodule(name).weight.grad, module.weight.grad
        assert isinstance(found, Tensor)
        assert (found - slope).abs().max() <= 1e-5 * max(slope.abs().max().item(), 1e-2), name


def test_weights_go_in_and_come_out_exact(folder: Path, tmp_path: Path) -> None:
    convert.run("hf-to-dcp", str(folder), str(tmp_path / "dcp"))
    convert.run("dcp-to-hf", str(tmp_path / "dcp"), str(tmp_path / "hf"))
    assert_same(hf_tensors(tmp_path / "hf"), hf_tensors(folder))
    assert "model.layers.3.shared_head.head.weight" in hf_tensors(folder)
    assert (tmp_path / "hf/config.json").read_bytes() == (folder / "config.json").read_bytes()
    # used, not trained: the same logits from each format, and no layer more than that takes
    loaded = [titan_core.load(str(path)) for path in (folder, tmp_path / "dcp")]
    assert torch.equal(loaded[0](TOKENS), loaded[1](TOKENS))
    assert not any(name.startswith("mtp.") for name, _ in loaded[0].named_parameters())


def test_block_scaled_float8_comes_in(folder: Path, tmp_path: Path) -> None:
    convert.run("hf-to-dcp", str(folder), str(tmp_path / "dcp"))
    convert.run("dcp-to-hf", str(tmp_path / "dcp"), str(tmp_path / "fp8"), Options(dtype="fp8-block"))
    stored = hf_tensors(tmp_path / "fp8")
    name = "model.layers.2.self_attn.o_proj.weight"
    assert stored[name].dtype == torch.float8_e4m3fn
    assert stored["model.layers.2.eh_proj.weight"].dtype == torch.float32  # as DeepSeek stores it
    opened = open_weights(str(tmp_path / "fp8"))
    found = opened.ours.read("mtp.0.block.attention.wo.weight", (0, 0), tuple(stored[name].shape)).float()
    assert found == pytest.approx(stored[name].float() * stored[f"{name}_scale_inv"], rel=2**-8)
    assert "model.layers.2.embed_tokens.weight_scale_inv" not in stored


def test_a_copy_of_the_embedding_that_differs_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = hf_tensors(folder)
    tensors["model.layers.2.embed_tokens.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"`model.layers.2.embed_tokens.weight` should hold the same numbers as"):
        convert.run("hf-to-dcp", str(tmp_path), str(tmp_path / "dcp"))


def test_folders_without_the_layers_and_models_without_them(folder: Path, tmp_path: Path) -> None:
    """transformers saves a model without the layers that its config names; and a config may name none."""
    tensors, config = hf_tensors(folder), json.loads((folder / "config.json").read_text())
    for path, left_out, named in (("saved", ("2", "3"), 2), ("unnamed", ("3",), 0)):
        (tmp_path / path).mkdir()
        left = {name: tensor for name, tensor in tensors.items() if not any(f".layers.{n}." in name for n in left_out)}
        save_file(left, tmp_path / path / "model.safetensors")
        (tmp_path / path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": named}))
        opened = open_weights(str(tmp_path / path))
        assert opened.sizes == dataclasses.replace(SIZES, num_mtp_layers=0)
        assert set(opened.ours.index) == {p.name for p in _declared(opened.sizes)}
    assert DEEPSEEK.weights is not None
    with pytest.raises(UsageError, match="DeepSeek-V2 has no num_mtp_layers 1"):
        DEEPSEEK.weights.write_config(dataclasses.replace(DEEPSEEK.flavors["16B"], num_mtp_layers=1))


def test_what_layers_are_told_and_should_predict() -> None:
    tokens = torch.tensor([[10, 11, 12, 13, 20, 21, 30, 0]])
    labels = torch.tensor([[11, 12, 13, 20, 21, 30, -100, -100]])
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 2, -1]])
    told, wanted = ahead(tokens, labels, documents, 2)
    assert told[0, :, 0].tolist() == [11, 12, 13, 13, 21, 21, 30, 0]  # at the end of a document, the token itself
    assert wanted[0, :, 0].tolist() == [12, 13, -100, -100, -100, -100, -100, -100]
    assert told[0, :, 1].tolist() == [12, 13, 12, 13, 20, 21, 30, 0]
    assert wanted[0, :, 1].tolist() == [13, -100, -100, -100, -100, -100, -100, -100]
    ignored = labels.where(labels != 12, -100)
    assert ahead(tokens, ignored, documents, 1)[1][0, :, 0].tolist() == [-100, 13, *[-100] * 6]
