"""Where a kernel runs: on the GPU, in Triton's interpreter, or not at all."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

MULTIPROCESSORS_ASSUMED = {8: 108, 9: 132, 10: 148}  # A100, H100 and H200, B200: for compiling without a device
INTERPRETER_PROGRAMS = 3  # few, so that persistent kernels loop also on the small tensors of tests


def interpreting() -> bool:
    """Whether this process runs kernels in Triton's interpreter (`TRITON_INTERPRET=1`, read by Triton at import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(x: Tensor) -> bool:
    """Whether an operation on `x` runs its kernel and not its reference: on CUDA, or under the interpreter."""
    return x.is_cuda or interpreting()


def architecture() -> int:
    """Return the compute capability that kernels are compiled for, times ten; the interpreter counts as Hopper."""
    if interpreting():
        return 90
    import triton

    target: Any = triton.runtime.driver.active.get_current_target()
    return int(target.arch)


def num_programs(x: Tensor) -> int:
    """Return how many programs of a persistent kernel fill the device of `x` once."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return INTERPRETER_PROGRAMS if interpreting() else MULTIPROCESSORS_ASSUMED.get(architecture() // 10, 132)


def dot_precision(x: Tensor) -> str:
    """Return how `tl.dot` multiplies `x`: fp32 in full unless `torch.set_float32_matmul_precision` allows TF32."""
    exact = x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def takes_tensor_map(*tensors: Tensor) -> bool:
    """Whether the copy engine of Hopper and later can read these: 16-byte aligned rows, last dimension contiguous."""
    return architecture() >= 90 and all(_aligned(tensor) for tensor in tensors)


def _aligned(tensor: Tensor) -> bool:
    if tensor.numel() == 0 or tensor.stride(-1) != 1 or tensor.data_ptr() % 16:
        return False
    return all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
