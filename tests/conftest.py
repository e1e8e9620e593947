"""Settings that every test needs before torch is imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # ranks are forked; a parent with a thread pool makes them hang
os.environ["HF_HUB_OFFLINE"] = "1"  # without it an unreachable hub costs 23 s a call
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("TITAN_DEVICE", "cpu")  # also where there is a GPU; tests that need one ask for it
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, default=1, help="run every n-th case of a test that has many, and the first")


def pytest_configure(config: pytest.Config) -> None:
    """Make this process one that may be forked at any time, in whatever order the tests come.

    The first backward of a process decides whether autograd starts threads for devices, after which no fork of it can
    run a backward. It starts them for GPUs, and once fake tensors were used it believes in eight. So it runs here,
    where there is none; tests on a GPU are a run of their own.
    """
    if not config.getoption("markexpr").startswith("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.ones(1, requires_grad=True).backward()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _sample(config, items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; on a machine with one, `pytest -m gpu` runs it")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Thin out the cases of each test, as a second pass over another version of a library needs not all of them."""
    every = config.getoption("--sample")
    if every == 1:
        return
    seen: dict[str, int] = {}
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        number = seen[test] = seen.get(test, -1) + 1
        (kept if number % every == 0 else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept
