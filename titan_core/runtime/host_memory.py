"""How the C library keeps freed memory, where training runs on the CPU."""

from __future__ import annotations

import ctypes
import platform

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
