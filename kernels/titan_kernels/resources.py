"""What every kernel takes on every architecture, at the shapes of a language model: the table of RESOURCES.md.

`python -m titan_kernels.resources > kernels/RESOURCES.md` compiles all kernels, which needs no GPU, and prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from titan_kernels.inspection import Resources, compiling, resources
from titan_kernels.quant import E4M3

ARCHITECTURES = (80, 90, 100)
TOKENS, TOP_K, EXPERTS, WIDTH, HIDDEN = 4096, 8, 64, 2048, 1536
ROWS = TOKENS * TOP_K

COLUMNS = ("kernel", "arch", "registers", "spills", "shared bytes", "warps", "instructions")
HEADING = """# What the kernels take

Printed by `python -m titan_kernels.resources` with {versions}: compiled for the architectures named, run on
none. Registers are those of a thread, spills the instructions that move registers to or from local memory, instructions
how often matrix units (HMMA, HGMMA, QGMMA, UTCHMMA, UTCQMMA), the copy engine (UTMALDG, UTMASTG) and asynchronous
copies (LDGSTS) stand in the code.
"""


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return a tensor that has a shape only."""
    return torch.empty(shape, dtype=dtype, device="meta")


def top_k(num_tokens: int = TOKENS) -> None:
    """Launch the choice of 8 of 256 experts, and of the best two in groups of 32."""
    from titan_kernels import top_k_kernels as kernels

    kernels.top_k(empty(num_tokens, 256, dtype=torch.float32), 8)
    kernels.top_k(empty(num_tokens * 8, 32, dtype=torch.float32), 2)


def permutation(num_tokens: int = TOKENS) -> None:
    """Launch placement, scatter and combination with their gradients."""
    from titan_kernels import permutation_kernels as kernels

    num_rows = num_tokens * TOP_K
    _, _, row, source = kernels.place(empty(num_tokens, TOP_K, dtype=torch.int64), EXPERTS, 1, num_rows)
    x, weights = empty(num_tokens, WIDTH), empty(num_tokens, TOP_K, dtype=torch.float32)
    rows = kernels.scatter(x, row, source)
    kernels.combine(rows, row, None)
    kernels.combine(rows, row, weights)
    kernels.combine_backward(x, rows, row, source, weights)


def grouped_gemm(dtype: torch.dtype, num_tokens: int = TOKENS) -> None:
    """Launch the three products of a grouped linear layer."""
    from titan_kernels import grouped_gemm_kernels as kernels

    x, ends = empty(num_tokens * TOP_K, WIDTH, dtype=dtype), empty(EXPERTS, dtype=torch.int32)
    weight = empty(EXPERTS, HIDDEN, WIDTH, dtype=dtype)
    y = kernels.forward(x, weight, ends)
    kernels.input_gradient(y, weight, ends)
    kernels.weight_gradient(y, x, ends)


def contiguous(num_blocks: int = ROWS // 128) -> None:
    """Launch the three products of a linear layer over blocks of rows."""
    from titan_kernels import grouped_gemm_kernels as kernels

    x, experts = empty(num_blocks * 128, WIDTH), empty(num_blocks, dtype=torch.int32)
    weight = empty(EXPERTS, HIDDEN, WIDTH)
    y = kernels.forward_blocks(x, weight, experts, 128)
    kernels.input_gradient_blocks(y, weight, experts, 128)
    kernels.weight_gradient_blocks(y, x, experts, EXPERTS, 128)


def expert_mlp(num_tokens: int = TOKENS, hidden: int = HIDDEN) -> None:
    """Launch the feed-forward layer over rows, over gathered tokens, and its gradient."""
    from titan_kernels import expert_mlp_kernels as kernels

    num_rows = num_tokens * TOP_K
    x, tokens = empty(num_rows, WIDTH), empty(num_tokens, WIDTH)
    w1, w2 = empty(EXPERTS, hidden, WIDTH), empty(EXPERTS, WIDTH, hidden)
    ends, source = empty(EXPERTS, dtype=torch.int32), empty(num_rows, dtype=torch.int32)
    kernels.forward(x, w1, w1, w2, ends, True)
    y, gate, up = kernels.forward(tokens, w1, w1, w2, ends, True, source, TOP_K)
    kernels.backward(x, y, gate, up, w1, w1, w2, ends, None)
    kernels.backward(x, y, gate, up, w1, w1, w2, ends, empty(num_rows, dtype=torch.float32))


def quant(num_rows: int = ROWS) -> None:
    """Launch the quantisations."""
    from titan_kernels import quant_kernels as kernels

    x, weight = empty(num_rows, WIDTH), empty(EXPERTS, HIDDEN, WIDTH)
    kernels.quantize_1x128(x, _float8(x), _scales(num_rows, WIDTH))
    kernels.quantize_128x1(x, empty(EXPERTS, dtype=torch.int32), *_turned(num_rows, WIDTH))
    scale = empty(EXPERTS, HIDDEN // 128, WIDTH // 128, dtype=torch.float32)
    kernels.quantize_128x128(weight, _float8(weight), empty(EXPERTS, WIDTH, HIDDEN, dtype=E4M3), scale)
    kernels.quantize_rowwise(x, _float8(x), empty(num_rows, dtype=torch.float32))


def fp8_grouped_gemm(num_rows: int = ROWS) -> None:
    """Launch the float8 products, for architectures that have them."""
    from titan_kernels import fp8_grouped_gemm_kernels as kernels

    x, weight, ends = empty(num_rows, WIDTH, dtype=E4M3), empty(EXPERTS, HIDDEN, WIDTH, dtype=E4M3), empty(EXPERTS)
    ends, fp32 = ends.int(), partial(empty, dtype=torch.float32)
    scale = fp32(EXPERTS, HIDDEN // 128, WIDTH // 128)
    kernels.blockwise_product(x, _scales(num_rows, WIDTH), weight, scale, ends, torch.bfloat16)
    kernels.rowwise_product(x, fp32(num_rows), weight, fp32(EXPERTS, HIDDEN), ends, torch.bfloat16)
    kernels.weight_gradient(*_turned(num_rows, HIDDEN), *_turned(num_rows, WIDTH), ends, torch.bfloat16)


def pointwise(num_tokens: int = TOKENS) -> None:
    """Launch the norm and the rotation, with their gradients."""
    from titan_kernels import rms_norm_kernels, rotary_kernels

    x, weight, inverse = empty(num_tokens, 4096), empty(4096), empty(num_tokens, dtype=torch.float32)
    rms_norm_kernels.forward(x, weight, 1e-6)
    rms_norm_kernels.backward(x, x, weight, inverse)
    table = empty(1, num_tokens, 64, dtype=torch.float32)
    rotary_kernels.rotate(empty(2, num_tokens, 32, 128), table, table, False)


def linear_cross_entropy(num_tokens: int = TOKENS) -> None:
    """Launch the softmax of logits with its gradient, and the scaling of gradients."""
    from titan_kernels import linear_cross_entropy_kernels as kernels

    logits, labels = empty(num_tokens, 128256), empty(num_tokens, dtype=torch.int64)
    one = empty(dtype=torch.float32)
    kernels.cross_entropy_(logits, labels, one, True)
    kernels.scale_(empty(128256, 4096), one)


def all_to_all(num_rows: int = ROWS) -> None:
    """Launch the exchange of rows between six ranks, forth and back."""
    from titan_kernels import all_to_all_kernels as kernels
    from titan_kernels.all_to_all import Layout, Route, SharedMemory, SymmetricExchange

    layout, ints = Layout(6, EXPERTS, 2 * ROWS, 2 * WIDTH), partial(empty, dtype=torch.int32)
    memory = SharedMemory(empty(layout.total, dtype=torch.uint8), empty(layout.world, dtype=torch.int64))
    exchange, table = SymmetricExchange(memory, layout, 1), ints(layout.world, EXPERTS)
    route = Route(table, table, table, table, ints(EXPERTS), ints(1), num_rows, num_rows)
    kernels.publish(exchange, empty(num_rows, WIDTH), table, table)
    out = kernels.pull(exchange, empty(num_rows, WIDTH), route, align=128, forth=True, place=True)
    kernels.pull(exchange, out, route, align=1, forth=True, place=False)
    kernels.pull(exchange, out, route, align=1, forth=False, place=False)


# What is compiled: a name, the launches, and the first architecture that has what they need.
CASES: tuple[tuple[str, Callable[[], None], int], ...] = (
    ("top_k", top_k, 80),
    ("permutation", permutation, 80),
    ("grouped_gemm bf16", partial(grouped_gemm, torch.bfloat16), 80),
    ("grouped_gemm fp32", partial(grouped_gemm, torch.float32), 80),
    ("contiguous bf16", contiguous, 80),
    ("expert_mlp bf16", expert_mlp, 80),
    ("narrow expert_mlp bf16", partial(expert_mlp, hidden=256), 80),
    ("quant", quant, 89),
    ("fp8_grouped_gemm", fp8_grouped_gemm, 89),
    ("pointwise", pointwise, 80),
    ("linear_cross_entropy", linear_cross_entropy, 80),
    ("all_to_all", all_to_all, 80),
)


def taken(launches: Callable[[], None], arch: int) -> list[tuple[str, Resources]]:
    """Compile `launches` for `arch` and return the kernels' names and resources, each kernel once."""
    with compiling(arch) as compiled:
        launches()
    return [(kernel.name, resources(kernel)) for kernel in {id(kernel.kernel): kernel for kernel in compiled}.values()]


def table() -> str:
    """Return the table of all cases, in Markdown."""
    import triton

    versions = f"Triton {triton.__version__} and torch {torch.__version__}"
    lines = [HEADING.format(versions=versions), "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, launches, first in CASES:
        for arch in (arch for arch in ARCHITECTURES if arch >= first):
            for kernel, took in taken(launches, arch):
                instructions = ", ".join(
                    f"{count} {opcode}" for opcode, count in took.instructions.items() if opcode not in ("LDL", "STL")
                )
                cells = (f"{name}: `{kernel}`", f"sm_{arch}", took.registers, took.spills, took.shared_bytes)
                lines.append("| " + " | ".join(map(str, (*cells, took.num_warps, instructions))) + " |")
    return "\n".join(lines)


def _float8(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=E4M3)


def _turned(num_rows: int, width: int) -> tuple[Tensor, Tensor]:
    blocks = -(-num_rows // 128) + 2 * EXPERTS
    return empty(width, blocks * 128, dtype=E4M3), empty(blocks, width, dtype=torch.float32)


def _scales(num_rows: int, width: int) -> Tensor:
    return empty(width // 128, -(-num_rows // 4) * 4, dtype=torch.float32)[:, :num_rows].T


if __name__ == "__main__":
    print(table())
