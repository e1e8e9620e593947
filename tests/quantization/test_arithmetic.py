"""Forward and gradients of quantized layers against arithmetic written anew."""

from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchao", reason="torchao is not installed")

from torchao.prototype.moe_training import mxfp8_grouped_mm
from torchao.quantization.quantize_.common import KernelPreference

from tests.quantization import oracle
from tests.ranks import run_ranks
from titan_core.nn.layers import Linear
from titan_core.quantization import float8, mx, mx_experts

FLOAT8 = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
OLD_TORCH = torch.__version__.startswith("2.11.")


def layer_of(recipe: str, *, emulate: bool = True) -> Linear:
    plain = Linear(64, 96)
    torch.nn.init.normal_(plain.weight, std=0.1)
    if recipe in FLOAT8:
        return float8.Float8Linear(plain, float8.Arithmetic.of(recipe, emulate=emulate))
    return mx.MXLinear(plain, mx.Arithmetic.of(recipe, "triton"))


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations have outliers: some of these are a hundred times the others."""
    x = torch.randn(*shape) * torch.where(torch.rand(*shape) < 0.01, 100.0, 1.0)
    return x.to(dtype)


def three(layer: Linear, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    assert x.grad is not None
    assert layer.weight.grad is not None
    return y.detach(), x.grad, layer.weight.grad


def error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest wanted number."""
    return ((found.double() - wanted.double()).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("recipe", oracle.RECIPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_output_and_gradients_equal_the_oracle(recipe: str, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    layer = layer_of(recipe)
    layer.compute_dtype = dtype
    x, g = numbers(2, 32, 64, dtype=dtype), numbers(2, 32, 96, dtype=dtype)
    x[0, 0, :32] = 0  # a block and, with the next line, a row of nothing
    g[1, 5] = 0
    found = three(layer, x, g)
    w = layer.weight.detach().to(dtype)
    wanted = oracle.linear(x.flatten(0, 1), w, g.flatten(0, 1), oracle.RECIPES[recipe])
    exact = oracle.linear(x.flatten(0, 1), w, g.flatten(0, 1), oracle.Recipe(*[Tensor.double] * 6))
    assert found[0].dtype == found[1].dtype == dtype
    assert found[2].dtype == torch.float32
    for name, one, want, full in zip(("output", "input", "weight"), found, wanted, exact, strict=True):
        assert error(one.flatten(0, -2), want) < bound, name
        if recipe == "rowwise_with_gw_hp" and name == "weight":
            assert error(one, full) < bound
        else:
            assert error(want, full) > 5e-3, f"{name} is not quantized"


@pytest.mark.parametrize("recipe", ["rowwise", "tensorwise"])
def test_scales_are_powers_of_two_where_the_recipe_says_so(recipe: str) -> None:
    torch.manual_seed(1)
    layer = layer_of(recipe)
    x, w = numbers(32, 64), layer.weight.detach()
    dim = 1 if recipe == "rowwise" else None
    two, any_scale = (
        oracle.scaled(x, oracle.E4M3, dim, p) @ oracle.scaled(w, oracle.E4M3, dim, p).T for p in (True, False)
    )
    right, wrong = (two, any_scale) if recipe == "rowwise" else (any_scale, two)
    y = layer(x).detach()
    assert error(y, right) < 2e-6
    assert error(y, wrong) > 1e-3


@pytest.mark.parametrize("recipe", FLOAT8)
def test_emulation_equals_the_float8_matmul_of_torch(recipe: str) -> None:
    if OLD_TORCH and recipe != "tensorwise":
        pytest.skip("torch 2.11 has no rowwise float8 matmul on CPUs")
    x, g = numbers(32, 64, dtype=torch.bfloat16), numbers(32, 96, dtype=torch.bfloat16)
    found = []
    for emulate in (True, False):
        torch.manual_seed(2)
        layer = layer_of(recipe, emulate=emulate)
        layer.compute_dtype = torch.bfloat16
        found.append(three(layer, x, g))
    for emulated, real in zip(*found, strict=True):
        assert error(emulated, real) < 8e-3


def test_rounding_equals_the_cast_of_torch() -> None:
    """The oracle's own rounding, against torch's: subnormals, ties, and all magnitudes that the formats have."""
    torch.manual_seed(3)
    x = torch.randn(20000) * torch.exp2(torch.randint(-18, 8, (20000,)).float())
    for form, dtype in ((oracle.E4M3, torch.float8_e4m3fn), (oracle.E5M2, torch.float8_e5m2)):
        kept = x.clamp(-form.largest, form.largest)
        assert torch.equal(oracle.rounded(kept, form), kept.to(dtype).double())


ENDS = torch.tensor([96, 96, 224], dtype=torch.int32)  # an expert without rows, and rows that are nobody's


def of_experts(product, x: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = product(x, weight, ENDS)
    y.backward(g)
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach()[: ENDS[-1]], x.grad[: ENDS[-1]], weight.grad


def operands_of_experts(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    return numbers(256, 64, dtype=dtype), numbers(3, 96, 64, dtype=dtype), numbers(256, 96, dtype=dtype)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_products_of_experts_equal_the_oracle(exact: bool, dtype: torch.dtype, bound: float) -> None:
    x, weight, g = operands_of_experts(dtype)
    found = of_experts(mx_experts.product_of("mxfp8_emulated" + "_wgrad_with_hp" * exact), x, weight, g)
    recipe = oracle.RECIPES["mxfp8_emulated_rceil"]
    recipe = recipe._replace(g_for_w=Tensor.double, x_for_w=Tensor.double) if exact else recipe
    parts = [oracle.linear(x[:96], weight[0], g[:96], recipe), oracle.linear(x[96:224], weight[2], g[96:224], recipe)]
    assert error(found[0], torch.cat([part[0] for part in parts])) < bound
    assert error(found[1], torch.cat([part[1] for part in parts])) < bound
    for one, want in ((0, parts[0][2]), (2, parts[1][2])):
        assert error(found[2][one], want) < bound
    assert not found[2][1].any()


@pytest.mark.parametrize("recipe", ["mxfp8", "mxfp8_wgrad_with_hp"])
def test_products_of_experts_equal_what_torchao_emulates(recipe: str, monkeypatch) -> None:
    """The path of a GPU, with torchao's own emulation in the place of its kernels."""
    plain = mxfp8_grouped_mm._to_mxfp8_then_scaled_grouped_mm
    emulate = partial(plain, kernel_preference=KernelPreference.EMULATED)
    monkeypatch.setattr(mxfp8_grouped_mm, "_to_mxfp8_then_scaled_grouped_mm", emulate)
    operands = operands_of_experts(torch.bfloat16)
    found = of_experts(mx_experts.product_of(recipe.replace("mxfp8", "mxfp8_emulated")), *operands)
    for one, theirs in zip(found, of_experts(mx_experts.product_of(recipe), *operands), strict=True):
        assert torch.equal(one, theirs)


def _compiled_and_eager(recipe: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(4)
    layer = layer_of(recipe)
    x, g = numbers(32, 64), numbers(32, 96)
    eager = three(layer, x, g)
    layer.weight.grad = None
    layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    return [three(layer, x, g), eager]


@pytest.mark.parametrize("recipe", oracle.RECIPES)
def test_a_compiled_layer_gives_the_same_bits(recipe: str) -> None:
    """In a process of its own: the compiler starts a thread, and later tests fork."""
    ((compiled, eager),) = run_ranks(_compiled_and_eager, 1, recipe)
    for one, other in zip(compiled, eager, strict=True):
        assert torch.equal(one, other)
