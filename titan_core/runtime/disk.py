"""How bytes go to files."""

from __future__ import annotations

# What `cp` writes at once. With 1 MiB, Linux 6.18 spent 4 s of system time on 2 GB in its page cache, with this 0.6 s.
WRITE_AT_ONCE = 128 << 10
