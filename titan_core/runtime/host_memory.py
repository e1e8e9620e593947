"""Memory of this process on the host: the most it has held, and how the C library keeps what is freed."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

import psutil

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # from malloc.h


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next allocation instead of returning it to the system.

    A step frees and allocates the same large tensors again; returned pages must be zeroed by the kernel when they are
    touched again, which took 6 % of the CPU time of a step of a 58M-parameter Llama. Does nothing, and returns False,
    where the C library is another.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in wanted])  # all three, whatever the first says


def peak_resident_bytes() -> int:
    """Return the most host memory that this process has held at once."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it started this process, too
        found = [int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        if found:
            return 1024 * found[0]
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
