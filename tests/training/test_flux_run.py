"""Runs of a flow model: exact resume on any ranks and workers, damaged pictures, stored encodings, a target loss."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.data.test_pictures import image, tar
from tests.models import flux_oracles
from tests.parity.test_flux_layouts import tiny
from tests.ranks import run_ranks
from tests.runs import losses
from titan_cli.main import run as titan
from titan_core.config.load import Resolved
from titan_core.config.schema import Encoder
from titan_core.jobs import encode_flux, plan, train, validate
from titan_core.parallel.data_parallel import shard_frozen
from titan_core.parallel.mesh import Layout, Mesh
from titan_core.runtime.errors import ConfigError, DataError
from titan_core.runtime.events import Event, Sampled, Validated, Warned
from titan_core.tasks.encoders import Place, Widths, load_encoders, load_text_encoders
from titan_core.training import images


def pictures(folder: Path, count: int = 12, broken: int | None = None) -> Path:
    colors = [(20 * n, 255 - 20 * n, 7 * n) for n in range(count)]
    members = {
        f"{n:03d}.{e}": c for n in range(count) for e, c in (("png", image(40, 36, colors[n])), ("txt", b"cap %d" % n))
    }
    if broken is not None:
        members[f"{broken:03d}.png"] = members[f"{broken:03d}.png"][:50]
    folder.mkdir(exist_ok=True)
    tar(folder / "a.tar", members)
    return folder


def saving(folder: Path, layout: dict[str, Any] | None = None, **changes: Any) -> Resolved:
    return tiny(folder, layout, **{"checkpoint__enable": True, "checkpoint__interval": 3, **changes})


@pytest.mark.parametrize(("layout", "changes"), [({}, {}), ({"dp": 2}, {}), ({}, {"data__num_workers": 2})])
def test_a_run_goes_on_exactly(layout: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    source = {"training__dataset_path": pictures(tmp_path / "data")}
    ranks = layout.get("dp", 1)
    whole = losses(saving(tmp_path / "whole", **source))
    assert len(whole) == 6
    first = losses(saving(tmp_path / "run", layout, **source, **changes), ranks, until=3)
    rest = losses(saving(tmp_path / "run", **source))
    assert first + rest == pytest.approx(whole, rel=1e-6)
    if not layout:
        assert first + rest == whole


def test_a_damaged_picture_is_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    said: list[Event] = []
    resolved = tiny(tmp_path / "run", training__dataset_path=pictures(tmp_path / "data", broken=4))
    result = train.run(resolved, listener=said.append)
    assert result.finished
    warnings = [event.text for event in said if isinstance(event, Warned)]
    assert len(warnings) == 1  # of four or so: the next is said at ten
    assert "is left out: not a readable image" in warnings[0]
    assert "a.tar, member 004.png" in warnings[0]
    found = losses(tiny(tmp_path / "two", {"dp": 2}, training__dataset_path=tmp_path / "data"), 2)
    alone = losses(tiny(tmp_path / "one", training__dataset_path=tmp_path / "data"))
    assert found == pytest.approx(alone, rel=1e-5)
    ones = tiny(tmp_path / "ones", training__dataset_path=tmp_path / "data", training__local_batch_size=1)
    assert losses(ones) == pytest.approx(alone, rel=1e-5)  # also where a batch is that picture alone
    small = {"training__dataset_path": pictures(tmp_path / "small"), "training__img_size": 64, "training__steps": 20}
    with pytest.raises(DataError, match="64 samples in a row cannot be used, the last: 40 x 36 pixels are less than"):
        train.run(tiny(tmp_path / "x", **small))


def test_stored_encodings_train_alike_without_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pictures(tmp_path / "data")
    changes = {"data__shuffle": False, "training__mixed_precision_param": "float32"}
    wanted = losses(tiny(tmp_path / "a", training__dataset_path=data, **changes))
    resolved = tiny(tmp_path / "b", training__dataset_path=data, **changes)
    made = encode_flux.run(resolved, str(tmp_path / "encoded"), per_file=5)
    assert (made.samples, made.files, made.kept, made.left_out) == (12, 3, 0, 0)
    (tmp_path / "encoded/samples-00002-of-00003.safetensors").unlink()
    with pytest.raises(DataError, match="1 of 3 files are not there"):
        train.run(tiny(tmp_path / "c", training__dataset_path=tmp_path / "encoded", **changes))
    assert encode_flux.run(resolved, str(tmp_path / "encoded"), per_file=5).kept == 2
    with pytest.raises(DataError, match="another encoding was begun here: per_file differ"):
        encode_flux.run(resolved, str(tmp_path / "encoded"), per_file=6)

    with pytest.raises(ConfigError, match=r"`training.img_size` is 64, and the samples are encoded with 32"):
        train.run(tiny(tmp_path / "d", training__dataset_path=tmp_path / "encoded", training__img_size=64))

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("an encoder was loaded")

    for name in ("load_autoencoder", "load_text_encoders"):
        monkeypatch.setattr(images, name, never)
    found = losses(tiny(tmp_path / "c", training__dataset_path=tmp_path / "encoded", **changes))
    assert found == pytest.approx(wanted, rel=2e-2)  # encodings are stored in bf16


def test_ranks_share_the_encoding(tmp_path: Path) -> None:
    from tests.ranks import run_ranks

    resolved = tiny(tmp_path / "b", training__dataset_path=pictures(tmp_path / "data", broken=7))
    one = encode_flux.run(resolved, str(tmp_path / "one"), per_file=3)
    two = run_ranks(encode_flux.run, 2, resolved, str(tmp_path / "two"))
    assert (one.samples, one.left_out) == (11, 1)
    assert [r.left_out for r in two] == [1, 1]
    run_ranks(_encode, 2, resolved, str(tmp_path / "three"))
    for file in (tmp_path / "one").glob("*.safetensors"):
        assert (tmp_path / "three" / file.name).read_bytes() == file.read_bytes(), file.name


def _encode(resolved: Resolved, out: str) -> None:
    encode_flux.run(resolved, out, per_file=3)


def test_validation_tells_times_apart_shows_images_and_stops_at_a_target(tmp_path: Path) -> None:
    said: list[Event] = []
    resolved = tiny(
        tmp_path, validation__enable=True, validation__freq=2, validation__all_timesteps=True,
        validation__target_loss=1000.0, checkpoint__enable=True, metrics__enable_tensorboard=True,
    )  # fmt: skip
    result = train.run(resolved, listener=said.append)
    assert (result.step, result.stopped_by, result.finished) == (1, "validation.target_loss", True)
    assert result.checkpoint is not None
    assert result.checkpoint.endswith("step-1")
    (validated,) = [event for event in said if isinstance(event, Validated)]
    assert len(validated.parts) == 8
    assert validated.loss == pytest.approx(sum(validated.parts.values()) / 8)
    assert validated.tokens == 8 * 20 * 16
    (shown,) = [event for event in said if isinstance(event, Sampled)]
    assert len(shown.paths) == len(shown.captions) == 3
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["parts"] for record in records if record["event"] == "validated"] == [dict(validated.parts)]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(next((tmp_path / "tb").iterdir())))
    log.Reload()
    assert log.Tags()["images"] == ["samples/0", "samples/1", "samples/2"]
    assert "validation_metrics/loss t=0.0625" in log.Tags()["scalars"]


def test_captions_are_left_out_as_often_as_asked(tmp_path: Path) -> None:
    for how, both in (("independent", 0.16), ("joint", 0.4)):
        draws = images.Draws(0, tiny(tmp_path, flow_matching__dropout=how).config.flow_matching, 0.4)
        first, second = draws.left_out(torch.arange(20000))
        assert first.float().mean().item() == pytest.approx(0.4, abs=0.02)
        assert second.float().mean().item() == pytest.approx(0.4, abs=0.02)
        assert (first & second).float().mean().item() == pytest.approx(both, abs=0.02)


def test_times_have_the_distribution_that_is_asked_for(tmp_path: Path) -> None:
    numbers = torch.arange(40000)
    uniform = images.Draws(0, tiny(tmp_path, flow_matching__timesteps="uniform").config.flow_matching, 0).times(
        numbers, 256
    )
    assert torch.histc(uniform, 10, 0, 1).div(len(numbers)).sub(0.1).abs().max() < 0.01
    config = tiny(tmp_path, flow_matching__timesteps="logit_normal", flow_matching__logit_mean=0.5).config.flow_matching
    logits = torch.logit(images.Draws(0, config, 0).times(numbers, 256))
    assert (logits.mean().item(), logits.std().item()) == pytest.approx((0.5, 1.0), abs=0.02)
    config = tiny(
        tmp_path, flow_matching__timesteps="uniform", flow_matching__resolution_shift=True
    ).config.flow_matching
    shifted = images.Draws(0, config, 0).times(numbers, 4096)
    e = 2.718281828**1.15
    assert (shifted - e * uniform / (1 + (e - 1) * uniform)).abs().max() < 1e-5


def test_a_dry_run_plans_without_data(tmp_path: Path) -> None:
    from tests.ranks import apart

    found = apart(plan.run, tiny(tmp_path, {"dp": 2, "tp": 2}), 4)
    assert found.tokens_per_step == 8 * 16
    assert found.flops_per_token == found.flops_per_token_causal
    assert found.ranks[0]["peak"] > found.ranks[0]["weights"] > 0


def test_the_command_takes_a_recipe_with_dashes_and_data_can_be_looked_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--training.steps", "1", "--training.local_batch_size", "2", "--lr_scheduler.warmup_steps", "0"]
    assert titan(["train", "flux-debug", "--run", str(tmp_path), "--validation.enable", "false", *words]) == 0
    assert f"titan generate flux --checkpoint {tmp_path} --prompt" in capsys.readouterr().err
    report, captions = validate.data(tiny(tmp_path))
    assert report.ok
    assert len(captions) == 4
    assert validate.checkpoint(str(tmp_path)).ok


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flux_oracles.save_pipeline(tmp_path_factory.mktemp("pipeline"))


def with_encoders(pipeline: Path) -> dict[str, Any]:
    named = dict.fromkeys(("encoder__t5_encoder", "encoder__clip_encoder", "encoder__autoencoder_path"), pipeline)
    sizes = {"model.args.in_channels": 16, "model.args.vector_dim": 20, "model.args.context_dim": 24}
    more = {"training__img_size": 16, "encoder__autoencoder_factor": 2, "training__steps": 3}
    return {**named, **more, **{key.replace(".", "__"): value for key, value in sizes.items()}}


def test_the_encoders_of_transformers_and_the_autoencoder_serve_a_run(pipeline: Path, tmp_path: Path) -> None:
    """The same losses with captions tokenized here or in workers, on two ranks, and from stored encodings."""
    data = pictures(tmp_path / "data")
    settings = {**with_encoders(pipeline), "training__dataset_path": data, "data__shuffle": False}
    alone = losses(tiny(tmp_path / "a", **settings))
    assert losses(tiny(tmp_path / "b", **settings, data__num_workers=2)) == alone
    assert losses(tiny(tmp_path / "c", {"dp": 2}, **settings), 2) == pytest.approx(alone, rel=1e-5)
    encode_flux.run(tiny(tmp_path / "d", **settings), str(tmp_path / "encoded"))
    stored = tiny(tmp_path / "d", **{**settings, "training__dataset_path": tmp_path / "encoded"})
    assert losses(stored) == pytest.approx(alone, rel=2e-2)


def sharded_and_whole(pipeline: Path) -> list[tuple[bool, float]]:
    """Return of each text encoder whether both forms give the same bits, and what share of the weights is here."""
    mesh = Mesh(Layout(dp_shard=2), "cpu", dist.get_rank())
    config = Encoder(*[str(pipeline)] * 3, max_t5_encoding_len=32)
    forms = [
        load_text_encoders(config, Widths(24, 20, 16), Place(torch.device("cpu"), torch.float32), shard=shard)
        for shard in (None, partial(shard_frozen, mesh=mesh))
    ]
    captions, found = ["a cat", "a red dog"][: 1 + dist.get_rank()], []  # texts differ in number, calls do not
    for whole, sharded in zip(*forms, strict=True):
        outputs = [encoder.encode(torch.from_numpy(encoder.tokenize(captions))) for encoder in (whole, sharded)]
        held = sum(p.to_local().numel() for p in sharded.model.parameters())
        found.append((torch.equal(*outputs), held / sum(p.numel() for p in whole.model.parameters())))
    return found


def test_text_encoders_over_ranks_give_the_same_bits_of_half_the_weights_each(pipeline: Path) -> None:
    for rank in run_ranks(sharded_and_whole, 2, pipeline):
        for same, share in rank:
            assert same
            assert share == pytest.approx(0.5, abs=0.05)  # odd rows are padded


def test_a_sharded_run_shards_its_text_encoders_and_validates_alike(pipeline: Path, tmp_path: Path) -> None:
    """Damaged pictures and a number of captions that ranks do not divide: all encode equally often all the same."""
    data = pictures(tmp_path / "data", broken=4)
    validation = {"enable": True, "dataset_path": data, "freq": 2, "steps": 3, "local_batch_size": 1}
    settings = {
        **with_encoders(pipeline),
        "training__dataset_path": data,
        "training__classifier_free_guidance_prob": 0.3,
    }
    settings |= {f"validation__{key}": value for key, value in validation.items()}
    wanted = losses(tiny(tmp_path / "ddp", {"rep": 2, "dp": 1}, **settings), 2)
    found = losses(tiny(tmp_path / "fsdp", {"dp": 2}, **settings), 2)
    assert found == pytest.approx(wanted, rel=1e-6)
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("ddp", "fsdp")
    ]
    validated, other = ([r["loss"] for r in some if r["event"] == "validated"] for some in records)
    assert len(validated) == 2
    assert other == pytest.approx(validated, rel=1e-6)
    names = [sorted(p.name for p in (tmp_path / name / "img").iterdir()) for name in ("ddp", "fsdp")]
    assert names[0] == names[1]


def test_what_the_encoders_give_is_what_diffusers_pipeline_encodes(pipeline: Path) -> None:
    from diffusers import FluxPipeline

    config = Encoder(*[str(pipeline)] * 3, max_t5_encoding_len=32, autoencoder_factor=2)
    found = load_encoders(config, Widths(24, 20, 16), torch.device("cpu")).texts(["a cat", ""])
    text, pooled, _ = FluxPipeline.from_pretrained(pipeline).encode_prompt(
        ["a cat", ""], prompt_2=None, max_sequence_length=32
    )
    assert (found[0] - text).abs().max() < 1e-5
    assert (found[1] - pooled).abs().max() < 1e-5


def test_test_mode_draws_the_encoders(pipeline: Path, tmp_path: Path) -> None:
    settings = {**with_encoders(pipeline), "training__dataset_path": pictures(tmp_path / "data")}
    found = losses(tiny(tmp_path / "a", **settings, training__test_mode=True))
    assert found != losses(tiny(tmp_path / "b", **settings))
    wrong = {**settings, "model__args__vector_dim": 21}
    with pytest.raises(DataError, match="gives 20 numbers, the model takes 21"):
        train.run(tiny(tmp_path / "c", **wrong))
    with pytest.raises(DataError, match="covers 2 pixels, not 4"):
        train.run(tiny(tmp_path / "d", **{**settings, "encoder__autoencoder_factor": 4, "training__img_size": 32}))
