"""The layout never changes the result of a flow model: losses, gradients, validation; no samples share noise."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from tests.parity.layouts import Seen, assert_same, first_steps
from tests.parity.test_layouts import KEYS, ranks_of
from tests.ranks import apart, run_ranks
from titan_core.config.layout import Layout
from titan_core.config.load import Resolved, load
from titan_core.models import resolve
from titan_core.models.flux import model as flux_model
from titan_core.nn import attention as nn_attention
from titan_core.nn import rope
from titan_core.parallel import legal
from titan_core.runtime import distributed
from titan_core.runtime.events import silent
from titan_core.training.build import build
from titan_core.training.step import forward_backward
from titan_core.training.validate import Validator

TINY = {
    "model.args.dim": 32, "model.args.n_heads": 4, "model.args.axes_dim": "[2, 2, 4]", "model.args.n_double": 2,
    "model.args.n_single": 2, "model.args.in_channels": 192, "model.args.vector_dim": 8, "model.args.context_dim": 12,
    "model.args.zero_init": "false", "model.args.guidance": "true", "flow_matching.guidance": 3.5,
    "encoder.max_t5_encoding_len": 8, "training.img_size": 32, "training.local_batch_size": 8,
    "training.global_batch_size": 8, "training.mixed_precision_param": "float32", "training.max_norm": 0,
    "training.classifier_free_guidance_prob": 0.3, "flow_matching.dropout": "independent", "training.steps": 6,
    "lr_scheduler.warmup_steps": 2, "metrics.log_freq": 1, "checkpoint.enable": "false", "validation.enable": "false",
    "validation.local_batch_size": 4, "validation.steps": 5, "validation.denoising_steps": 2,
    "validation.save_img_count": 3, "optimizer.lr": 1e-2,
}  # fmt: skip
LAYOUTS = {
    "fsdp": {"dp": 2},
    "hsdp": {"rep": 2, "dp": 2},
    "ddp": {"rep": 2, "dp": 1},
    "simple fsdp": {"dp": 2, "backend": "simple"},
    "tensor": {"tp": 2},
    "tensor, whole stream": {"tp": 2, "sp": False},
    "tensor 4": {"tp": 4},
    "context": {"cp": 2},
    "context, ring": {"cp": 2, "cp_by": "alltoall"},
    "context, heads": {"cp": 2, "cp_by": "heads"},
    "fsdp x tensor": {"dp": 2, "tp": 2},
    "context x tensor": {"cp": 2, "tp": 2},
}


def tiny(folder: Path | str, layout: dict[str, Any] | None = None, **changes: Any) -> Resolved:
    layout = layout or {}
    replicas = layout.get("rep", 1) * layout.get("dp", 1)
    settings = {
        **TINY,
        "job.dump_folder": str(folder),
        "training.local_batch_size": 8 // replicas,
        **{f"parallelism.{KEYS[key]}": value for key, value in layout.items()},
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    words = [(key, str(value).lower() if isinstance(value, bool) else str(value)) for key, value in settings.items()]
    return load("flux_debug", words)


@cache
def alone() -> Seen:
    with TemporaryDirectory() as folder:
        return first_steps(tiny(folder), 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_one_process(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    assert_same(first_steps(tiny(tmp_path, layout), ranks_of(layout)), alone())


@pytest.mark.parametrize("layout", [{}, {"dp": 2, "tp": 2}])
def test_accumulation_and_recomputation_equal_one_batch(layout: dict[str, Any], tmp_path: Path) -> None:
    changes = {"training__local_batch_size": 2, "activation_checkpoint__mode": "full"}
    assert_same(first_steps(tiny(tmp_path, layout, **changes), ranks_of(layout)), alone())


def _validated(resolved: Resolved) -> tuple[float, dict[str, float], list[bytes]]:
    parts = build(resolved.config, distributed.start(), silent)
    seen: list[Any] = []
    validator = Validator(parts, seen.append)
    found = validator.run(1, lambda: None)
    validator.show(1)
    assert not isinstance(found, str)
    parts.loader.close()
    images = sorted((Path(resolved.config.job.dump_folder) / "img").glob("*.png"))
    return found.loss, dict(found.parts), [path.read_bytes() for path in images]


@pytest.mark.parametrize("name", ["fsdp", "tensor", "context", "fsdp x tensor"])
def test_validation_is_the_same_on_every_layout(name: str, tmp_path: Path) -> None:
    loss, parts, images = _validated(tiny(tmp_path / "one"))
    assert len(parts) == 8
    assert loss == pytest.approx(sum(parts.values()) / 8, rel=0.05)  # 20 samples: two or three at each time
    assert _validated(tiny(tmp_path / "again"))[:2] == (loss, parts)
    layout = LAYOUTS[name]
    ranks = run_ranks(_validated, ranks_of(layout), tiny(tmp_path / "many", layout))
    for found, more, _ in ranks:
        assert found == pytest.approx(loss, rel=1e-6)
        assert more == pytest.approx(parts, rel=1e-6)
    assert len(images) == 3
    assert [len(image) for image in ranks[0][2]] == [len(image) for image in images]


def _noise(resolved: Resolved) -> tuple[torch.Tensor, torch.Tensor]:
    parts = build(resolved.config, distributed.start(), silent)
    batch = next(parts.loader)
    prepared = parts.kind.prepare(batch)
    parts.loader.close()
    return prepared.target_BIL.flatten(1), prepared.t_B


def test_no_two_samples_share_noise_or_time(tmp_path: Path) -> None:
    """Also not those of replicas in HSDP, which hold the same shards."""
    found = run_ranks(_noise, 4, tiny(tmp_path, {"rep": 2, "dp": 2}))
    noise, times = (torch.cat(parts) for parts in zip(*found, strict=True))
    assert len(noise.unique(dim=0)) == len(times.unique()) == 8
    whole, all_times = _noise(tiny(tmp_path / "one"))
    assert torch.equal(whole, noise)
    assert torch.equal(all_times, times)


def test_what_cannot_be_split_is_refused_before_it_starts(tmp_path: Path) -> None:
    def said(layout: dict[str, Any], **changes: Any) -> list[str]:
        config = tiny(tmp_path, layout, **changes).config
        family, sizes = resolve(config.model)
        layout_ = Layout.of(config.parallelism, ranks_of(layout))
        return [problem.message for problem in legal.problems(config, layout_, family, sizes)]

    assert said({"tp": 2}) == []
    assert said({"pp": 2}) == ["flux is not cut into pipeline stages"]
    assert "`image rows` 25 is not a multiple of 2" in said({"cp": 2}, training__img_size=40)[0]
    assert "4 key/value heads do not divide over 8 ranks" in said({"tp": 8})[0]
    assert "`training.img_size` 36 is not a multiple of 8 pixels" in said({}, training__img_size=36)[0]
    assert "an image row is 48 numbers of the embedded autoencoder" in said({}, encoder__autoencoder_factor=2)[0]
    assert said({}, training__local_batch_size=3, model__converters="quantize.linear.float8") == [
        "24 text rows a microbatch, and quantize.linear.float8 needs a multiple of 16"
    ]


def _what_the_model_saw(resolved: Resolved) -> tuple[list[torch.Tensor], list[torch.dtype], list[torch.dtype]]:
    """Run one forward and backward; returns times, dtypes of angles, and dtypes of the inputs of attention."""
    times: list[torch.Tensor] = []
    angles: list[torch.dtype] = []
    queries: list[torch.dtype] = []
    waves, table, attend = flux_model.wave_embedding, rope.table, nn_attention.full_attention
    flux_model.wave_embedding = lambda t: times.append(t) or waves(t)
    rope.table = lambda *args: angles.extend(x.dtype for x in table(*args)) or table(*args)
    nn_attention.full_attention = lambda q, k, v: queries.append(q.dtype) or attend(q, k, v)
    try:
        first_steps_of(resolved)
    finally:
        flux_model.wave_embedding, rope.table, nn_attention.full_attention = waves, table, attend
    return times, angles, queries


def first_steps_of(resolved: Resolved) -> None:
    parts = build(resolved.config, distributed.start(), silent)
    forward_backward(parts, lambda: next(parts.loader))
    parts.loader.close()


@pytest.mark.parametrize("name", ["fsdp", "ddp", "simple fsdp", "tensor", "context"])
def test_times_and_angles_stay_fp32_under_every_wrapper(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    resolved = tiny(tmp_path, layout, training__mixed_precision_param="bfloat16", activation_checkpoint__mode="full")
    wanted = _noise(tiny(tmp_path))[1]
    for times, angles, queries in run_ranks(_what_the_model_saw, ranks_of(layout), resolved):
        assert {t.dtype for t in times} == {torch.float32}
        assert set(angles) == {torch.float32}
        assert set(queries) == {torch.bfloat16}
        assert all(t in wanted or t == 3.5 for one in times for t in one)  # bit for bit


def _compiled(resolved: Resolved) -> Seen:
    return first_steps(resolved, 1)


def test_compiled_blocks_equal_eager_ones(tmp_path: Path) -> None:
    changes = {"compile__enable": True, "compile__backend": "aot_eager", "activation_checkpoint__mode": "full"}
    assert_same(apart(_compiled, tiny(tmp_path, **changes)), alone())


def test_float8_takes_the_projections_and_leaves_conditions_alone(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    changes = {"model.converters": "quantize.linear.float8", "quantize.linear.float8.emulate": True}
    resolved = tiny(tmp_path, **{key.replace(".", "__"): value for key, value in changes.items()})
    said = lay_out_words(resolved)
    assert any("float8 tensorwise, emulated, in 36 of 52 linear layers" in line for line in said), said
    assert any("13 of role `condition`" in line for line in said)
    found = first_steps(resolved, 1)
    assert found.losses == pytest.approx(alone().losses, rel=0.05)
    assert found.losses != alone().losses


def lay_out_words(resolved: Resolved) -> list[str]:
    parts = build(resolved.config, distributed.start(), silent)
    parts.loader.close()
    return parts.said
