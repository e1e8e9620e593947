"""What this very device can do, measured in the same call as the kernels: a dense matmul and a copy."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titan_core.estimation.peaks import peak_flops
from titan_core.jobs.bench.timing import Timer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Roofline:
    """A device's measured ceilings: FLOP/s of a dense matmul by dtype, None where it has none; copied bytes/s.

    They are those of the fastest call: a ceiling is what other load does not lower. Copied bytes count twice, read and
    written. `peak` is the bf16 rate on the data sheet, None if not known.
    """

    device: str
    matmul: dict[str, float | None]
    copy: float
    peak: float | None

    def floor_seconds(self, flops: float, moved: float, dtype: str) -> float | None:
        """Return the least time that the work can take here: that of its FLOPs or that of its bytes."""
        rate = self.matmul.get(dtype)
        if flops and rate is None:
            return None
        return max(flops / rate if rate else 0.0, moved / self.copy)


def measure(timer: Timer, dtypes: set[str]) -> Roofline:
    """Measure the ceilings for some dtypes: 8192^3 and 1 GiB on a GPU, 1024^3 and 128 MiB on a CPU."""
    device = timer.device
    gpu = device.type == "cuda"
    size = 8192 if gpu else 1024
    rates = {name: _matmul_rate(timer, DTYPES[name], size) for name in sorted(dtypes)}
    name = torch.cuda.get_device_name(device) if gpu else _cpu_name()
    copy = _copy_rate(timer, 1 << 30 if gpu else 1 << 27)
    return Roofline(name, rates, copy, peak_flops(name) if gpu else None)


def _copy_rate(timer: Timer, size: int) -> float:
    source = torch.randn(size // 4, device=timer.device)
    target = torch.empty_like(source)
    return 2 * size / timer.time(lambda: target.copy_(source)).fastest


def _matmul_rate(timer: Timer, dtype: torch.dtype, size: int) -> float | None:
    a, b = (torch.randn(size, size, device=timer.device) for _ in range(2))
    try:
        call = _float8_matmul(a, b) if dtype == torch.float8_e4m3fn else _matmul(a.to(dtype), b.to(dtype))
        return 2 * size**3 / timer.time(call).fastest
    except (RuntimeError, NotImplementedError):  # torch's answer where a device has no float8 matmul
        if dtype == torch.float8_e4m3fn:
            return None
        raise


def _matmul(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    return lambda: a @ b


def _float8_matmul(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    one = torch.ones((), device=a.device)
    x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    return lambda: torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _cpu_name() -> str:
    """Name the processor, and how many threads compute."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
