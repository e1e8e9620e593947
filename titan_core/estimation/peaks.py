"""Dense bf16 peaks of devices, from their makers' data sheets (without sparsity). An unknown device has none."""

from __future__ import annotations

import re

# (pattern over the device name as torch reports it, FLOP/s). First match wins: more special names stand first.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bGB300\b", 2500e12),
    (r"\bB300\b", 2250e12),
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bGH200\b", 989e12),
    (r"\bH200 NVL\b", 835e12),
    (r"\bH200\b", 989e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100\b", 989e12),
    (r"\bH800\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bA100\b", 312e12),
    (r"\bA800\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bA10G\b", 70e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bMI355X\b", 2516e12),
    (r"\bMI350X\b", 2300e12),
    (r"\bMI325X\b", 1307e12),
    (r"\bMI300X\b", 1307e12),
    (r"\bMI250X\b", 383e12 / 2),  # torch sees one of the two dies
)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak in FLOP/s of a device by its name, None if it is not in the table."""
    for pattern, peak in _PEAKS:
        if re.search(pattern, device_name):
            return peak
    return None
