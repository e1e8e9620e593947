"""Drawing images against diffusers: times, a whole run of the sampler, and what `titan generate flux` promises."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import flux_oracles
from tests.ranks import run_ranks
from titan_cli.main import run as titan
from titan_core.generation.images import Drawer, Recipe
from titan_core.jobs import generate_flux, train
from titan_core.nn import flow
from titan_core.nn.latents import pack, unpack
from titan_core.runtime.errors import CheckpointError, DataError, MachineError
from titan_core.tasks.encoders import Blocks, Place

CPU = Place(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("pixels", [256, 512, 1024])
@pytest.mark.parametrize("steps", [4, 28])
def test_times_are_those_of_diffusers_scheduler(pixels: int, steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    rows = (pixels // 16) ** 2
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(rows))
    assert flow.shift_of(rows) == pytest.approx({256: 0.5, 512: 0.63, 1024: 1.15}[pixels], abs=2e-3)
    assert (flow.schedule(steps, flow.shift_of(rows)) - scheduler.sigmas).abs().max() < 1e-6
    plain = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False)
    plain.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    assert (flow.schedule(steps, None) - plain.sigmas).abs().max() < 1e-6


def test_latents_are_packed_as_diffusers_does() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 6, 10)
    theirs = FluxPipeline._pack_latents(latents, 2, 4, 6, 10)
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(theirs, 6, 10), latents)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_oracles.save_pipeline(tmp_path_factory.mktemp("pipeline"))


def test_a_whole_run_of_the_sampler_equals_diffusers(pipeline: Path) -> None:
    """Four steps from the same noise, guided, from texts to pixels; every part with the weights of the folder."""
    from diffusers import FluxPipeline

    theirs = FluxPipeline.from_pretrained(pipeline)
    theirs.set_progress_bar_config(disable=True)
    source = generate_flux.open_flux(str(pipeline), {})
    options = generate_flux.Options(size=(24, 16), steps=4, guidance=2.5)
    recipe = generate_flux.recipe_of(source, options)
    assert recipe == Recipe(24, 16, 4, 2.5, None, True)
    from titan_core.tasks.encoders import Widths, load_encoders

    encoders = load_encoders(source.encoder, Widths.of(source.sizes), CPU.device)
    drawer = Drawer(source.model(CPU, compiled=False), source.sizes, encoders.autoencoder, CPU)
    noise = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0))
    rows = drawer.latents(encoders.texts(["a cat"]), None, noise, recipe)
    with torch.no_grad():
        wanted = theirs(
            "a cat", height=16, width=24, num_inference_steps=4, guidance_scale=2.5, latents=noise,
            max_sequence_length=512, output_type="latent",
        ).images  # fmt: skip
        pixels = theirs(
            "a cat", height=16, width=24, num_inference_steps=4, guidance_scale=2.5, latents=noise,
            max_sequence_length=512, output_type="np",
        ).images[0]  # fmt: skip
    assert (rows - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    found = drawer.decode(rows, recipe)[0].numpy()
    assert np.abs(found.astype(float) - pixels * 255).max() <= 0.51  # ours are rounded


def test_real_guidance_equals_diffusers(pipeline: Path) -> None:
    from diffusers import FluxPipeline

    from titan_core.tasks.encoders import Widths, load_encoders

    theirs = FluxPipeline.from_pretrained(pipeline)
    theirs.set_progress_bar_config(disable=True)
    source = generate_flux.open_flux(str(pipeline), {})
    recipe = generate_flux.recipe_of(source, generate_flux.Options(size=(16, 16), steps=2, real_guidance=4.0))
    encoders = load_encoders(source.encoder, Widths.of(source.sizes), CPU.device)
    drawer = Drawer(source.model(CPU, compiled=False), source.sizes, encoders.autoencoder, CPU)
    noise = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    rows = drawer.latents(encoders.texts(["a cat"]), encoders.texts([""]), noise, recipe)
    with torch.no_grad():
        wanted = theirs(
            "a cat", negative_prompt="", true_cfg_scale=4.0, height=16, width=16, num_inference_steps=2,
            guidance_scale=3.5, latents=noise, max_sequence_length=512, output_type="latent",
        ).images  # fmt: skip
    assert (rows - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_images_of_a_pipeline_and_of_a_single_file_are_the_same(pipeline: Path, tmp_path: Path) -> None:
    from titan_core.jobs import convert

    convert.run("hf-to-dcp", str(pipeline / "transformer"), str(tmp_path / "dcp"))
    convert.run("dcp-to-bfl", str(tmp_path / "dcp"), str(tmp_path / "flux.safetensors"))
    prompts, every = ["a cat", "a dog"], []
    for name, path in (("a", pipeline), ("b", tmp_path / "flux.safetensors"), ("c", tmp_path / "dcp")):
        named = dict.fromkeys(("t5_encoder", "clip_encoder", "autoencoder_path"), str(pipeline))
        options = generate_flux.Options(
            (16, 16), 2, num_images=2, seed=5, batch_size=3, out=str(tmp_path / name), sheet=False,
            encoders={} if name == "a" else {**named, "autoencoder_factor": 2},  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        result = generate_flux.run(str(path), prompts, options, device="cpu")
        assert [(image.prompt, image.seed) for image in result.images] == [(p, s) for p in prompts for s in (5, 6)]
        every.append([_pixels(Path(image.path)) for image in result.images])
    assert np.array_equal(every[0], every[1])
    assert np.array_equal(every[0], every[2])


def test_float8_draws_nearly_the_same_image_and_says_so(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    words = ["generate", "flux", "--checkpoint", str(pipeline), "--prompt", "a cat", "--size", "32x32", "--steps", "4"]
    found = {}
    for name, more in (("float32", []), ("float8", ["--quantize", "float8"])):
        assert titan([*words, *more, "--out", str(tmp_path / name), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        image = Image.open(tmp_path / name / "0000-00.png")
        said = json.loads(image.text["titan"])  # pyright: ignore[reportAttributeAccessIssue]
        assert said["quantize"] == told["recipe"]["quantize"] == (None if name == "float32" else "float8")
        found[name] = np.asarray(image).astype(float)
    assert found["float32"].std() > 20
    gap = np.abs(found["float8"] - found["float32"])
    assert 0 < gap.mean() < 0.03 * found["float32"].std()


def test_float8_holds_a_quarter_of_the_bytes_and_rounds_as_the_oracle(pipeline: Path) -> None:
    from tests.quantization import oracle
    from titan_core.quantization.stored import StoredFloat8

    source = generate_flux.open_flux(str(pipeline), {})
    plain, low = (source.model(CPU, compiled=False, float8=float8) for float8 in (False, True))
    stored = {name: module for name, module in low.named_modules() if isinstance(module, StoredFloat8)}
    assert len(stored) == 2 * 12 + 2 * 6  # of two double and two single blocks
    x, name = torch.randn(2, 5, 64), "single_blocks.1.mix.wq"
    weight, bias = (plain.get_parameter(f"{name}.{key}") for key in ("weight", "bias"))
    wanted = oracle.scaled(x.flatten(0, 1), oracle.E4M3, 1) @ oracle.scaled(weight, oracle.E4M3, 1).T + bias
    assert (stored[name](x).flatten(0, 1) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert stored[name].get_buffer("weight").element_size() * 4 == weight.element_size()
    left = dict(low.named_parameters())
    assert f"{name}.weight" not in left
    assert all(torch.equal(value, plain.get_parameter(key)) for key, value in left.items())


def test_a_gpu_without_float8_is_refused_before_anything_is_loaded(pipeline: Path, monkeypatch) -> None:
    from titan_core.quantization import stored

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    with pytest.raises(MachineError, match=r"compute capability 8\.9, and an A100 has 8.0") as caught:
        stored.check_device(torch.device("cuda"))
    assert caught.value.tip == "leave --quantize out"


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of titan of two steps."""
    from tests.parity.test_flux_layouts import tiny

    folder = tmp_path_factory.mktemp("run")
    changes = {"checkpoint.enable": True, "model.args.guidance": False, "training.steps": 2}
    train.run(tiny(folder, lr_scheduler__warmup_steps=1, **{k.replace(".", "__"): v for k, v in changes.items()}))
    return folder


def _draw(run: Path, out: Path, count: int) -> list[tuple[int, str]]:
    options = generate_flux.Options(steps=1, out=str(out), batch_size=2)
    result = generate_flux.run(str(run), [f"shape {n}" for n in range(count)], options, device="cpu")
    return [(image.number, Path(image.path).name) for image in result.images]


@pytest.mark.parametrize(("ranks", "count"), [(2, 3), (4, 1), (4, 6)])
def test_ranks_with_uneven_prompts_end_and_draw_what_one_would(
    ranks: int, count: int, trained: Path, tmp_path: Path
) -> None:
    _draw(trained, tmp_path / "one", count)
    everyone = run_ranks(_draw, ranks, trained, tmp_path / "many", count)
    assert all(found == [(n, f"{n:04d}-00.png") for n in range(count)] for found in everyone)
    for n in range(count):
        name = f"{n:04d}-00.png"
        assert np.array_equal(_pixels(tmp_path / "many" / name), _pixels(tmp_path / "one" / name))
    assert (tmp_path / "many/sheet.png").exists() == (count > 1)


def test_an_image_carries_its_recipe(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    words = [
        "generate",
        "flux",
        "--checkpoint",
        str(trained),
        "--prompt",
        "größe: rot",
        "--seed",
        "7",
        "--num-images",
    ]
    assert titan([*words, "2", "--steps", "2", "--out", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    assert [(image["seed"], image["prompt"]) for image in told["images"]] == [(7, words[5]), (8, words[5])]
    image = Image.open(tmp_path / "0000-01.png")
    assert image.size == (32, 32)
    assert image.text["prompt"] == "größe: rot"  # pyright: ignore[reportAttributeAccessIssue]
    said = json.loads(image.text["titan"])  # pyright: ignore[reportAttributeAccessIssue]
    assert (said["seed"], said["steps"], said["width"], said["real_guidance"]) == (8, 2, 32, 3.0)
    image.load()  # every checksum
    assert titan([*words, "1", "--steps", "2", "--out", str(tmp_path / "alone")]) == 0
    assert np.array_equal(_pixels(tmp_path / "alone/0000-00.png"), _pixels(tmp_path / "0000-00.png"))


def test_what_is_wrong_is_said(
    trained: Path, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    flux = ["generate", "flux", "--checkpoint"]
    for words, code, said in (
        ([*flux, str(trained), "--prompts", str(tmp_path / "empty.txt")], 2, "the file has no prompts"),
        ([*flux, str(trained)], 2, "there is no prompt"),
        ([*flux, str(trained), "--prompt", "a", "--size", "33x32"], 2, "multiples of 8 pixels"),
        ([*flux, str(trained), "--prompt", "a", "--size", "big"], 2, "`--size` cannot be `big`"),
        ([*flux, str(tmp_path), "--prompt", "a"], 1, "holds no complete checkpoint"),
        ([*flux, str(pipeline / "transformer"), "--prompt", "a"], 2, "nothing says where its encoders are"),
        ([*flux, str(pipeline / "transformer"), "--prompt", "a", "--encoders", str(tmp_path)], 1, "text encoder"),
        (["generate", "llm", "--checkpoint", str(trained), "--prompt", "a"], 2, "is a flux, not a language model"),
    ):
        assert titan(words) == code
        assert said in capsys.readouterr().err


def test_a_missing_encoder_is_named(trained: Path) -> None:
    options = generate_flux.Options(encoders={"t5_encoder": "/nowhere"})
    with pytest.raises(DataError, match="no T5 text encoder `/nowhere`"):
        generate_flux.run(str(trained), ["a"], options, device="cpu")
    options = generate_flux.Options(encoders={"autoencoder_path": "/nowhere"})
    with pytest.raises(CheckpointError, match="no autoencoder at `/nowhere`"):
        generate_flux.run(str(trained), ["a"], options, device="cpu")


def test_blocks_of_pixels_are_exact() -> None:
    blocks, pixels = Blocks(4), torch.rand(2, 3, 16, 8) * 2 - 1
    mean, deviation = blocks.moments(pixels)
    assert mean.shape == (2, 48, 4, 2)
    assert not deviation.any()
    assert torch.equal(blocks.decode(blocks.scaled(mean)), pixels)
