"""A grouped linear layer whose products are float8 e4m3, forward and backward.

Shapes: R rows, E experts, O output width, I input width; B blocks of 128; P and Q as in `quant.py`.

`blockwise` scales 1 x 128 blocks of activations and gradients and 128 x 128 blocks of weights, and adds up each 128
steps of a product in fp32, since Hopper's matrix units keep about 14 bits of a float8 sum (DeepSeek-V3, arXiv
2412.19437, section 3.3.2). All three products are float8; what the backward pass needs of x is kept in float8 too.
For speed let regions start at multiples of 128 (`place(..., align=128)`): others are right, but blocks that two experts
share are multiplied twice.

`rowwise` has one scale a row of every operand, and leaves the whole sum to the matrix units, as torch's
`use_fast_accum=True` does and torchao's grouped products ask for. A model of such sums (13 bits after the leading one,
the rest cut off, 32 products at a time) at width 7168 is off by 0.2 % for operands of both signs, where the casts cost
3.9 %; but by 12 % for operands of one sign, for which `blockwise` is right. The gradient to the weight, whose sums run
over rows, stays in the dtype of x (torchao's "rowwise with high-precision weight gradient").
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from titan_kernels.grouped_gemm import check_groups, groups, joined, reference_grouped_linear, reference_weight_gradient
from titan_kernels.launch import architecture, interpreting, runs_triton
from titan_kernels.quant import (
    BLOCK,
    dequantize_1x128,
    dequantize_128x1,
    dequantize_128x128,
    quantize_1x128,
    quantize_128x1,
    quantize_128x128,
    quantize_rowwise,
)

Recipe = Literal["blockwise", "rowwise"]


def fp8_grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, recipe: Recipe = "blockwise") -> Tensor:
    """Return y_RO in the dtype of x; as `grouped_linear`, but with operands rounded to float8. Needs sm_89 or later."""
    check_groups("fp8_grouped_linear", x_RI, weight_EOI, ends_E)
    if recipe not in ("blockwise", "rowwise"):
        raise ValueError(f"fp8_grouped_linear() knows the recipes blockwise and rowwise; got {recipe!r}")
    save = torch.is_grad_enabled() and (x_RI.requires_grad or weight_EOI.requires_grad)
    op = getattr(torch.ops.titan_kernels, f"fp8_{recipe}_linear")
    return op(x_RI, weight_EOI, ends_E, save)[0]


def blockwise_product(
    q_RK: Tensor, scale_RB: Tensor, q_ENK: Tensor, scale_E: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return x @ weight[e].T for operands of `quantize_1x128` and `quantize_128x128`."""
    if _runs_fp8(q_RK):
        from titan_kernels import fp8_grouped_gemm_kernels

        return fp8_grouped_gemm_kernels.blockwise_product(q_RK, scale_RB, q_ENK, scale_E, ends_E, dtype)
    x, weight = dequantize_1x128(q_RK, scale_RB), dequantize_128x128(q_ENK, scale_E)
    return reference_grouped_linear(x, weight, ends_E).to(dtype)


def rowwise_product(
    q_RK: Tensor, scale_R: Tensor, q_ENK: Tensor, scale_EN: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return x @ weight[e].T for operands of `quantize_rowwise`."""
    if _runs_fp8(q_RK):
        from titan_kernels import fp8_grouped_gemm_kernels

        return fp8_grouped_gemm_kernels.rowwise_product(q_RK, scale_R, q_ENK, scale_EN, ends_E, dtype)
    x, weight = q_RK.float() * scale_R[:, None], q_ENK.float() * scale_EN[:, :, None]
    return reference_grouped_linear(x, weight, ends_E).to(dtype)


def blockwise_weight_gradient(
    grad_OP: Tensor, grad_scale_QO: Tensor, x_IP: Tensor, x_scale_QI: Tensor, ends_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return grad[rows of e].T @ x[rows of e] for operands of `quantize_128x1`, both quantised with the same ends."""
    if _runs_fp8(grad_OP):
        from titan_kernels import fp8_grouped_gemm_kernels

        return fp8_grouped_gemm_kernels.weight_gradient(grad_OP, grad_scale_QO, x_IP, x_scale_QI, ends_E, dtype)
    grad, x = dequantize_128x1(grad_OP, grad_scale_QO), dequantize_128x1(x_IP, x_scale_QI)
    return reference_weight_gradient(grad, x, ends_E).to(dtype)


def reference_fp8_grouped_linear(
    x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, recipe: Recipe = "blockwise"
) -> Tensor:
    """`fp8_grouped_linear` in plain torch, block by block: rounded operands, products and sums in fp32."""
    parts = []
    for expert, rows in groups(ends_E, x_RI.shape[0]):
        weight, x = weight_EOI[expert].float(), x_RI[rows].float()
        if recipe == "rowwise":
            parts.append(_rounded(x) @ _rounded(weight).T)
            continue
        total = x.new_zeros(x.shape[0], weight.shape[0])
        for k in range(0, x.shape[1], BLOCK):
            a = _rounded(x[:, k : k + BLOCK])
            for n in range(0, weight.shape[0], BLOCK):
                block = weight[n : n + BLOCK, k : k + BLOCK]
                total[:, n : n + BLOCK] += a @ _rounded(block.flatten()[None]).view_as(block).T
        parts.append(total)
    return joined([part.to(x_RI.dtype) for part in parts], x_RI, weight_EOI.shape[1])


def _rounded(x: Tensor) -> Tensor:
    """Return `x` as one scale a row leaves it."""
    q, scale = quantize_rowwise(x)
    return q.float() * scale[..., None]


def _runs_fp8(x: Tensor) -> bool:
    if runs_triton(x) and not interpreting() and architecture() < 89:
        raise RuntimeError(
            f"float8 products need compute capability 8.9 or later; this device has {architecture() / 10}. "
            "Use grouped_linear() in bfloat16 here"
        )
    return runs_triton(x)


@torch.library.custom_op("titan_kernels::fp8_blockwise_linear", mutates_args=())
def _blockwise_linear(
    x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, transposed, scale = quantize_128x128(weight_EOI)
    y = blockwise_product(*quantize_1x128(x_RI), q, scale, ends_E, x_RI.dtype)
    return (y, *quantize_128x1(x_RI, ends_E), transposed, scale) if save else (y, *_nothing(x_RI), *_nothing(x_RI))


@_blockwise_linear.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
    return (
        (y, *quantize_128x1(x_RI, ends_E), *quantize_128x128(weight_EOI)[1:])
        if save
        else (y, *_nothing(x_RI), *_nothing(x_RI))
    )


@torch.library.custom_op("titan_kernels::fp8_blockwise_backward", mutates_args=())
def _blockwise_gradients(
    grad_RO: Tensor, x_IP: Tensor, x_scale_QI: Tensor, weight_EIO: Tensor, scale: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = grad_RO.dtype
    grad_x = blockwise_product(*quantize_1x128(grad_RO), weight_EIO, scale.transpose(1, 2), ends_E, dtype)
    return grad_x, blockwise_weight_gradient(*quantize_128x1(grad_RO, ends_E), x_IP, x_scale_QI, ends_E, dtype)


@_blockwise_gradients.register_fake
def _(
    grad_RO: Tensor, x_IP: Tensor, x_scale_QI: Tensor, weight_EIO: Tensor, scale: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    experts, width, out = weight_EIO.shape
    return grad_RO.new_empty(grad_RO.shape[0], width), grad_RO.new_empty(experts, out, width)


@torch.library.custom_op("titan_kernels::fp8_rowwise_linear", mutates_args=())
def _rowwise_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = rowwise_product(*quantize_rowwise(x_RI), *quantize_rowwise(weight_EOI), ends_E, x_RI.dtype)
    return (y, *quantize_rowwise(weight_EOI.transpose(1, 2))) if save else (y, *_nothing(x_RI))


@_rowwise_linear.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])
    return (y, *quantize_rowwise(weight_EOI.transpose(1, 2))) if save else (y, *_nothing(x_RI))


@torch.library.custom_op("titan_kernels::fp8_rowwise_backward", mutates_args=())
def _rowwise_gradients(
    grad_RO: Tensor, x_RI: Tensor, weight_EIO: Tensor, scale_EI: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x = rowwise_product(*quantize_rowwise(grad_RO), weight_EIO, scale_EI, ends_E, grad_RO.dtype)
    return grad_x, torch.ops.titan_kernels.grouped_weight_gradient(grad_RO, x_RI, ends_E)


@_rowwise_gradients.register_fake
def _(grad_RO: Tensor, x_RI: Tensor, weight_EIO: Tensor, scale_EI: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    experts, width, out = weight_EIO.shape
    return torch.empty_like(x_RI), x_RI.new_empty(experts, out, width)


def _nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0), x.new_empty(0)


def _save_blockwise(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:], inputs[2])


def _blockwise_backward(ctx: Any, grad_RO: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_RO is None:
        return (None,) * 4
    return *torch.ops.titan_kernels.fp8_blockwise_backward(grad_RO, *ctx.saved_tensors), None, None


_blockwise_linear.register_autograd(_blockwise_backward, setup_context=_save_blockwise)


def _save_rowwise(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], *output[1:], inputs[2])


def _rowwise_backward(ctx: Any, grad_RO: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_RO is None:
        return (None,) * 4
    return *torch.ops.titan_kernels.fp8_rowwise_backward(grad_RO, *ctx.saved_tensors), None, None


_rowwise_linear.register_autograd(_rowwise_backward, setup_context=_save_rowwise)
