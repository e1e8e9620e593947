"""The tiles of grouped products, by device and kind of product."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from titan_kernels.launch import architecture


@dataclass(frozen=True)
class GemmConfig:
    """The tile of a program, and how the compiler shall pipeline it."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    pieces: int = 1  # in how many parts the tile is written, 1 or 2: half the buffer leaves room for a stage
    group_m: int = 8  # how many tiles of rows run together, for L2
    programs: int = 1  # how many run on a multiprocessor at a time
    tensor_map: bool = True  # use the copy engine where there is one and the operands are aligned
    flatten: bool = True  # with the copy engine: one loop over tiles and sums, which fetches the next tile ahead


# What is computed: x @ w.T, x @ w, two of the latter in one sum, grad.T @ x, and the first product of `expert_mlp`.
KINDS = ("product", "transposed", "pair", "weight_gradient", "gated")

# Measured on an H200 (torch 2.11, Triton 3.6) at Qwen3-30B's shapes, in TFLOP/s. 128 x 256 is the largest accumulator
# that eight warps hold in registers; other tiles were 4 to 20 % slower, three stages and one piece equal, groups of 1
# to 4 tiles 0 to 2 % faster than of 8. A flattened loop took 675 (product), 734 (transposed), 729 (weight gradient)
# where a nested one took 637, 710 and 709. With two sums a step (gated) flattening costs: 541 against 655, and stores
# by the copy engine gain nothing over those through pointers (three results take turns in one buffer). Two loops that
# follow each other (pair) cannot be flattened: 678.
_WIDE = GemmConfig(128, 256, 64, num_warps=8, num_stages=4, pieces=2, group_m=4)
_HOPPER = {
    "product": _WIDE,
    "transposed": _WIDE,
    "pair": replace(_WIDE, flatten=False),
    "weight_gradient": _WIDE,
    "gated": GemmConfig(128, 128, 64, num_warps=8, num_stages=4, flatten=False),
}
# Below: never measured. sm_80 and sm_100 are as a compiler's report asks for: no spills, full shared memory.
_AMPERE = {
    **dict.fromkeys(KINDS, GemmConfig(128, 128, 64, num_warps=8, num_stages=3)),
    "gated": GemmConfig(128, 64, 64, num_warps=8, num_stages=3),
}
# Full fp32 goes through the ordinary units; fed by the copy engine it spilt 5.7 kB a thread (Triton 3.8, sm_90).
_FP32 = {
    **dict.fromkeys(KINDS, GemmConfig(64, 64, 32, num_warps=4, num_stages=3, tensor_map=False)),
    "gated": GemmConfig(64, 32, 32, num_warps=4, num_stages=3, tensor_map=False),
}
CONFIGS = {8: _AMPERE, 9: _HOPPER, 10: _HOPPER}  # by major compute capability


def config_for(kind: str, x: Tensor, width_n: int) -> GemmConfig:
    """Return the configuration of a kind of product for operands like `x` and a result of `width_n` columns."""
    table = CONFIGS[min(max(architecture() // 10, 8), 10)] if x.element_size() <= 2 else _FP32
    narrowest = 32 if width_n <= 32 else 1 << (width_n - 1).bit_length()
    return replace(table[kind], block_n=min(table[kind].block_n, narrowest))


def fitting(config: GemmConfig, block_rows: int) -> GemmConfig:
    """Return `config` with tiles that divide blocks of `block_rows` rows."""
    power = block_rows & -block_rows
    return replace(config, block_m=min(config.block_m, power), block_k=min(config.block_k, power))


def constants_of(config: GemmConfig, mapped: bool) -> dict[str, int]:
    """Return the constants of a kernel that `config` sets; `mapped` where the copy engine is used."""
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "PIECES": config.pieces,
        "GROUP_M": config.group_m,
        "TENSOR_MAP": mapped,
        "FLATTEN": mapped and config.flatten,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
