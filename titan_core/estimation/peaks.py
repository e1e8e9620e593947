"""Dense bf16 peaks of devices, from their makers' data sheets. An unknown device has none.

A peak is the matrix unit's bf16 rate with fp32 accumulation, without sparsity, at the data sheet's boost clock; a card
that boosts higher can exceed it. Data sheets that print only the rate with sparsity are halved. Names are matched in
full: a MIG slice, a laptop part, a custom part with other units or a virtual GPU of the same family is not the card.
"""

from __future__ import annotations

import re

_MAKER = re.compile(r"^(NVIDIA |AMD |Instinct |GeForce |Tesla )+")

# (the whole device name as torch reports it, without the maker; FLOP/s; source)
_PEAKS: tuple[tuple[str, float, str], ...] = (
    (r"GB300", 2500e12, "GB300 NVL72: 360 PF with sparsity over 72"),
    (r"B300( SXM6( AC)?)?", 2250e12, "HGX B300: 36 PF with sparsity over 8"),
    (r"GB200", 2500e12, "GB200 NVL72: 360 PF with sparsity over 72"),
    (r"B200", 2250e12, "HGX B200: 36 PF with sparsity over 8"),
    (r"B100", 1750e12, "HGX B100: 28 PF with sparsity over 8"),
    (r"GH200( \d+GB?)?( HBM3e?)?", 989.4e12, "Hopper whitepaper, GH200 data sheet"),
    (r"H200 NVL", 835.5e12, "H200 data sheet: 1671 TF with sparsity"),
    (r"H200", 989.4e12, "H200 data sheet: 1979 TF with sparsity"),
    (r"H100 NVL", 835.5e12, "H100 data sheet: 1671 TF with sparsity"),
    (r"H100 PCIe", 756e12, "H100 data sheet: 1513 TF with sparsity"),
    (r"H100 (SXM5 )?\d+GB( HBM3)?", 989.4e12, "H100 data sheet: 1979 TF with sparsity"),
    (r"H800 PCIe", 756e12, "as H100 PCIe; only fp64 and links differ"),
    (r"H800", 989.4e12, "as H100 SXM; only fp64 and links differ"),
    (r"H20(-3e)?", 148e12, "H20 data sheet"),
    # A100-SXM-64GB is a custom part with 124 multiprocessors instead of 108: not in the table
    (r"A[18]00[- ]((SXM4?|PCIE)-)?[48]0GB( PCIe)?", 312e12, "A100 data sheet"),
    (r"A40", 149.7e12, "A40 data sheet"),
    (r"A30", 165e12, "A30 data sheet"),
    (r"A10G", 70e12, "AWS G5: half of the A10's tensor cores' rate"),
    (r"A10", 125e12, "A10 data sheet"),
    (r"L40S", 362e12, "L40S data sheet"),
    (r"L40", 181e12, "L40 data sheet"),
    (r"L4", 121e12, "L4 data sheet: 242 TF with sparsity"),
    (r"RTX 6000 Ada Generation", 364.2e12, "data sheet: 1457 TF fp8 with sparsity"),
    (r"RTX A6000", 154.8e12, "GA102 whitepaper"),
    # GeForce cards accumulate bf16 in fp32 at half the rate that their boxes name
    (r"RTX 5090", 209.5e12, "RTX Blackwell whitepaper"),
    (r"RTX 4090", 165.2e12, "Ada whitepaper"),
    (r"RTX 3090", 71e12, "GA102 whitepaper"),
    (r"MI355X", 2516.6e12, "MI355X data sheet"),
    (r"MI350X", 2306.9e12, "MI350X data sheet"),
    (r"MI325X", 1307.4e12, "MI325X data sheet"),
    (r"MI300X( OAM| VF| HF)?", 1307.4e12, "MI300X data sheet"),
    (r"MI300A", 980.6e12, "MI300A data sheet"),
    (r"MI250X", 191.5e12, "MI250X data sheet: 383 TF over two dies, each of which is a device to torch"),
    (r"MI210", 181e12, "MI210 data sheet"),
)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak in FLOP/s of a device by its name, None if it is not in the table."""
    name = _MAKER.sub("", device_name.strip())
    for pattern, peak, _source in _PEAKS:
        if re.fullmatch(pattern, name):
            return peak
    return None
