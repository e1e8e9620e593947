"""Who am I: torchrun, our spawner, Slurm, or alone."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.ranks import run_ranks
from titan_core.runtime import distributed
from titan_core.runtime.distributed import first_host, ranks_from_environment
from titan_core.runtime.errors import MachineError, UsageError


def test_ranks() -> None:
    assert ranks_from_environment({}) == (0, 1, 0, 1)
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert ranks_from_environment(torchrun) == (5, 8, 1, 4)
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    assert ranks_from_environment(slurm) == (3, 4, 1, 4)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("a", "a"), ("a,b", "a"), ("node[03-05,9]", "node03"), ("n[7,9-12]x,login", "n7x"), ("login,node[1-3]", "login")],
)
def test_first_host_of_a_slurm_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_slurm_job_meets_at_its_first_host() -> None:
    env = {"SLURM_PROCID": "0", "SLURM_JOB_ID": "123456", "SLURM_STEP_NODELIST": "gpu[11-14]"}
    distributed._meet_through_slurm(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("gpu11", "23456")
    env = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a", "MASTER_ADDR": "b", "MASTER_PORT": "9"}
    distributed._meet_through_slurm(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("b", "9")


def test_mistakes_are_explained(monkeypatch) -> None:
    with pytest.raises(MachineError, match="no CUDA device"):
        distributed.start(device="cuda")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UsageError, match="MASTER_PORT"):
        distributed.start(device="cpu")


def _time_out_everywhere() -> list[tuple[str, float]]:
    """Return the seconds after which a collective fails in each kind of group, where the other ranks never come."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    flat = mesh["a", "b"]._flatten("ab").get_group()
    groups = {"world": None, "axis": mesh.get_group("b"), "new": dist.new_group(backend="gloo"), "flat": flat}
    assert all(timeout == 1800 for timeout in _own_timeouts(groups["axis"], groups["new"]))  # torch's, not ours
    distributed.set_timeout(1)
    found = []
    if dist.get_rank() == 0:
        for name, group in groups.items():
            began = time.monotonic()
            with pytest.raises(RuntimeError, match=r"Timed out|closure"):
                dist.all_reduce(torch.ones(1), group=group)
            found.append((name, time.monotonic() - began))
    else:
        time.sleep(4)
    return found


def _own_timeouts(*groups: Any) -> list[float]:
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_every_group_gets_the_timeout() -> None:
    found = dict(run_ranks(_time_out_everywhere, 4)[0])
    assert set(found) == {"world", "axis", "new", "flat"}
    assert all(0.9 < found[name] < 3 for name in ("world", "axis", "new"))
    assert found["flat"] < 3  # it may share the world's connections, which are dead already


def test_the_environment_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TITAN_DEVICE", "cpu")
    assert distributed.default_device_type() == "cpu"
    monkeypatch.delenv("TITAN_DEVICE")
    assert distributed.default_device_type() == "cuda"


@pytest.mark.parametrize(("named", "device"), [("gpu", None), ("cuda:0", None), ("cpu", "cdua"), ("cpu", "cuda:1")])
def test_a_device_that_is_none_is_an_error(named: str, device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TITAN_DEVICE", named)
    with pytest.raises(UsageError, match=f"there is no device `{device or named}`") as caught:
        distributed.start(device=device)
    assert caught.value.where == (None if device else "TITAN_DEVICE")
    assert "cpu or cuda" in (caught.value.tip or "")
