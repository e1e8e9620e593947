"""The last moment of a process that C++ ends because nobody caught an exception."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def on_terminate(act: Callable[[], None]) -> Iterator[None]:
    """Call `act` in the thread whose exception ends this process, before it does; the other threads go on meanwhile.

    It is a terminate handler of C++ and no signal's, so `act` may do what it likes. Does nothing where the C++ library
    is not GNU's.
    """
    handler = ctypes.CFUNCTYPE(None)
    try:
        set_terminate: Any = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
    except (OSError, AttributeError):
        yield
        return
    set_terminate.restype, set_terminate.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    owner = os.getpid()

    def ending() -> None:
        if os.getpid() == owner:  # not in a data worker that was forked
            act()
        before()

    hook = handler(ending)
    before = handler(set_terminate(ctypes.cast(hook, ctypes.c_void_p)))
    try:
        yield
    finally:
        set_terminate(ctypes.cast(before, ctypes.c_void_p))
