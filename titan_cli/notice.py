"""A signal is answered at once, by a thread, even while the main thread computes a long step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class SignalNotice:
    """Calls `say` with the name of the first stopping signal that comes while somebody handles it.

    Python runs signal handlers between two instructions of the main thread, which during a long step is seconds later;
    the wakeup descriptor is written at once. A signal that nobody handles ends the process and needs no notice.
    Only the main thread can use this.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._before = -1

    def __enter__(self) -> SignalNotice:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        # a forked data worker would write into the same pipe when it is ended
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        self._thread = threading.Thread(target=self._watch, name="signal-notice", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._writing)
        self._thread.join()
        os.close(self._reading)

    def _watch(self) -> None:
        told = False
        while numbers := os.read(self._reading, 64):
            for number in numbers:
                ours = number in _STOPPING and signal.getsignal(number) not in _UNHANDLED
                if ours and not told:
                    told = True
                    self._say(signal.Signals(number).name)


_UNHANDLED = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler, None)
