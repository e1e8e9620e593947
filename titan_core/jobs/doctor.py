"""`titan doctor`: what this machine can do, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `missing` is an option that is not there, `wrong` something to mend."""

    name: str
    state: Literal["ok", "missing", "wrong"]
    text: str
    tip: str | None = None


def run(folder: str = "outputs") -> list[Finding]:
    """Look at the machine; `folder` is where runs would be written."""
    findings = [_python(), *_torch(), _triton(), *_devices(), _collectives(), _host(), _shared_memory(), _disk(folder)]
    return findings + [_optional(name) for name in EXTRAS]


def can_train(findings: list[Finding]) -> bool:
    """Is nothing wrong that training needs?"""
    needed = ("python", "torch", "collectives", "disk")
    return not any(finding.state == "wrong" and finding.name in needed for finding in findings)


def _python() -> Finding:
    version = platform.python_version()
    return Finding("python", "ok", f"{version} on {platform.system()} {platform.machine()}")


def _torch() -> list[Finding]:
    import torch

    found = [Finding("torch", "ok", torch.__version__)]
    a = torch.randn(64, 64)
    if not torch.allclose(a @ torch.eye(64), a):
        found[0] = Finding("torch", "wrong", f"{torch.__version__} multiplies wrongly", "install torch again")
    return found


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
        return [Finding("devices", "ok", f"no GPU; CPU with {os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        peak = peak_flops(properties.name)
        known = f"peak {peak / 1e12:.0f} TFLOP/s bf16" if peak else "peak not known: MFU will not be shown"
        text = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}, {known}"
        found.append(Finding(f"gpu {index}", "ok", text))
    return found


def _collectives() -> Finding:
    import torch.distributed as dist

    if not dist.is_available():
        return Finding("collectives", "wrong", "torch is built without distributed", "install another torch build")
    names = [name for name, there in (("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())) if there]
    if not names:
        return Finding("collectives", "wrong", "neither gloo nor nccl", "install another torch build")
    return Finding("collectives", "ok", ", ".join(names))


def _host() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    return Finding("memory", "ok", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")


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
