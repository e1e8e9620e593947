"""Sizes as people write them."""

from __future__ import annotations

from titan_core.runtime.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(text: str, option: str) -> int:
    """Return the bytes that `5GB`, `500MB`, `1GiB` or a plain number mean. Raises `UsageError`."""
    number = text.rstrip("BbIiKkMmGgTt ")
    unit = text[len(number) :].strip().upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise UsageError(f"`{option}` cannot be `{text}`", tip="a size, e.g. 5GB, 500MB or 1GiB")
    return size
