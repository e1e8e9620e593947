"""Garbage collection at chosen steps, so that ranks do not stop for it at different times."""

from __future__ import annotations

import gc


class GarbageCollector:
    """Switches the automatic collector off and collects every `freq` steps instead."""

    def __init__(self, freq: int, debug: bool) -> None:
        self.freq = freq
        self.debug = debug

    def __enter__(self) -> GarbageCollector:
        self._was_on = gc.isenabled()
        gc.disable()
        gc.collect(1)
        if self.debug:
            from torch.utils.viz._cycles import warn_tensor_cycles

            self._stop_warning = warn_tensor_cycles()
        return self

    def __exit__(self, *_: object) -> None:
        if self.debug:
            self._stop_warning()
        if self._was_on:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Collect if it is time: young objects, or everything in debug mode."""
        if self.debug:
            gc.collect()
        elif step > 1 and step % self.freq == 0:
            gc.collect(1)
