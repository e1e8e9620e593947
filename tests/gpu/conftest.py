"""Tests of whole runs on one CUDA device: `pytest -m gpu`. Models are tiny; the CPU, or fp32, is the reference."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run on the GPU unless a test says else, and leave no setting of the whole process behind."""
    monkeypatch.setenv("TITAN_DEVICE", "cuda")
    torch._dynamo.reset()
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
