"""Which layers are converted, what is said about the others, and what is refused."""

import sys

import pytest
import torch
from torch import nn

pytest.importorskip("torchao", reason="torchao is not installed")

from tests.runs import tiny
from titan_core.config.checks import remarks
from titan_core.config.load import load
from titan_core.config.quantize import FLOAT8, MX, MX_EXPERTS
from titan_core.models import resolve
from titan_core.nn.experts import Experts
from titan_core.nn.layers import Linear
from titan_core.parallel.mesh import Layout, Mesh
from titan_core.quantization import choose, convert
from titan_core.quantization.float8 import Float8Linear
from titan_core.quantization.mx import MXLinear
from titan_core.runtime.distributed import World
from titan_core.runtime.errors import ConfigError, MachineError
from titan_core.training.build import build_model

CPU = torch.device("cpu")
ALONE = Layout()


def converted(converter: str = FLOAT8, *, emulate: bool = True, layout: Layout = ALONE, device=CPU, **changes):
    """Return the tiny model of a config on the meta device, converted, and what was said."""
    if converter == FLOAT8:
        changes = {f"{FLOAT8}.emulate": emulate, **changes}
    elif emulate:
        changes = {f"{MX}.recipe_name": "mxfp8_emulated", **changes}
    config = tiny("unused", **{"model.converters": converter, **changes}).config
    family, sizes = resolve(config.model)
    with torch.device("meta"):
        model = family.build(sizes)
    return model, convert(model, family, sizes, config, layout, device)


def names_of(model: nn.Module, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is kind]


def test_every_hidden_layer_is_converted_and_the_head_is_not() -> None:
    model, said = converted()
    assert names_of(model, Linear) == ["output"]
    assert len(names_of(model, Float8Linear)) == 2 * 7
    assert said == ["float8 tensorwise, emulated, in 14 of 15 linear layers (left out: 1 of role `output`: output)"]


def test_filters_are_parts_of_names_and_alike_layers_are_said_once() -> None:
    _, said = converted(**{f"{FLOAT8}.filter_fqns": "attention.wk,1.feed_forward,outputs,output"})
    assert said == [
        "float8 tensorwise, emulated, in 9 of 15 linear layers (left out: 5 by filter_fqns: layers.*.attention.wk, "
        "layers.*.feed_forward.w1, layers.*.feed_forward.w2, layers.*.feed_forward.w3; 1 of role `output`: output)",
        "`outputs` of filter_fqns matches nothing",
    ]


@pytest.mark.parametrize(("converter", "width", "multiple"), [(FLOAT8, 56, 16), (MX, 48, 32)])
def test_sides_that_do_not_divide_are_left_out(converter: str, width: int, multiple: int) -> None:
    model, said = converted(converter, **{"model.args.ffn_dim": width, f"{converter}.filter_fqns": ""})
    kind = Float8Linear if converter == FLOAT8 else MXLinear
    left = f"4 of {width} x 32, no multiples of {multiple}: layers.*.feed_forward.w1, layers.*.feed_forward.w3"
    assert left in said[0]
    if converter == FLOAT8:
        assert "in 8 of 15 linear layers" in said[0]
    else:  # the keys and values of the tiny model have 16 rows
        assert "mxfp8_emulated in 4 of 15 linear layers" in said[0]
        assert "4 of 16 x 32, no multiples of 32: layers.*.attention.wk, layers.*.attention.wv" in said[0]
    assert not any("feed_forward" in name for name in names_of(model, kind))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_small_layers_are_those_that_torchao_would_leave(recipe) -> None:
    from torchao.float8 import _auto_filter_for_recipe

    theirs = _auto_filter_for_recipe(recipe, [])
    sides = (512, 1024, 1040, 2048, 2064, 4096, 4112, 8192)
    for rows in sides:
        for columns in sides:
            layer = nn.Linear(columns, rows, bias=False, device="meta")
            assert choose.pays(rows, columns, recipe) == theirs(layer, "layer"), (rows, columns)


def test_the_automatic_filter_keeps_what_pays() -> None:
    """The sides of Llama 3 8B: keys and values are 1024 x 4096."""
    _, said = converted(
        **{
            "model.args.dim": 4096, "model.args.n_heads": 32, "model.args.n_kv_heads": 8, "model.args.ffn_dim": 14336,
            f"{FLOAT8}.filter_fqns": "auto_filter_small_kn",
        }
    )  # fmt: skip
    assert "in 10 of 15 linear layers" in said[0]
    assert "4 of 1024 x 4096, too small to pay: layers.*.attention.wk, layers.*.attention.wv" in said[0]


def test_a_converter_that_would_convert_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no linear layer to convert; left out: .*too small to pay"):
        converted(**{f"{FLOAT8}.filter_fqns": "auto_filter_small_kn"})


def test_what_counts_is_the_part_of_a_rank() -> None:
    """Of sides that are multiples of 16, tensor parallelism leaves those whose half is one too."""
    _, said = converted(layout=Layout(tp=2))
    left = "4 of 8 x 32, no multiples of 16: layers.*.attention.wk, layers.*.attention.wv"
    assert left in said[0]
    assert "4 of 24 x 32, no multiples of 16: layers.*.feed_forward.w1, layers.*.feed_forward.w3" in said[0]
    assert "2 of 32 x 24, no multiples of 16: layers.*.feed_forward.w2" in said[0]
    assert "in 4 of 15 linear layers" in said[0]


def test_weights_that_shards_do_not_divide_are_gathered_as_before() -> None:
    gather = {f"{FLOAT8}.enable_fsdp_float8_all_gather": True}
    assert converted(layout=Layout(dp_shard=2), **gather)[1][-1] == "14 of them gathered in float8"
    assert (
        converted(layout=Layout(dp_shard=16, cp=2), **gather)[1][-1] == "6 of them gathered in float8"
    )  # of 32 rows; 16 and 48 do not
    assert converted(**gather)[1][-1] == "nothing to gather in float8: weights are not sharded"


def test_parameters_are_the_same_with_and_without() -> None:
    found = []
    for changes in ({}, {"model.converters": FLOAT8, f"{FLOAT8}.emulate": True}):
        config = tiny("unused", **changes).config
        family, sizes = resolve(config.model)
        built = build_model(config, World(0, 1, 0, CPU), Mesh(Layout(), "cpu"), family, sizes, 3, global_batch=8)
        found.append(dict(built.models[0].named_parameters()))
    assert list(found[0]) == list(found[1])
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("converter", "capability", "said", "advised"),
    [
        (FLOAT8, None, "float8 matmuls need a GPU, and this run is on the CPU", "set quantize.linear.float8.emulate"),
        (FLOAT8, (8, 0), "need compute capability 8.9, and an A100 has 8.0", "set quantize.linear.float8.emulate"),
        (MX, None, "MXFP8 matmuls need a GPU", "set quantize.linear.mx.recipe_name to mxfp8_emulated:"),
        (MX, (9, 0), "need compute capability 10.0, and an A100 has 9.0", "to mxfp8_emulated:"),
    ],
)
def test_a_device_that_cannot_is_refused(converter, capability, said: str, advised: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    with pytest.raises(MachineError) as caught:
        converted(converter, emulate=False, device=CPU if capability is None else torch.device("cuda"))
    assert said in caught.value.message
    assert caught.value.tip is not None
    assert advised in caught.value.tip


def test_a_device_that_can_is_not_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    _, said = converted(emulate=False, device=torch.device("cuda"))
    assert said[0].startswith("float8 tensorwise in 14 of 15 linear layers")


EXPERTS = {"model.name": "qwen3", "model.args.head_dim": 8, "model.args.num_experts": 4, "model.args.top_k": 2}


@pytest.mark.parametrize(
    ("capability", "said", "advised"),
    [
        (None, "MXFP8 matmuls need a GPU, and this run is on the CPU", "to mxfp8_emulated:"),
        ((9, 0), "need compute capability 10.0, and an A100 has 9.0", "to mxfp8_emulated:"),
        ((10, 0), "torchao's MXFP8 casts need", "pip install nvidia-cutlass-dsl"),
        ((12, 0), "this torchao has no MXFP8 products of experts for this GPU", "to mxfp8_emulated:"),
    ],
)
def test_a_device_that_cannot_multiply_by_experts_is_refused(capability, said: str, advised: str, monkeypatch) -> None:
    from torchao.prototype.moe_training.kernels.mxfp8 import quant

    missing = ["nvidia-cutlass-dsl"] if capability == (10, 0) else []
    monkeypatch.setattr(quant, "_missing_cutedsl_runtime_packages", lambda: missing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    with pytest.raises(MachineError) as caught:
        converted(MX_EXPERTS, emulate=False, device=CPU if capability is None else torch.device("cuda"), **EXPERTS)
    assert said in caught.value.message
    assert advised in str(caught.value.tip)


def test_experts_are_counted_and_chosen_by_name() -> None:
    changes = {**EXPERTS, f"{MX_EXPERTS}.recipe_name": "mxfp8_emulated"}
    model, said = converted(MX_EXPERTS, emulate=False, **changes)
    assert said == ["experts of 2 blocks in MXFP8 (mxfp8_emulated)"]
    assert {m.align for m in model.modules() if isinstance(m, Experts)} == {32}
    model, said = converted(MX_EXPERTS, emulate=False, **changes, **{f"{MX_EXPERTS}.fqns": "layers.1"})
    assert said == ["experts of 1 block in MXFP8 (mxfp8_emulated)"]
    assert [m.product is None for m in model.modules() if isinstance(m, Experts)] == [True, False]


@pytest.mark.parametrize(("converter", "module"), [(FLOAT8, "float8"), (MX, "mx")])
def test_a_missing_torchao_is_named_with_the_line_that_installs_it(converter, module, monkeypatch) -> None:
    import titan_core.quantization as package

    monkeypatch.delitem(sys.modules, f"titan_core.quantization.{module}")
    monkeypatch.delattr(package, module)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MachineError, match="`torchao`, which is not installed") as caught:
        converted(converter)
    assert caught.value.tip == "pip install 'titan-pretrain[quant]'"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({f"{FLOAT8}.recipe_name": "rowwise"}, f"`{FLOAT8}.recipe_name` does nothing"),
        ({f"{FLOAT8}.emulate": "true"}, f"`{FLOAT8}.emulate` does nothing"),
        ({f"{MX_EXPERTS}.recipe_name": "mxfp8_emulated"}, f"`{MX_EXPERTS}.recipe_name` does nothing"),
        ({"parallelism.expert_parallel_capacity": "3"}, "does nothing: `expert_parallel_degree` is 1"),
        (
            {"model.converters": FLOAT8, f"{FLOAT8}.precompute_float8_dynamic_scale_for_fsdp": "true"},
            "does nothing without `enable_fsdp_float8_all_gather`",
        ),
    ],
)
def test_options_that_nothing_reads_are_remarked(flags: dict[str, str], said: str) -> None:
    (found,) = remarks(load(None, list(flags.items())).config)
    assert said in found
