"""Every step of a map, in both directions, region by region; and the accounting for names and shapes."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.interop.samples import assert_same, tensors
from titan_core.declare.parameters import Constant, Parameter
from titan_core.declare.weights import Drop, Link, Part, Rotary, Split, Stack, SwapHalves, Transpose
from titan_core.interop.boxes import cut, runs
from titan_core.interop.mapping import work_out
from titan_core.interop.safetensors import SafetensorsSource
from titan_core.interop.views import CastView, OurView, TheirView, halves_to_pairs, unequal_copies
from titan_core.runtime.errors import CheckpointError
from titan_core.runtime.torch_archive import bytes_view


class Memory:
    """A source of given tensors."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values
        self.index = {name: (tuple(t.shape), t.dtype) for name, t in values.items()}

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        return self.values[name][tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]

    def locate(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> None:
        return None


def parameter(name: str, *shape: int) -> Parameter:
    return Parameter(name, shape, "hidden", Constant(0.0))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# ours, the rules, and what theirs must be
W = numbers(12, 5)
EXPERTS = numbers(11, 6, 4)  # more than ten: they are counted as numbers, not as words
CASES = {
    "rename": ({"a": W}, [Link("a", "b")], {"b": W}),
    "transpose": ({"a": W}, [Link("a", "b", (Transpose(0, 1),))], {"b": W.T}),
    "rotary": (
        {"a": W},
        [Link("a", "b", (Rotary(6),))],
        {"b": W.view(2, 3, 2, 5).transpose(1, 2).reshape(12, 5)},
    ),
    "join": (
        {"a": W, "c": numbers(4, 5)},
        [Link("a", "b", (Part(0, 0, 16),)), Link("c", "b", (Part(0, 12, 16),))],
        {"b": torch.cat([W, numbers(4, 5)])},
    ),
    "split": (
        {"a": W},
        [Link("a", "{part}/a", (Split(0, 3),))],
        {f"{i:02d}/a": part for i, part in enumerate(W.chunk(3))},
    ),
    "split columns": (
        {"a": numbers(4, 6)},
        [Link("a", "{part}/a", (Split(1, 2),))],
        {f"{i:02d}/a": part for i, part in enumerate(numbers(4, 6).chunk(2, 1))},
    ),
    "swap halves": ({"a": W}, [Link("a", "b", (SwapHalves(0),))], {"b": torch.cat([W[6:], W[:6]])}),
    "stack": (
        {"layers.3.w": EXPERTS},
        [Link("layers.{layer}.w", "l.{layer}.e.{expert}.w", (Stack(),))],
        {f"l.3.e.{i}.w": EXPERTS[i] for i in range(11)},
    ),
    "stack and transpose": (
        {"w": EXPERTS},
        [Link("w", "e.{expert}", (Stack(), Transpose(0, 1)))],
        {f"e.{i}": EXPERTS[i].T for i in range(11)},
    ),
    "gate and up in one, transposed": (
        {"w1": EXPERTS, "w3": EXPERTS + 1},
        [
            Link("w1", "gate_up", (Transpose(1, 2), Part(2, 0, 12))),
            Link("w3", "gate_up", (Transpose(1, 2), Part(2, 6, 12))),
        ],
        {"gate_up": torch.cat([EXPERTS.transpose(1, 2), EXPERTS.transpose(1, 2) + 1], -1)},
    ),
    "fused qkv in two parts": (
        {"q": numbers(8, 3), "k": numbers(4, 3), "v": numbers(4, 3) + 1},
        [
            Link("q", "{part}/qkv", (Split(0, 2), Part(0, 0, 8))),
            Link("k", "{part}/qkv", (Split(0, 2), Part(0, 4, 8))),
            Link("v", "{part}/qkv", (Split(0, 2), Part(0, 6, 8))),
        ],
        {
            f"{i:02d}/qkv": torch.cat(
                [numbers(8, 3).chunk(2)[i], numbers(4, 3).chunk(2)[i], numbers(4, 3).chunk(2)[i] + 1]
            )
            for i in range(2)
        },
    ),
    "copies": ({"a": W}, [Link("a", "b", copies=("c", "d"))], {"b": W, "c": W, "d": W}),
    "scalar": ({"a": torch.tensor(3.0)}, [Link("a", "b")], {"b": torch.tensor(3.0)}),
}


@pytest.mark.parametrize("name", CASES)
def test_both_directions_whole_and_in_regions(name: str) -> None:
    ours, rules, theirs = CASES[name]
    mapping = work_out(rules, [parameter(n, *t.shape) for n, t in ours.items()])
    mapping.check_theirs(Memory(theirs).index, "here")
    mapping.check_ours(Memory(ours).index, "here")
    into, out = OurView(Memory(theirs), mapping), TheirView(Memory(ours), mapping)
    assert_same(tensors(into), ours)
    assert_same(tensors(out), theirs)
    generator = random.Random(0)
    for view, whole in ((into, ours), (out, theirs)):
        for key, tensor in whole.items():
            for _ in range(20):
                start = tuple(generator.randrange(n) for n in tensor.shape)
                size = tuple(generator.randint(1, n - at) for n, at in zip(tensor.shape, start, strict=True))
                expected = tensor[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
                assert torch.equal(view.read(key, start, size), expected), (key, start, size)


@pytest.mark.parametrize("name", CASES)
def test_what_is_located_is_what_is_read(name: str, tmp_path: Path) -> None:
    """Bytes that are copied from their place are those of the tensor, and plain tensors do have a place."""
    ours, rules, theirs = CASES[name]
    mapping = work_out(rules, [parameter(n, *t.shape) for n, t in ours.items()])
    for side, stored in (("ours", ours), ("theirs", theirs)):
        (tmp_path / side).mkdir()
        copies = {key: tensor.clone().contiguous() for key, tensor in stored.items()}
        save_file(copies, tmp_path / side / "model.safetensors")
    views = (
        OurView(SafetensorsSource(tmp_path / "theirs"), mapping),
        TheirView(SafetensorsSource(tmp_path / "ours"), mapping),
    )
    buffer = memoryview(bytearray(24))
    for view in views:
        for key, (shape, _) in view.index.items():
            for slab in cut(key, shape, 4, 40):
                run = view.locate(key, slab.start, slab.size)
                if run is not None:
                    found = b"".join(bytes(chunk) for chunk in run.chunks(buffer))
                    assert found == bytes(bytes_view(view.read(key, slab.start, slab.size).contiguous())), (key, slab)
                assert run is not None or name not in ("copies", "scalar"), (key, slab)


def test_rotary_rows_are_those_of_the_published_conversion() -> None:
    rows = torch.arange(8.0)  # one head of 8: halves (0..3, 4..7) become pairs
    assert halves_to_pairs(rows, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    mapping = work_out(
        [Link("a", "x"), Link("b", "y"), Drop("{n}.freq", "computed")], [parameter("a", 2), parameter("b", 3)]
    )
    index = Memory({"x": numbers(5), "z": numbers(1), "7.freq": numbers(1)}).index
    with pytest.raises(CheckpointError) as raised:
        mapping.check_theirs(index, "folder")
    assert "1 tensors are missing: y." in raised.value.message
    assert "1 tensors are unknown: z." in raised.value.message
    assert "x is [5], wanted [2]" in raised.value.message
    assert "freq" not in raised.value.message
    with pytest.raises(CheckpointError, match=r"2 tensors are missing: a, b"):
        mapping.check_ours({}, "folder")


def test_copies_that_differ_are_found() -> None:
    mapping = work_out([Link("a", "b", copies=("c",), optional_copies=("d",))], [parameter("a", 3)])
    assert unequal_copies(Memory({"b": numbers(3), "c": numbers(3), "d": numbers(3)}), mapping) == []
    assert unequal_copies(Memory({"b": numbers(3), "c": numbers(3) + 1}), mapping) == ["c"]
    assert unequal_copies(Memory({"b": numbers(3), "c": numbers(3), "d": -numbers(3)}), mapping) == ["d"]
    assert "d" not in TheirView(Memory({"a": numbers(3)}), mapping).index


def test_parts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"`a` has 5 rows, which do not divide into 2 parts"):
        work_out([Link("a", "{part}/a", (Split(0, 2),))], [parameter("a", 5)])


def test_a_map_with_a_gap_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="is not filled once"):
        work_out([Link("a", "b", (Part(0, 0, 6),))], [parameter("a", 5)])
    with pytest.raises(AssertionError, match="no rule for `b`"):
        work_out([Link("a", "b")], [parameter("a", 5), parameter("b", 5)])


def test_cast_leaves_integers_alone() -> None:
    view = CastView(Memory({"a": numbers(3), "i": torch.tensor([1, 2])}), torch.bfloat16)
    assert tensors(view)["a"].dtype == torch.bfloat16
    assert tensors(view)["i"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("shape", "limit"), [((7, 5), 50), ((3, 4, 6), 30), ((5,), 8), ((), 1), ((600, 3), 6200), ((0, 3), 4)]
)
def test_slabs_fill_a_tensor_in_order(shape: tuple[int, ...], limit: int) -> None:
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    slabs = list(cut("a", shape, 4, limit))
    read = [Memory({"a": values}).read("a", s.start, s.size).reshape(-1) for s in slabs]
    assert torch.equal(torch.cat(read), values.reshape(-1))
    assert all(s.numel * 4 <= max(limit, 4) for s in slabs)


def test_runs_of_a_region() -> None:
    length, starts = runs((4, 6), (1, 2), (2, 3))
    assert (length, list(starts)) == (3, [8, 14])
    length, starts = runs((4, 6), (1, 0), (2, 6))
    assert (length, list(starts)) == (12, [6])
    length, starts = runs((), (), ())
    assert (length, list(starts)) == (1, [0])
