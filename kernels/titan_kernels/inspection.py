"""Compile kernels for a GPU that isn't there, and read what the compiler made of them.

`with compiling(90) as compiled:` turns each launch of a Triton kernel into its compilation for sm_90; the code that
launches runs as it is, on meta tensors. `resources(kernel)` reads registers, shared memory, spills and instructions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Bytes of shared memory a block may have, and registers a thread (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTER_LIMIT = 255
REGISTERS_PER_MULTIPROCESSOR = 65536
# What tells a fast kernel from a slow one: matrix units, copy engine, asynchronous copies, memory that spills go to.
INSTRUCTIONS = ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDL", "STL")


@dataclass(frozen=True)
class Compiled:
    """A kernel that was compiled in place of a launch."""

    name: str
    arch: int
    kernel: Any  # triton.compiler.CompiledKernel


@dataclass(frozen=True)
class Resources:
    """What one program of a kernel takes."""

    registers: int  # per thread
    stack_bytes: int  # per thread; more than zero where registers spill
    shared_bytes: int
    num_warps: int
    instructions: Counter[str]  # how often each of INSTRUCTIONS stands in the machine code

    @property
    def spills(self) -> int:
        """Return the number of instructions that move registers to or from local memory."""
        return self.instructions["LDL"] + self.instructions["STL"]


@contextmanager
def compiling(arch: int) -> Iterator[list[Compiled]]:
    """Compile for `arch` (80, 90, 100) what is launched inside, launch nothing, and list what was compiled.

    The same kernel object comes twice where the second launch needed no new compilation.
    """
    from triton.runtime.jit import JITFunction

    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(Compiled(self.fn.__name__, arch, kernel))
        return kernel

    JITFunction.run = compile_only
    try:
        with _driver(arch):
            yield compiled
    finally:
        JITFunction.run = run


def resources(compiled: Compiled) -> Resources:
    """Read what `compiled` takes, from its machine code, with the tools that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        code = _tool("nvdisasm", cubin.name)
    counted = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if counted is None:
        raise RuntimeError(f"cuobjdump reported no registers for {compiled.name} on sm_{compiled.arch}:\n{usage}")
    opcodes = Counter(re.findall(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)", code, re.MULTILINE))
    return Resources(
        registers=int(counted[1]),
        stack_bytes=int(counted[2]),
        shared_bytes=compiled.kernel.metadata.shared,
        num_warps=compiled.kernel.metadata.num_warps,
        instructions=Counter({name: opcodes[name] for name in INSTRUCTIONS if opcodes[name]}),
    )


class _Absent:
    """Stands in for the driver of a GPU: names a target, and has nothing to launch on."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:  # the key of Triton's cache of compiled kernels, so one an architecture
        return f"absent sm_{self.target.arch}"

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def _driver(arch: int) -> Iterator[None]:
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_Absent(arch))  # pyright: ignore[reportArgumentType]: what is left out only a launch needs
    try:
        yield
    finally:
        driver._active = before


def _tool(name: str, *arguments: str) -> str:
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__file__ or "").parent / "bin" / name
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout
