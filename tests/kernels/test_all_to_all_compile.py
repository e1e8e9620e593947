"""What the compiler makes of the all-to-all for a GPU that is not here: wide words, and signals of system scope."""

import re

import torch
from titan_kernels import all_to_all_kernels as kernels
from titan_kernels.all_to_all import Layout, Route, SharedMemory, SymmetricExchange
from titan_kernels.inspection import compiling

WORLD, EXPERTS = 6, 32  # not a power of two of ranks


def test_words_are_wide_and_signals_reach_other_devices() -> None:
    ints = {"dtype": torch.int32, "device": "meta"}
    layout = Layout(WORLD, EXPERTS, 4096, 2 * 7168)
    memory = SharedMemory(
        torch.empty(layout.total, dtype=torch.uint8, device="meta"),
        torch.empty(WORLD, dtype=torch.int64, device="meta"),
    )
    exchange = SymmetricExchange(memory, layout, 1)
    table, rows = torch.empty(WORLD, EXPERTS, **ints), torch.empty(2048, 7168, dtype=torch.bfloat16, device="meta")
    route = Route(table, table, table, table, torch.empty(EXPERTS, **ints), torch.empty(1, **ints), 2048, 4096)
    with compiling(90) as compiled:
        kernels.publish(exchange, rows, table, table)
        out = kernels.pull(exchange, rows, route, align=128, forth=True, place=True)
        assert out.shape == (4096, 7168)
        assert kernels.pull(exchange, out, route, align=1, forth=False, place=False).shape == (2048, 7168)
    publish, announce, place, pull = compiled
    for kernel in (publish, place, pull):
        ptx = kernel.kernel.asm["ptx"]
        assert "ld.global.v4" in ptx, kernel.name  # 16 bytes a thread at once
        assert "st.global.v4" in ptx, kernel.name
    assert re.search(r"atom\.global\.sys\.release\.exch\.b64", announce.kernel.asm["ptx"])
    for kernel in (place, pull):
        assert re.search(r"atom\.global\.sys\.acquire\.add\.u64", kernel.kernel.asm["ptx"])
