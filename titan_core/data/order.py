"""The order in which documents are read: a pure function of (seed, epoch, position), in constant memory."""

from __future__ import annotations

import hashlib

_ROUNDS = 4


def permute(position: int, size: int, key: str) -> int:
    """Return where a position of [0, size) goes under the permutation that `key` names.

    A Feistel network over the smallest even number of bits that holds `size`, walked until it lands inside (Black &
    Rogaway 2002): on average fewer than four tries.
    """
    if size <= 1:
        return 0
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _round_keys(key)
    while True:
        left, right = position >> half, position & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right, round_key) & mask)
        position = (left << half) | right
        if position < size:
            return position


def _round_keys(key: str) -> list[int]:
    digest = hashlib.sha256(key.encode()).digest()
    return [int.from_bytes(digest[i * 8 : i * 8 + 8], "little") for i in range(_ROUNDS)]


def _mix(value: int, key: int) -> int:
    """Return 64 well-mixed bits of a value (splitmix64's finaliser)."""
    x = (value * 0x9E3779B97F4A7C15 + key) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
