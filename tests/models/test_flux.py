"""Flux and its autoencoder against diffusers: numbers, gradients, weights in and out, and what stays fp32."""

import json
from pathlib import Path

import pytest
import torch

from tests.interop.samples import assert_same, hf_tensors, step_tensors, tensors
from tests.interop.test_mapping import Memory
from tests.models import flux_oracles
from titan_core.estimation.flops import count_parameters
from titan_core.interop.loading import fill
from titan_core.interop.views import OurView
from titan_core.jobs import convert
from titan_core.jobs.foreign import open_weights
from titan_core.models import family
from titan_core.models.flux import model as flux_model
from titan_core.nn.latents import coordinates
from titan_core.runtime.errors import CheckpointError, UsageError

ORACLES = {"flux": flux_oracles.transformer, "flux_autoencoder": flux_oracles.autoencoder}


def ours_of(folder: Path) -> torch.nn.Module:
    opened = open_weights(str(folder))
    model = opened.known_family().build(opened.sizes)
    fill(opened.ours, dict(model.named_parameters()))
    return model


@pytest.mark.parametrize("guided", [True, False])
def test_forward_and_gradients_equal_diffusers(guided: bool, tmp_path: Path) -> None:
    theirs = flux_oracles.transformer(guidance_embeds=guided)
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tmp_path)
    generator = torch.Generator().manual_seed(1)
    img, txt, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 12, 16), (2, 5, 24), (2, 20)))
    t, guidance = torch.tensor([0.3, 0.97]), torch.tensor([3.5, 1.0]) if guided else None
    ids = coordinates(4, 3, 5)
    found = ours(img, txt, pooled, t, ids, guidance)
    wanted = theirs(
        hidden_states=img, encoder_hidden_states=txt, pooled_projections=pooled, timestep=t, guidance=guidance,
        txt_ids=ids[0].float(), img_ids=ids[1].float(),
    ).sample  # fmt: skip
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)
    found.square().sum().backward()
    wanted.square().sum().backward()
    mapping = open_weights(str(tmp_path)).mapping
    assert mapping is not None
    slopes = tensors(OurView(Memory({n: p.grad for n, p in theirs.named_parameters()}), mapping))
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        gap = (parameter.grad - slopes[name]).abs().max()
        assert gap <= 1e-5 * slopes[name].abs().max().clamp(min=1e-2), name


def test_autoencoder_equals_diffusers(tmp_path: Path) -> None:
    theirs = flux_oracles.autoencoder()
    theirs.save_pretrained(tmp_path)
    ours = ours_of(tmp_path)
    generator = torch.Generator().manual_seed(2)
    pixels, latents = torch.randn(2, 3, 16, 24, generator=generator), torch.randn(2, 4, 8, 12, generator=generator)
    with torch.no_grad():
        wanted = theirs.encode(pixels).latent_dist
        mean, deviation = ours.moments(pixels)  # pyright: ignore[reportCallIssue]
        assert (mean - wanted.mean).abs().max() <= 1e-5
        assert (deviation - wanted.std).abs().max() <= 1e-5
        decoded = ours.decode(latents)  # pyright: ignore[reportCallIssue]
        assert (decoded - theirs.decode(latents / 0.3611 + 0.1159).sample).abs().max() <= 1e-5
        assert torch.equal(ours.scaled(torch.full((1,), 0.1159)), torch.zeros(1))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("name", ORACLES)
def test_weights_go_round_bit_for_bit(name: str, tmp_path: Path) -> None:
    """diffusers -> titan -> one file -> titan -> diffusers, in several shards."""
    theirs = ORACLES[name]()
    theirs.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    convert.run("hf-to-dcp", str(tmp_path / "a"), str(tmp_path / "b"))
    convert.run("dcp-to-bfl", str(tmp_path / "b"), str(tmp_path / "one.safetensors"))
    convert.run("bfl-to-dcp", str(tmp_path / "one.safetensors"), str(tmp_path / "c"))
    assert_same(step_tensors(tmp_path / "c"), step_tensors(tmp_path / "b"))
    convert.run("dcp-to-hf", str(tmp_path / "c"), str(tmp_path / "d"), convert.Options(max_shard=100_000))
    assert (tmp_path / "d/diffusion_pytorch_model.safetensors.index.json").exists()
    assert_same(hf_tensors(tmp_path / "d"), hf_tensors(tmp_path / "a"))
    loaded = type(theirs).from_pretrained(tmp_path / "d")
    assert_same(dict(loaded.state_dict()), dict(theirs.state_dict()))
    assert "library_name: diffusers" in (tmp_path / "d/README.md").read_text()


def test_names_of_single_files_are_those_that_are_published() -> None:
    """Names and shapes of flux1-dev.safetensors and ae.safetensors, from their headers."""
    from titan_core.interop.mapping import work_out

    flux, autoencoder = family("flux"), family("flux_autoencoder")
    dev = work_out(flux.weights.single.rules(flux.flavors["flux-dev"]), flux.parameters(flux.flavors["flux-dev"]))
    shapes = dev.their_shapes
    assert len(shapes) == 780
    assert shapes["double_blocks.18.img_attn.qkv.weight"] == (9216, 3072)
    assert shapes["single_blocks.37.linear1.weight"] == (21504, 3072)
    assert shapes["single_blocks.0.linear2.weight"] == (3072, 15360)
    assert shapes["single_blocks.0.modulation.lin.bias"] == (9216,)
    assert shapes["double_blocks.0.txt_attn.norm.key_norm.scale"] == (128,)
    assert shapes["final_layer.adaLN_modulation.1.weight"] == (6144, 3072)
    assert flux.weights.single.read_shapes(shapes) == flux.flavors["flux-dev"]
    sizes = autoencoder.flavors["flux"]
    shapes = work_out(autoencoder.weights.single.rules(sizes), autoencoder.parameters(sizes)).their_shapes
    assert len(shapes) == 244
    assert shapes["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["encoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["encoder.down.2.downsample.conv.bias"] == (512,)
    assert autoencoder.weights.single.read_shapes(shapes) == sizes


@pytest.mark.parametrize(
    ("flavor", "count"),
    [("flux-dev", 11_901_408_320), ("flux-schnell", 11_891_178_560), ("flux-debug", 258_286_144)],
)
def test_published_sizes(flavor: str, count: int) -> None:
    flux = family("flux")
    assert count_parameters(flux.parameters(flux.flavors[flavor])).total == count
    autoencoder = family("flux_autoencoder")
    assert count_parameters(autoencoder.parameters(autoencoder.flavors["flux"])).total == 83_819_683


def test_times_and_angles_are_fp32_in_a_bf16_model(monkeypatch: pytest.MonkeyPatch) -> None:
    flux = family("flux")
    sizes = flux.sizes("debugmodel", n_double=1, n_single=1)
    model = flux.build(sizes).to(torch.bfloat16)
    seen: list[torch.Tensor] = []
    real = flux_model.ops.rotate_pairs
    monkeypatch.setattr(flux_model.ops, "rotate_pairs", lambda x, cos, sin: seen.append(cos) or real(x, cos, sin))
    t = torch.tensor([0.123456], dtype=torch.float32)
    assert flux_model.wave_embedding(t).dtype == torch.float32
    model(*(torch.zeros(1, n, w, dtype=torch.bfloat16) for n, w in ((4, 192), (3, 128))),
          torch.zeros(1, 128, dtype=torch.bfloat16), t, coordinates(2, 2, 3))  # fmt: skip
    assert seen
    assert {x.dtype for x in seen} == {torch.float32}


def test_what_is_not_flux_is_refused(tmp_path: Path) -> None:
    theirs = flux_oracles.transformer()
    theirs.save_pretrained(tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer/config.json").read_text())
    (tmp_path / "transformer/config.json").write_text(json.dumps({**config, "patch_size": 2}))
    with pytest.raises(UsageError, match="`patch_size` is 2, and titan computes 1 only"):
        open_weights(str(tmp_path / "transformer"))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a pipeline of diffusers, whose parts are in transformer"):
        open_weights(str(tmp_path))
