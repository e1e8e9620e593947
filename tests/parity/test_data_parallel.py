"""The layout never changes the result: fp32 losses of 20 steps equal those of one process."""

import shutil
from pathlib import Path

import pytest

from tests.runs import losses, tiny

STEPS = 20
LAYOUTS = {
    "accumulation 4": (1, {"training__local_batch_size": 2}),
    "FSDP 2": (2, {}),
    "FSDP 2, accumulation 2": (2, {"training__local_batch_size": 2}),
    "FSDP 4": (4, {"training__local_batch_size": 2}),
    "FSDP 2, never reshard": (2, {"parallelism__fsdp_reshard_after_forward": "never"}),
    "HSDP 2 x 2": (
        4,
        {
            "training__local_batch_size": 1,
            "parallelism__data_parallel_replicate_degree": 2,
            "parallelism__data_parallel_shard_degree": 2,
        },
    ),
    "DDP 2": (
        2,
        {
            "training__local_batch_size": 2,
            "parallelism__data_parallel_replicate_degree": 2,
            "parallelism__data_parallel_shard_degree": 1,
        },
    ),
    "recompute all": (1, {"activation_checkpoint__mode": "full"}),
    "recompute every second block": (1, {"activation_checkpoint__mode": "selective"}),
    "recompute by operation": (
        1,
        {"activation_checkpoint__mode": "selective", "activation_checkpoint__selective_ac_option": "op"},
    ),
    "FSDP 2, recompute all": (2, {"activation_checkpoint__mode": "full"}),
    "host offload, one rank": (1, {"training__enable_cpu_offload": True}),
    "host offload, FSDP 2": (2, {"training__enable_cpu_offload": True}),
    "tied, FSDP 2": (2, {"model.args.tied": True}),
    "tied, DDP 2": (
        2,
        {
            "model.args.tied": True,
            "parallelism__data_parallel_replicate_degree": 2,
            "parallelism__data_parallel_shard_degree": 1,
        },
    ),
    "document masks, FSDP 2": (2, {"model.args.attention_mask": "block_causal"}),
    "padded rows, FSDP 2": (2, {"data__split_documents": False}),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    """Losses of one process with the same arithmetic but without any parallelism."""
    known: dict[str, list[float]] = {}

    def of(**changes: object) -> list[float]:
        key = str(sorted(changes.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("reference")
            known[key] = losses(tiny(folder, training__steps=STEPS, training__local_batch_size=8, **changes))
        return known[key]

    return of


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_equals_one_process(name: str, tmp_path: Path, reference) -> None:
    ranks, changes = LAYOUTS[name]
    kept = {k: v for k, v in changes.items() if k.startswith(("model", "data__"))}
    found = losses(tiny(tmp_path, training__steps=STEPS, **changes), ranks)
    assert len(found) == STEPS
    assert found == pytest.approx(reference(**kept), rel=1e-5)


def test_loss_falls(reference) -> None:
    found = reference()
    assert found[-1] < found[0] - 1.0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_loss_equals_eager(ranks: int, tmp_path: Path, reference) -> None:
    changes = {"compile__enable": True, "compile__backend": "aot_eager"}
    found = losses(
        tiny(tmp_path, training__steps=STEPS, **changes),
        ranks,
    )
    assert found == pytest.approx(reference(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_loss_compiled_by_inductor_equals_eager(tmp_path: Path, reference) -> None:
    found = losses(tiny(tmp_path, training__steps=STEPS, compile__enable=True, training__local_batch_size=8))
    assert found == pytest.approx(reference(), rel=1e-4)


def test_document_masks_change_the_loss(reference) -> None:
    assert reference(**{"model.args.attention_mask": "block_causal"}) != reference()
