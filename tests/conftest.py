"""Settings that every test needs before torch is imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # ranks are forked; a parent with a thread pool makes them hang
os.environ["HF_HUB_OFFLINE"] = "1"  # without it an unreachable hub costs 23 s a call
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
