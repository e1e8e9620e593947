"""Float8 training arithmetic (Micikevicius et al. 2022) by torchao: matmuls on operands scaled into 8 bits.

Each of a layer's three matmuls (output, gradient of the input, gradient of the weight) scales its operands so that the
largest magnitude becomes the largest float8 number, rounds them, multiplies, and divides by the scales. `tensorwise`
has one scale a tensor, e4m3 for inputs and weights and e5m2 for gradients. `rowwise` has one scale a row of the left
operand and a column of the right one, e4m3 throughout, scales rounded down to powers of two. `rowwise_with_gw_hp` keeps
the gradient of the weight in high precision, and scales the weight as one tensor for the gradient of the input.

A scale is that of what one rank multiplies: over the tokens of its microbatch (tensorwise; rowwise in the gradient of
the weight), and over its part of a weight that tensor parallelism splits. So results are rounded a little differently
in another layout; least of all those of `rowwise_with_gw_hp`, whose scales meet no two tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.float8 import Float8LinearConfig, LinearMMConfig, ScaledMMConfig
from torchao.float8.config import e4m3_dtype
from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
from torchao.float8.float8_utils import amax_to_scale, to_fp8_saturated
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

from titan_core.quantization.choose import Recipe
from titan_core.quantization.layer import QuantizedLinear


@dataclass(frozen=True)
class Arithmetic:
    """torchao's description of a recipe; one for all layers."""

    recipe: Recipe
    casts: Float8LinearConfig
    matmuls: LinearMMConfig

    @staticmethod
    def of(recipe: Recipe, *, emulate: bool) -> Arithmetic:
        """Describe a recipe. Emulated, operands are rounded to float8 all the same, and multiplied in fp32."""
        casts = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
        gemms = (casts.gemm_config_output, casts.gemm_config_grad_input, casts.gemm_config_grad_weight)
        return Arithmetic(
            recipe, casts, LinearMMConfig(*(ScaledMMConfig(emulate, gemm.use_fast_accum) for gemm in gemms))
        )


class Float8Linear(QuantizedLinear[Arithmetic]):
    """A `Linear` whose matmuls take float8 operands."""

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype in which a `Linear` would compute."""
        weight, dtype = self.weight, self.dtype
        product = matmul_with_hp_or_float8_args.apply(
            x_ND.to(dtype), weight.to(dtype).t(), self.arithmetic.matmuls, self.arithmetic.casts
        )
        return self.add_bias(product)

    def gather_in_float8(self) -> None:
        """Make FSDP gather the weight in float8, a quarter or half of the bytes, with one scale for all ranks.

        The parameter becomes torchao's subclass, which FSDP asks what to send; the numbers stay those of the master
        weight, in a tensor inside of it.
        """
        weight = WeightWithDynamicFloat8CastTensor(self.weight.detach(), self.arithmetic.matmuls, e4m3_dtype)
        self.weight = nn.Parameter(weight)


class Float8Wire:
    """Tensors on their way between ranks: e4m3 with the one scale that `tensorwise` layers will find again.

    The largest magnitude survives the rounding, so a layer that casts what arrives comes to the same scale and the same
    float8 numbers as if it had cast what was sent.
    """

    def pack(self, x: Tensor, largest: Tensor) -> Tensor:
        """Return x in e4m3, scaled by the largest magnitude of all ranks."""
        return to_fp8_saturated(x.float() * amax_to_scale(largest, e4m3_dtype), e4m3_dtype)

    def unpack(self, packed: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the numbers that e4m3 stands for."""
        return (packed.float() / amax_to_scale(largest, e4m3_dtype)).to(dtype)


def gather_in_float8(layers: Sequence[Float8Linear], shards: int) -> int:
    """Gather those weights in float8 that divide evenly over the shards, and return how many do.

    FSDP pads the others, which torchao's subclass does not (0.18): they are gathered as they would be without it.
    """
    even = [layer for layer in layers if layer.weight.shape[0] % shards == 0]
    for layer in even:
        layer.gather_in_float8()
    return len(even)


def precompute_scales(module: nn.Module) -> None:
    """Reduce the largest magnitudes of all weights that are gathered in float8 at once, before every forward.

    Without it FSDP waits for one reduction a weight and gather. Registered after sharding, so that it runs before
    FSDP's own hook; at every forward, so that weights that were loaded or updated never meet an old scale.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Float8Linear) and _master(layer) is not None]
    if not layers:
        return
    mesh = layers[0].weight.device_mesh  # pyright: ignore[reportAttributeAccessIssue]
    group = mesh.get_group(mesh.ndim - 1)  # of (replicate, shard) the second

    @torch.no_grad()
    def compute(*_: Any) -> None:
        masters = [master for layer in layers if (master := _master(layer)) is not None]
        if not masters:  # all whole from the forward before, as FSDP keeps them under pipelining
            return
        largest = torch.stack(torch._foreach_norm([master._tensor for master in masters], math.inf))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        for master, scale in zip(masters, amax_to_scale(largest, e4m3_dtype), strict=True):
            master._precomputed_scale = scale

    module.register_forward_pre_hook(compute, prepend=True)


def _master(layer: Float8Linear) -> Any:
    """Return this rank's shard of a weight that is gathered in float8, or None."""
    local = layer.weight.to_local() if isinstance(layer.weight, DTensor) else None
    return local if isinstance(local, WeightWithDynamicFloat8CastTensor) else None


def prepare_compiler(recipe: Recipe) -> None:
    """Make inductor generate correct float8 casts; for the whole process, as these are the compiler's own settings."""
    import torch._inductor.config
    from torchao.float8._inductor_patch import _patch_inductor_min_max_codegen

    _patch_inductor_min_max_codegen()  # wrong stores of float8: triton-lang/triton#11111; goes when torchao drops it
    if recipe == "rowwise":  # fused scales round differently from eager ones: pytorch/pytorch#150859
        torch._inductor.config.emulate_precision_casts = True
