"""Tests that launch kernels: on a CUDA device, or on the CPU in a process started with TRITON_INTERPRET=1.

`tests/kernels/test_interpreted.py` starts that process; `pytest -m gpu` runs the same tests on a GPU.
"""

from pathlib import Path

import pytest
import torch
from titan_kernels.launch import interpreting

if interpreting():
    from tests.kernels import interpreter

    interpreter.repair()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if interpreting():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    torch.manual_seed(0)
    return torch.device("cpu" if interpreting() else "cuda")
