"""The ranks: who am I, on which device, and the process groups' life.

One device needs no environment variable at all; under torchrun, Slurm or titan's own spawner the usual variables say
the rest. CPU with gloo and CUDA with NCCL are the same code.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from titan_core.runtime.errors import MachineError, UsageError

DEVICE_TYPES = ("cpu", "cuda")


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Is this the rank that prints and writes what only one may write?"""
        return self.rank == 0


def ranks_from_environment(env: Any = os.environ) -> tuple[int, int, int, int]:
    """Return (rank, size, local rank, local size) as torchrun, our spawner or Slurm set them, else (0, 1, 0, 1)."""
    names = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    }
    for rank, size, local, local_size in names.values():
        if rank in env and size in env:
            world = int(env[size])
            return int(env[rank]), world, int(env.get(local, 0)), int(env.get(local_size) or world)
    return 0, 1, 0, 1


def start(timeout_seconds: float = 300, device: str | None = None, *, always_group: bool = False) -> World:
    """Join the job that the environment describes and take this rank's device.

    `device` forces a device type (`cpu`, `cuda`); `always_group` makes a process group even for one rank. Raises
    `UsageError` for another type, and `MachineError` if the device is not there or the other ranks are not.
    """
    rank, size, local_rank, local_size = ranks_from_environment()
    kind = check_device(device or default_device_type())
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"rank {rank} wants GPU {local_rank}, but this host shows {torch.cuda.device_count()}",
            tip="start as many ranks a host as it has GPUs",
        )
    target = torch.device(kind, local_rank) if kind != "cpu" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(target)
    if size > 1 and not dist.is_initialized():
        _init_process_group(rank, size, kind, timeout_seconds)
    elif always_group and not dist.is_initialized():
        dist.init_process_group(_backend(kind), store=dist.HashStore(), rank=0, world_size=1)
    return World(rank, size, local_rank, local_size, target)


def default_device_type() -> str:
    """Return what TITAN_DEVICE names, else `cuda` where a GPU is visible, else `cpu`. Raises `UsageError`."""
    named = os.environ.get("TITAN_DEVICE")
    if not named:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if named not in DEVICE_TYPES:
        tip = "set it to cpu or cuda, or unset it for a GPU where there is one"
        raise UsageError(f"there is no device `{named}`", where="TITAN_DEVICE", tip=tip)
    return named


def check_device(named: str, *, numbered: bool = False) -> str:
    """Return a type of device, or if `numbered` a device, such as `cuda:1`, if it is one that we know (`UsageError`)
    and this machine has (`MachineError`)."""
    kind, colon, number = named.partition(":")
    if kind not in DEVICE_TYPES or (colon and not (numbered and number.isdecimal())):
        raise UsageError(f"there is no device `{named}`", tip="cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise MachineError("no CUDA device is visible", tip="`titan doctor` says what this machine has")
    return named


def stop() -> None:
    """Leave the job: destroy the process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()


def set_timeout(seconds: float) -> None:
    """Set the timeout of every process group made so far, but for those that wait for disks."""
    if not dist.is_initialized():
        return
    groups = list(dist.distributed_c10d._world.pg_map)  # includes the groups of flattened meshes
    for group in groups:
        if group.group_desc == "checkpoint":
            continue
        for kind in ("cpu", "cuda"):
            try:
                backend = group._get_backend(torch.device(kind))
            except RuntimeError:  # this group has no backend for that device
                continue
            backend._set_default_timeout(timedelta(seconds=seconds))


def _meet_through_slurm(env: Any) -> None:
    """Meet at the job's first host, on a port that follows from the job's number, unless the environment says else."""
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", "")
    if hosts:
        env.setdefault("MASTER_ADDR", first_host(hosts))
    if "SLURM_JOB_ID" in env:
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))


def first_host(hosts: str) -> str:
    """Return the first host of a Slurm list: `node[03-05,9],login` is node03."""
    prefix, bracket, rest = hosts.partition("[")
    if not bracket or "," in prefix:
        return hosts.split(",")[0]
    number, _, after = rest.partition("]")
    suffix = after.split(",")[0]
    return prefix + number.split(",")[0].split("-")[0] + suffix


def _backend(kind: str) -> str:
    return "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"


def _init_process_group(rank: int, size: int, kind: str, timeout_seconds: float) -> None:
    if "SLURM_PROCID" in os.environ:
        _meet_through_slurm(os.environ)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        raise UsageError(
            f"this process is rank {rank} of {size}, but MASTER_PORT is not set",
            tip="start with `titan train --nproc N`, torchrun or srun, or set MASTER_ADDR and MASTER_PORT",
        )
    try:
        dist.init_process_group(_backend(kind), rank=rank, world_size=size, timeout=timedelta(seconds=timeout_seconds))
    except (RuntimeError, dist.DistStoreError, dist.DistNetworkError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise MachineError(
            f"rank {rank} of {size} could not join the others at {address}: {error}",
            tip="every rank must be started, and reach that address",
        ) from error
