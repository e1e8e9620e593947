"""Training on a GPU: what a CPU gets in fp32, in every form that a step can take there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.runs import MODELS, assert_near, config, losses, on_cpu, steps
from titan_core.config.quantize import FLOAT8, FLOAT8_EXPERTS
from titan_core.estimation.peaks import peak_flops
from titan_core.jobs import train
from titan_core.parallel import data_parallel, parallelize
from titan_core.runtime import distributed
from titan_core.runtime.events import silent
from titan_core.training import step
from titan_core.training.build import build
from titan_core.training.step import _agree

MIXTURES = ("qwen3 experts", "deepseek_v3")
BF16 = {"training.mixed_precision_param": "bfloat16"}


@pytest.mark.parametrize("model", MODELS)
def test_fp32_equals_a_cpu(model: str, tmp_path: Path) -> None:
    assert_near(losses(config(tmp_path, model)), on_cpu(model), 1e-3)


@pytest.mark.parametrize("model", ["llama3", "llama3 packed", "qwen3 experts", "deepseek_v3", "llama4 packed", "flux"])
def test_compiled_fp32_equals_a_cpu(model: str, tmp_path: Path) -> None:
    assert_near(losses(config(tmp_path, model, compile__enable=True)), on_cpu(model), 1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_bf16_stays_near_fp32(model: str, tmp_path: Path) -> None:
    found = losses(config(tmp_path, model, **BF16))
    assert_near(found, on_cpu(model), 3e-2)
    assert found != list(on_cpu(model))


@pytest.mark.parametrize("model", ["llama3", "deepseek_v3 packed"])
def test_compiled_bf16_stays_near_fp32(model: str, tmp_path: Path) -> None:
    assert_near(losses(config(tmp_path, model, compile__enable=True, **BF16)), on_cpu(model), 3e-2)


@pytest.mark.parametrize("model", [*MIXTURES, "llama4 experts"])
@pytest.mark.parametrize("backend", ["titan", "grouped_mm", "loop"])
def test_expert_backends_agree(model: str, backend: str, tmp_path: Path) -> None:
    assert_near(losses(config(tmp_path, model, training__expert_backend=backend, **BF16)), on_cpu(model), 3e-2)


@pytest.mark.parametrize("model", ["llama3 packed", "qwen3 experts", "flux"])
@pytest.mark.parametrize(
    "how",
    [{"mode": "full"}, {"mode": "selective", "selective_ac_option": "op"}],
    ids=["full", "by operation"],
)
def test_recomputation_changes_nothing(model: str, how: dict[str, str], tmp_path: Path) -> None:
    changes = {f"activation_checkpoint.{key}": value for key, value in how.items()}
    assert_near(losses(config(tmp_path, model, **changes)), on_cpu(model), 1e-3)


def test_recomputation_in_compiled_blocks(tmp_path: Path) -> None:
    changes = {"activation_checkpoint.mode": "selective", "activation_checkpoint.selective_ac_option": "op"}
    found = losses(config(tmp_path, "llama3 packed", compile__enable=True, **changes))
    assert_near(found, on_cpu("llama3 packed"), 1e-3)


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_optimizers_agree(implementation: str, tmp_path: Path) -> None:
    found = losses(config(tmp_path, "llama3", optimizer__implementation=implementation))
    assert_near(found, on_cpu("llama3"), 1e-3)


@pytest.mark.parametrize("model", ["llama3", "llama3 packed", "qwen3 experts", "flux"])
def test_deterministic_runs_are_equal_bit_for_bit(model: str, tmp_path: Path) -> None:
    settings = {"training.deterministic": True, **BF16}
    first, second = (losses(config(tmp_path / name, model, **settings)) for name in ("a", "b"))
    assert first == second
    assert_near(first, on_cpu(model), 3e-2)


@pytest.mark.parametrize("model", ["llama3", "qwen3 experts", "flux"])
@pytest.mark.parametrize("kind", ["fsdp", "simple", "ddp"])
def test_data_parallelism_of_one_rank_over_nccl(model: str, kind: str, tmp_path: Path, monkeypatch) -> None:
    start = distributed.start
    monkeypatch.setattr(train.distributed, "start", lambda seconds, always_group: start(seconds, always_group=True))
    monkeypatch.setattr(data_parallel, "kind_of", lambda layout, config: kind)
    assert parallelize.data_parallel is data_parallel
    assert_near(losses(config(tmp_path, model)), on_cpu(model), 1e-3)


@pytest.mark.parametrize("model", ["llama3", "qwen3 experts", "deepseek_v3", "flux"])
def test_weights_on_the_host(model: str, tmp_path: Path) -> None:
    assert_near(losses(config(tmp_path, model, training__enable_cpu_offload=True)), on_cpu(model), 1e-3)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_stays_near_bf16(recipe: str, compiled: bool, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed")
    options: dict[str, Any] = {"model.converters": FLOAT8, f"{FLOAT8}.recipe_name": recipe, **BF16}
    found = losses(config(tmp_path, "llama3", compile__enable=compiled, **options))
    assert_near(found, on_cpu("llama3"), 5e-2)
    assert found != losses(config(tmp_path / "bf16", "llama3", **BF16))


def test_float8_experts_stay_near_bf16(tmp_path: Path) -> None:
    found = losses(config(tmp_path, "qwen3 experts", **{"model.converters": FLOAT8_EXPERTS}, **BF16))
    assert_near(found, on_cpu("qwen3 experts"), 5e-2)


@pytest.mark.parametrize("model", MODELS)
def test_a_step_waits_for_the_device_once(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def agree(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")  # here it must: what goes into the weights is looked at
        return _agree(*args)

    monkeypatch.setattr(step, "_agree", agree)
    parts = build(config(tmp_path, model).config, distributed.start(), silent)
    try:
        for number in range(3):
            if number:  # the first one may: kernels are compiled and chosen
                torch.cuda.set_sync_debug_mode("error")
            step.forward_backward(parts, lambda: next(parts.loader))
            if number:
                torch.cuda.set_sync_debug_mode("error")
            parts.update(1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        parts.loader.close()


def test_memory_and_mfu_are_reported(tmp_path: Path) -> None:
    found = steps(config(tmp_path, "llama3"))
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    for done in found:
        assert 0 < done.extra["memory/max_active(GiB)"] <= done.memory_gib < total
        assert done.memory_share == pytest.approx(done.memory_gib / total)
        assert done.extra["memory/num_ooms"] == 0
    peak = peak_flops(torch.cuda.get_device_name())
    assert all((done.mfu is None) == (peak is None) for done in found)
    if peak is not None:
        assert found[-1].mfu == pytest.approx(found[-1].tflops * 1e12 / peak)
        assert 0 < found[-1].mfu < 1


def test_validation_on_a_gpu_equals_a_cpu(tmp_path: Path) -> None:
    from titan_core.runtime.events import Event, Validated

    changes = {"validation.enable": True, "validation.freq": 3, "validation.steps": 2, "validation.local_batch_size": 4}
    found: dict[str, list[float]] = {"cuda": [], "cpu": []}
    for device, means in found.items():

        def listen(event: Event, means: list[float] = means) -> None:
            if isinstance(event, Validated):
                means.append(event.loss)

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TITAN_DEVICE", device)
            train.run(config(tmp_path / device, "llama3 packed", validation__seq_len=64, **changes), listener=listen)
    assert len(found["cuda"]) == 3
    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)
