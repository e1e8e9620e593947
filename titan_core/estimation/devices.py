"""Devices by the short names that people use: what they hold, compute and send, from their makers' data sheets."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from titan_core.estimation.peaks import peak_flops
from titan_core.runtime.errors import UsageError


@dataclass(frozen=True)
class Device:
    """One accelerator in the host that it is usually sold in.

    `peak` is dense bf16 FLOP/s, `memory` bytes. `fabric` is bytes/s that it sends to its neighbours while it receives
    as many, `network` its share of the host's way to others, `neighbours` how many devices a host has.
    """

    name: str
    peak: float
    memory: int
    fabric: float
    network: float
    neighbours: int = 8


# short name -> (name as torch reports it, GiB, GB/s to a neighbour in one direction, GB/s to other hosts): NVLink 3, 4
# and 5 give 300, 450 and 900, Infinity Fabric seven links of 64; PCIe 4 and 5 give 32 and 64, shared with the network.
# Hosts of A100s have 200 Gb/s a device, those of later ones 400.
_KNOWN = {
    "a100": ("A100-SXM4-80GB", 80, 300, 25),
    "a100-40gb": ("A100-SXM4-40GB", 40, 300, 25),
    "h100": ("H100 80GB HBM3", 80, 450, 50),
    "h200": ("H200", 141, 450, 50),
    "h20": ("H20", 96, 450, 50),
    "b200": ("B200", 180, 900, 50),
    "l40s": ("L40S", 48, 32, 25),
    "rtx3090": ("RTX 3090", 24, 32, 3),
    "rtx4090": ("RTX 4090", 24, 32, 3),
    "rtx5090": ("RTX 5090", 32, 64, 3),
    "mi300x": ("MI300X", 192, 448, 50),
    "mi325x": ("MI325X", 256, 448, 50),
}
USABLE = 0.92  # of a device's memory: a context, NCCL's buffers and what lies between allocations take the rest


def names() -> list[str]:
    """Return the short names."""
    return list(_KNOWN)


def device(name: str) -> Device:
    """Return a device by its short name; raises `UsageError` for one that is not in the table."""
    short = name.lower()
    if short not in _KNOWN:
        near = difflib.get_close_matches(short, _KNOWN, n=1, cutoff=0.5)
        tip = f"did you mean `{near[0]}`?" if near else ""
        raise UsageError(f"no device `{name}` in the table", tip=f"{tip} known: {', '.join(_KNOWN)}".strip())
    full, gib, fabric, network = _KNOWN[short]
    peak = peak_flops(full)
    assert peak is not None
    return Device(short, peak, gib << 30, fabric * 1e9, network * 1e9)
