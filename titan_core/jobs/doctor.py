"""`titan doctor`: what this machine can do, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

EXTRAS = {
    "torchao": ("quant", "float8 and MX matmuls"),
    "streaming": ("streaming", "MosaicML streaming data"),
    "transformers": ("flux", "text encoders"),
    "tensorboard": ("logging", "TensorBoard files"),
    "wandb": ("logging", "Weights & Biases"),
    "matplotlib": ("plot", "plots"),
    "s3fs": ("s3", "checkpoints on S3"),
    "gcsfs": ("gcs", "checkpoints on GCS"),
    "sentencepiece": ("sentencepiece", "SentencePiece tokenizers"),
}
_DISTRIBUTIONS = {"streaming": "mosaicml-streaming"}
GIB = 1 << 30
OLDEST_TORCH = (2, 11)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `missing` is an option that is not there, `wrong` something to mend."""

    name: str
    state: Literal["ok", "missing", "wrong"]
    text: str
    tip: str | None = None


def run(folder: str = "outputs") -> list[Finding]:
    """Look at the machine; `folder` is where runs would be written."""
    findings = [_python(), _torch(), _triton(), *_devices(), _collectives(), _cores(), _memory(), _shared_memory()]
    findings += [_open_files(), _disk(folder)]
    return findings + [_optional(name) for name in EXTRAS]


def can_train(findings: list[Finding]) -> bool:
    """Is nothing wrong that training needs?"""
    needed = ("python", "torch", "collectives", "disk")
    return not any(finding.state == "wrong" and finding.name in needed for finding in findings)


def _python() -> Finding:
    version = platform.python_version()
    return Finding("python", "ok", f"{version} on {platform.system()} {platform.machine()}")


def _torch() -> Finding:
    import torch

    version = torch.__version__
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Finding("torch", "wrong", f"{version} is older than {oldest}", f"pip install -U 'torch>={oldest}'")
    a = torch.randn(64, 64)
    if not torch.allclose(a @ torch.eye(64), a):
        return Finding("torch", "wrong", f"{version} multiplies wrongly", "install torch again")
    return Finding("torch", "ok", version)


def _triton() -> Finding:
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return Finding("triton", "missing", "not installed: kernels fall back to PyTorch", "pip install triton")
    import torch

    how = "" if torch.cuda.is_available() else "; without a GPU it runs in its interpreter, for tests"
    return Finding("triton", "ok", version + how)


def _devices() -> list[Finding]:
    import torch

    from titan_core.estimation.peaks import peak_flops

    if not torch.cuda.is_available():
        built = torch.version.cuda
        seen = Path("/proc/driver/nvidia/version").exists()
        if built and seen:
            tip = "does the driver support this CUDA? `nvidia-smi` shows what it supports"
            return [
                Finding("devices", "wrong", f"an NVIDIA driver is there, but torch (CUDA {built}) cannot use it", tip)
            ]
        return [Finding("devices", "ok", "no GPU: titan trains on the CPU")]
    found = [Finding("driver", "ok", _driver())]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        peak = peak_flops(properties.name)
        known = f"peak {peak / 1e12:.0f} TFLOP/s bf16" if peak else "peak not known: MFU will not be shown"
        text = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}, {known}"
        found.append(Finding(f"gpu {index}", "ok", text))
    return found


def _driver() -> str:
    """Return the version of the NVIDIA driver, from the kernel module's own words."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "version not known"
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found.group() if found else "version not known"


def _collectives() -> Finding:
    import torch
    import torch.distributed as dist
    from torch.cuda import nccl as nccl_library

    if not dist.is_available() or not dist.is_gloo_available():
        text = "torch is built without gloo, which ranks on CPUs and the agreement on signals need"
        return Finding("collectives", "wrong", text, "install another torch build")
    reason = _gloo_fails()
    if reason is not None:
        tip = "name a network interface that works: `export GLOO_SOCKET_IFNAME=lo` on one host"
        return Finding("collectives", "wrong", f"gloo cannot reduce on this host: {reason}", tip)
    nccl = ", nccl " + ".".join(map(str, nccl_library.version())) if dist.is_nccl_available() else ""
    if torch.cuda.is_available() and not nccl:
        return Finding("collectives", "wrong", "torch is built without nccl: no more than one GPU", "install it again")
    return Finding("collectives", "ok", "gloo (two ranks tried)" + nccl)


def _gloo_fails() -> str | None:
    """Let two ranks, threads of this process, add a number; return why it fails."""
    import torch
    import torch.distributed as dist

    store, failures, sums = dist.HashStore(), [], []

    def rank(number: int) -> None:
        try:
            group: Any = dist.ProcessGroupGloo(store, number, 2, timedelta(seconds=10))
            value = torch.tensor([float(number + 1)])
            group.allreduce([value]).wait()
            sums.append(value.item())
        except RuntimeError as error:  # all that gloo raises
            failures.append(str(error).strip().split("\n")[0])

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        return failures[0]
    return None if sums == [3.0, 3.0] else f"1 + 2 is {sums}"


def _cores() -> Finding:
    import torch

    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    usable, there = (len(affinity(0)) if affinity else os.cpu_count() or 1), os.cpu_count() or 1
    quota = _cgroup_number("cpu.max")
    limits = f", limited to {quota:.1f} of CPU time" if quota is not None else ""
    return Finding("cores", "ok", f"{usable} of {there} usable{limits}; torch uses {torch.get_num_threads()} threads")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    limit = _cgroup_number("memory.max")
    if limit is not None and limit < memory.total:
        text += f", this container may use {limit / GIB:.1f} GiB"
    if min(memory.available, limit or memory.available) < GIB:
        return Finding("memory", "wrong", text, "less than 1 GiB: training would be killed; close what uses it")
    return Finding("memory", "ok", text)


def _cgroup_number(name: str) -> float | None:
    """Return a limit of this container, cores or bytes; None where there is none (cgroup v2)."""
    try:
        words = Path("/sys/fs/cgroup", name).read_text(encoding="ascii").split()
    except OSError:
        return None
    if not words or words[0] == "max":
        return None
    return float(words[0]) / (float(words[1]) if len(words) > 1 else 1.0)


def _open_files() -> Finding:
    try:
        import resource
    except ImportError:
        return Finding("open files", "ok", "no limit on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < 1024:
        return Finding("open files", "wrong", f"only {soft} at once", f"`ulimit -n {hard if hard > 0 else 65536}`")
    return Finding("open files", "ok", f"{soft} at once" if soft >= 0 else "no limit")


def _shared_memory() -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("shared memory", "ok", "no /dev/shm on this system")
    free = shutil.disk_usage(place).free
    if free < GIB:
        tip = "data workers and NCCL need it: in Docker, `--shm-size 8g` or `--ipc host`"
        return Finding("shared memory", "wrong", f"only {free / GIB:.2f} GiB in /dev/shm", tip)
    return Finding("shared memory", "ok", f"{free / GIB:.1f} GiB in /dev/shm")


def _disk(folder: str) -> Finding:
    """Write 64 MiB where runs would be written."""
    place = Path(folder)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            began = time.perf_counter()
            for _ in range(64):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = 64 * len(block) / (time.perf_counter() - began)
    except OSError as error:
        tip = "choose another folder with `--run`"
        return Finding("disk", "wrong", f"cannot write in `{place.resolve()}`: {error.strerror}", tip)
    return Finding("disk", "ok", f"{free / GIB:.0f} GiB free in `{place}`, {rate / 1e6:.0f} MB/s written and synced")


def _optional(name: str) -> Finding:
    extra, purpose = EXTRAS[name]
    try:
        version = importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
        return Finding(name, "ok", version)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", purpose, f"pip install 'titan-pretrain[{extra}]'")
