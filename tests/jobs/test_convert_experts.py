"""Mixtures of experts in and out: every expert in its place, and DeepSeek's float8 with block scales."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import titan_core
from tests.interop.samples import assert_same, deepseek_v3, hf_tensors, step_tensors
from tests.jobs.test_convert import reference_dequantise
from titan_core.jobs import convert
from titan_core.jobs.convert import Options

TOKENS = torch.randint(0, 67, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("experts", [16, 64, 256])
def test_experts_come_in_the_order_of_their_numbers(experts: int, tmp_path: Path) -> None:
    groups = {"n_routed_experts": experts, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
    model = deepseek_v3(num_hidden_layers=2, moe_intermediate_size=4, **groups)
    with torch.no_grad():
        numbers = torch.arange(float(experts))[:, None, None]
        model.model.layers[1].mlp.experts.down_proj.copy_(numbers.expand(-1, 36, 4))
        model.model.layers[1].mlp.gate.weight.copy_(numbers[:, :, 0].expand(-1, 36))
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    convert.run("hf-to-dcp", str(tmp_path / "hf"), str(tmp_path / "dcp"))
    ours = step_tensors(tmp_path / "dcp")
    assert ours["layers.1.moe.experts.w2.weight"][:, 0, 0].tolist() == list(range(experts))
    assert ours["layers.1.moe.router.gate.weight"][:, 0].tolist() == list(range(experts))
    convert.run("dcp-to-hf", str(tmp_path / "dcp"), str(tmp_path / "back"))
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(tmp_path / "hf"))


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 as it is published: projections in float8 with scales, the rest in bf16, one more layer."""
    folder = tmp_path_factory.mktemp("scaled")
    wide = {"hidden_size": 288, "intermediate_size": 144, "moe_intermediate_size": 136, "num_hidden_layers": 2}
    deepseek_v3(**wide, n_routed_experts=4, n_group=1, topk_group=1).bfloat16().save_pretrained(folder / "plain")
    stored, generator = {}, torch.Generator().manual_seed(3)
    for name, tensor in hf_tensors(folder / "plain").items():
        stored[name] = tensor
        if "_proj" in name:
            scale = torch.rand([-(-n // 128) for n in tensor.shape], generator=generator) * 0.01
            wide_scale = scale.repeat_interleave(128, 0)[: tensor.shape[0]].repeat_interleave(128, 1)
            stored[name] = (tensor.float() / wide_scale[:, : tensor.shape[1]]).clamp(-448, 448).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
    after = {n.replace("layers.1.", "layers.2."): t.clone() for n, t in stored.items() if "layers.1." in n}
    stored |= after | {
        "model.layers.2.eh_proj.weight": torch.ones(288, 576).bfloat16(),
        "model.layers.2.shared_head.head.weight": stored["lm_head.weight"].clone(),
        "model.layers.2.embed_tokens.weight": stored["model.embed_tokens.weight"].clone(),
        **{f"model.layers.2.{n}.weight": torch.ones(288).bfloat16() for n in ("enorm", "hnorm", "shared_head.norm")},
    }
    (folder / "fp8").mkdir()
    save_file(stored, folder / "fp8/model.safetensors")
    config = json.loads((folder / "plain/config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "fp8/config.json").write_text(json.dumps(config))
    return folder


def test_deepseek_with_block_scales_is_read_by_the_published_formula(scaled: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert.run("hf-to-dcp", str(scaled / "fp8"), str(tmp_path / "dcp"), Options(memory=1 << 20))
    stored = hf_tensors(scaled / "fp8")
    wanted = {
        name: reference_dequantise(stored[name], stored[f"{name}_scale_inv"])
        if f"{name}_scale_inv" in stored
        else stored[name]
        for name in stored
        if not name.endswith("_scale_inv")
    }
    convert.run("dcp-to-hf", str(tmp_path / "dcp"), str(tmp_path / "plain"))
    assert_same(hf_tensors(tmp_path / "plain"), wanted)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(TOKENS).logits
        gap = (titan_core.load(str(tmp_path / "dcp"), dtype=torch.float32)(TOKENS) - logits).abs().max()
    assert gap <= 1e-5 * max(1.0, logits.abs().max().item())


def test_block_scales_are_written_again(scaled: Path, tmp_path: Path) -> None:
    convert.run("hf-to-dcp", str(scaled / "fp8"), str(tmp_path / "dcp"))
    convert.run("dcp-to-hf", str(tmp_path / "dcp"), str(tmp_path / "fp8"), Options(dtype="fp8-block"))
    stored = hf_tensors(tmp_path / "fp8")
    scales = {n for n in stored if n.endswith("_scale_inv")}
    assert scales == {n for n in hf_tensors(scaled / "fp8") if n.endswith("_scale_inv")}
    convert.run("dcp-to-hf", str(tmp_path / "dcp"), str(tmp_path / "plain"))
    plain = hf_tensors(tmp_path / "plain")
    for scale in scales:
        name = scale.removesuffix("_scale_inv")
        gap = (reference_dequantise(stored[name], stored[scale]).float() - plain[name].float()).abs().max()
        assert gap <= plain[name].float().abs().max() * (16 / 448 + 2**-8)  # half a step of e4m3, and of bf16
