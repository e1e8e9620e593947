"""Who am I: torchrun, our spawner, Slurm, or alone."""

import pytest

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
