"""Repairs of Triton's interpreter, which computes bfloat16 wrongly and rounds wrongly to bfloat16 and float8.

The interpreter keeps bfloat16 as uint16 and adds, multiplies and compares those bit patterns as integers, and it rounds
by cutting bits (Triton 3.6 to 3.9). `repair()` computes in float32 instead and rounds with torch, which is right.
Triton 3.6 also takes `int()` of an array of one element, which numpy 2.4 refuses. And it spends a fifth of its time
on finding the names that it changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

FLOATS = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
STORED_AS = {torch.bfloat16: np.uint16, torch.float8_e4m3fn: np.uint8, torch.float8_e5m2: np.uint8}
LARGEST_E4M3 = 448.0

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder


def repair() -> None:
    """Change the interpreter of this process; once, before a kernel runs."""
    truncating = interpreter._ir.ROUNDING_MODE.RTZ
    theirs = interpreter._convert_float

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
        if source not in FLOATS or target not in FLOATS or rounding == truncating:
            return theirs(data, source, target, rounding)
        return round_to(data, source, target)

    interpreter._convert_float = convert
    Builder.cast_impl = cast
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_fabs", "create_erf", "create_rsqrt"):
        setattr(Builder, name, in_float32(getattr(Builder, name)))
    Builder.create_dot = dot(Builder.create_dot)
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = reduction(operation.apply_impl)
    interpreter._patch_builtin = of_known_names(interpreter._patch_builtin)
    interpreter._patch_lang_tensor = indexable(interpreter._patch_lang_tensor)
    for dtype in (tl.bfloat16, tl.float8e4nv, tl.float8e5):
        setattr(Builder, f"get_{dtype.name}", constant(dtype))


def round_to(data: np.ndarray, source: tl.dtype, target: tl.dtype) -> np.ndarray:
    """Return `data` of `source` as `target`, both as the interpreter stores them; nearest even, e4m3 saturates."""
    stored = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).reshape(-1).copy())
    values = stored.view(FLOATS[source])
    if target == tl.float8e4nv:
        values = values.float().clamp(-LARGEST_E4M3, LARGEST_E4M3)
    values = values.to(FLOATS[target])
    if values.dtype in STORED_AS:
        return values.view(torch.uint8).numpy().view(STORED_AS[values.dtype]).reshape(data.shape)
    return values.numpy().reshape(data.shape)


def cast(_: Any, source: Handle, target: tl.dtype) -> Handle:
    before, after = source.dtype.scalar, target.scalar
    data = source.data
    if before in FLOATS and after in FLOATS:
        return Handle(round_to(data, before, after), after)
    if before in FLOATS and FLOATS[before] in STORED_AS:
        data = round_to(data, before, tl.float32)
    if after in FLOATS and FLOATS[after] in STORED_AS:
        return Handle(round_to(data.astype(np.float32), tl.float32, after), after)
    return Handle(data.astype(interpreter._get_np_dtype(after)), after)


def is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def widen(handle: Any) -> Any:
    return Handle(round_to(handle.data, tl.bfloat16, tl.float32), tl.float32) if is_bfloat16(handle) else handle


def in_float32(method: Callable[..., Handle]) -> Callable[..., Handle]:
    """Return `method` for bfloat16 operands too: computed in float32, rounded once; comparisons stay booleans."""

    def run(self: Any, *operands: Any, **options: Any) -> Handle:
        if not any(is_bfloat16(operand) for operand in operands):
            return method(self, *operands, **options)
        result = method(self, *map(widen, operands), **options)
        if result.data.dtype != np.float32:
            return result
        return Handle(round_to(result.data, tl.float32, tl.bfloat16), tl.bfloat16)

    return run


def dot(method: Callable[..., Handle]) -> Callable[..., Handle]:
    def run(self: Any, a: Handle, b: Handle, accumulator: Handle, *options: Any) -> Handle:
        if accumulator.dtype.scalar != tl.bfloat16:
            return method(self, widen(a), widen(b), accumulator, *options)
        result = method(self, widen(a), widen(b), widen(accumulator), *options)
        return Handle(round_to(result.data, tl.float32, tl.bfloat16), tl.bfloat16)

    return run


def reduction(method: Callable[..., Any]) -> Callable[..., Any]:
    def promoted(tensor: Any) -> Any:
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor
        handle = widen(tensor.handle)
        shape = list(handle.data.shape)
        return tl.core.tensor(handle, tl.block_type(tl.float32, shape) if tensor.type.is_block() else tl.float32)

    def run(self: Any, tensors: tuple[Any, ...]) -> Any:
        if self.combine_fn is tl.standard._xor_combine and self.axis is not None:  # sorting: theirs loops in Python
            (tensor,) = tensors
            reduced = np.bitwise_xor.reduce(tensor.handle.data, axis=self.axis, keepdims=self.keep_dims)
            return [self.to_tensor(reduced, tensor.dtype)]
        return method(self, tuple(promoted(tensor) for tensor in tensors))

    return run


def constant(dtype: tl.dtype) -> Callable[[Any, float], Handle]:
    def make(_: Any, value: float) -> Handle:
        return Handle(round_to(np.array([value], np.float32), tl.float32, dtype), dtype)

    return make


def of_known_names(patch: Callable[..., None]) -> Callable[..., None]:
    """Return `patch`, which makes operations compute here, for names found once: theirs looks through all members of
    the language whenever a kernel calls a function, a fifth of the time."""
    packages: tuple[Any, ...] = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    names = {
        package: [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for package in packages
    }

    def run(package: Any, builder: Any, scope: Any) -> None:
        if package not in names:
            patch(package, builder, scope)
            return
        for name in names[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # else the kernel that calls this function has done it
                interpreter._patch_attr(package, name, member, builder, scope)

    return run


def indexable(patch: Callable[..., None]) -> Callable[..., None]:
    def run(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # the scope removes it with theirs

    return run
