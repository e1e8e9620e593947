"""The benchmarks of kernels: what is right is timed, what is wrong is not, and the work is counted by formula."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ranks import apart, run_ranks
from titan_core.jobs.bench import attention, fused_ce, moe_gemm, passes, permute, plot, pointwise, run, timing
from titan_core.jobs.bench.case import Absent, Case, Prepared, run_case, worst_row
from titan_core.jobs.bench.collectives import COLLECTIVES
from titan_core.jobs.bench.collectives import run as run_collectives
from titan_core.jobs.bench.inputs import Draw
from titan_core.jobs.bench.request import PRESETS, Grouped, Request, read_shapes
from titan_core.jobs.bench.roofline import Roofline
from titan_core.jobs.bench.run import OPERATIONS, Report
from titan_core.jobs.bench.timing import Timer
from titan_core.runtime.distributed import World
from titan_core.runtime.errors import TitanError, UsageError

CPU = torch.device("cpu")
ROOFLINE = Roofline("a test", {"bf16": 4e12, "fp32": 1e12, "fp8": None}, 1e11, None)
QUICK = Request(shapes=(Grouped(70, 48, 64, 3),), reduced=True)


def draw() -> Draw:
    return Draw(CPU, seed=5)


def timer() -> Timer:
    return Timer(CPU, budget=1e-4)


# ------------------------------------------------------------------------------------------------ the rule


def case_of(backends: dict) -> Case:
    return Case(
        operation="double",
        shape="8",
        part="fwd",
        dtype="bf16",
        flops=8e6,
        moved=1e6,
        inputs=lambda: torch.arange(1.0, 9.0)[None],
        reference=lambda x: [2 * x.double()],
        backends=backends,
    )


def test_only_what_is_right_is_timed() -> None:
    calls = dict.fromkeys(("titan", "wrong", "nan", "prepared"), 0)

    def backend(name: str, factor: float):
        def prepare(x: Tensor):
            def call() -> Tensor:
                calls[name] += 1
                return factor * x

            return call

        return prepare

    def absent(_: Tensor):
        raise Absent("pip install it")

    def failing(_: Tensor):
        raise RuntimeError("no kernel image\nand a long traceback")

    def padded(x: Tensor) -> Prepared:
        calls["prepared"] += 1
        return Prepared(lambda: torch.cat([2 * x, x], 1), lambda out: out[:, :8])

    backends = {
        "wrong": backend("wrong", 2.1),
        "nan": backend("nan", math.nan),
        "absent": absent,
        "failing": failing,
        "padded": padded,
        "titan": backend("titan", 2.0),
    }
    rows = {row.backend: row for row in run_case(case_of(backends), timer(), ROOFLINE, ())}
    assert next(iter(rows)) == "titan"  # first, so that others have something to be compared with
    verdicts = {name: row.verdict for name, row in rows.items()}
    assert verdicts == {
        "titan": "right",
        "wrong": "wrong",
        "nan": "wrong",
        "absent": "absent",
        "failing": "failed",
        "padded": "right",
    }
    assert (calls["wrong"], calls["nan"]) == (1, 1)
    assert calls["titan"] > 5
    assert rows["wrong"].error == pytest.approx(0.05, rel=1e-5)
    assert rows["wrong"].seconds is None
    assert rows["absent"].note == "pip install it"
    assert rows["failing"].note == "RuntimeError: no kernel image"
    own, other = rows["titan"], rows["padded"]
    assert own.against_titan == 1.0
    assert other.against_titan == pytest.approx(other.seconds / own.seconds)
    assert own.tflops == pytest.approx(8e6 / own.seconds / 1e12)
    assert own.gigabytes_per_second == pytest.approx(1e6 / own.seconds / 1e9)
    assert own.roofline == pytest.approx(1e-5 / own.seconds)  # its bytes take 10 us, its FLOPs 2
    assert [row.backend for row in run_case(case_of(backends), timer(), ROOFLINE, ["padded"])] == ["padded"]


def test_who_fails_while_timed_has_no_time_and_stops_nobody() -> None:
    calls = 0

    def tiring(x: Tensor):
        def call() -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise RuntimeError("out of breath")
            return 2 * x

        return call

    rows = run_case(case_of({"titan": lambda x: lambda: 2 * x, "tiring": tiring}), timer(), ROOFLINE, ())
    assert [row.verdict for row in rows] == ["right", "failed"]
    assert rows[1].note == "RuntimeError: out of breath"
    assert rows[0].seconds is not None
    assert rows[1].seconds is None


class _Gpu:
    """A clock for the host and one for a device that works off what it was given, in order."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def give(self, work: float, launch: float = 0.0) -> None:
        self.host += launch
        self.device = max(self.device, self.host) + work

    def event(self, enable_timing: bool) -> "_Gpu._Event":
        return self._Event(self)

    class _Event:
        def __init__(self, gpu: "_Gpu") -> None:
            self.gpu = gpu

        def record(self) -> None:
            self.at = max(self.gpu.device, self.gpu.host)

        def elapsed_time(self, end: "_Gpu._Event") -> float:
            return (end.at - self.at) * 1e3


def test_a_gpu_is_timed_without_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = _Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.give(cycles / 1.5e9))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: setattr(gpu, "host", max(gpu.host, gpu.device)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=1 << 10))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: gpu.host)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(zero_=lambda: gpu.give(30e-6, 5e-6)))
    timer = Timer(torch.device("cuda"))

    def launches() -> None:  # three kernels of 7 us each, that the host takes 40 us each to launch
        for _ in range(3):
            gpu.give(7e-6, 40e-6)

    small, large = timer.race([launches, lambda: gpu.give(2e-3, 1e-5)])
    assert small.seconds == pytest.approx(21e-6)
    assert small.host == pytest.approx(120e-6)
    assert large.seconds == pytest.approx(2e-3)
    assert large.calls < small.calls == 200


def test_who_is_compared_takes_turns() -> None:
    order: list[str] = []
    found = Timer(CPU, budget=0.0).race([lambda: order.append("a"), lambda: order.append("b")])
    assert [x.calls for x in found] == [5, 5]
    assert "".join(order)[-10:] == "abbaabbaab"


def test_the_worst_row_shows_what_the_norm_of_the_whole_hides() -> None:
    truth = torch.randn(4096, 64, dtype=torch.float64)
    found = truth.float()
    assert worst_row(found, truth) < 1e-6
    found[17] *= 1.1
    assert worst_row(found, truth) == pytest.approx(0.1, rel=1e-4)
    assert (found - truth).norm() / truth.norm() < 4e-3
    found[3, 2] = math.nan
    assert math.isnan(worst_row(found, truth))
    assert worst_row(truth[:-1], truth) == math.inf
    assert worst_row(torch.tensor(1.01), torch.tensor(1.0, dtype=torch.float64)) == pytest.approx(0.01, rel=1e-3)
    truth[5], found = 0.0, truth.clone()
    found[5] = 1e-4
    assert worst_row(found, truth) == pytest.approx(4e-4, rel=0.1)  # against a quarter of the other rows
    assert worst_row(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0


def test_the_floor_is_the_larger_of_two_times() -> None:
    assert ROOFLINE.floor_seconds(8e12, 1e11, "bf16") == 2.0
    assert ROOFLINE.floor_seconds(8e12, 5e11, "bf16") == 5.0
    assert ROOFLINE.floor_seconds(0.0, 5e11, "fp8") == 5.0
    assert ROOFLINE.floor_seconds(1.0, 5e11, "fp8") is None


# ------------------------------------------------------------------------------------------------ the cases


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_backend_of_this_machine_is_right(name: str) -> None:
    import importlib

    cases = list(importlib.import_module(f"titan_core.jobs.bench.{OPERATIONS[name]}").cases(QUICK, draw()))
    assert cases
    for case in cases:
        rows = run_case(case, timer(), ROOFLINE, ())
        verdicts = {row.backend: row.verdict for row in rows}
        assert verdicts["titan"] == "right", rows
        assert set(verdicts.values()) <= {"right", "absent"}, rows
        assert list(verdicts.values()).count("right") > 1 or name == "quant", rows


@pytest.mark.parametrize("imbalance", [0.0, 1.0])
def test_float8_products_are_right(imbalance: float) -> None:
    request = Request(shapes=(Grouped(70, 144, 160, 3),), dtype="fp8", imbalance=imbalance, reduced=True)
    cases = list(moe_gemm.cases(request, draw()))
    recipes = [(case.shape.split()[-1], case.part) for case in cases]
    assert recipes[:3] == [("blockwise", "fwd"), ("rowwise", "fwd"), ("casts", "fwd")]
    assert ("blockwise", "dw") in recipes
    for case in cases:
        rows = run_case(case, timer(), ROOFLINE, ())
        assert {row.verdict for row in rows} <= {"right", "absent"}, rows
        assert rows[0].verdict == "right", rows


def test_rows_are_shared_or_skewed() -> None:
    assert moe_gemm.share_rows(10, 4, 0.0) == [3, 3, 2, 2]
    assert moe_gemm.share_rows(10, 4, 1.0) == [10, 0, 0, 0]
    assert moe_gemm.share_rows(100, 4, 0.5) == [64, 12, 12, 12]
    assert sum(moe_gemm.share_rows(32768, 32, 0.37)) == 32768


def test_work_of_a_grouped_product_is_counted_by_formula() -> None:
    request = Request(shapes=(Grouped(1000, 200, 100, 4),), imbalance=1.0)
    forward, dx, dw = moe_gemm.cases(request, draw())
    assert {forward.flops, dx.flops, dw.flops} == {2.0 * 1000 * 200 * 100}
    assert forward.moved == dx.moved == 2.0 * (1000 * 100 + 1000 * 200 + 200 * 100)  # three experts have no rows
    assert dw.moved == 2.0 * (1000 * 100 + 1000 * 200 + 4 * 200 * 100)


def test_padded_layout_keeps_experts_apart() -> None:
    places, experts = moe_gemm.padded_layout([3, 3, 8], 4, CPU)
    assert places.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert experts.tolist() == [0] * 4 + [2] * 8


def test_truth_of_attention_and_of_the_loss_is_autograds() -> None:
    case = list(attention.cases(QUICK, draw()))[1]
    operands = case.inputs()
    leaves = [x.double().requires_grad_() for x in operands.tensors]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    expected = torch.autograd.grad(out, leaves, operands.grad.double())
    for x, y in zip(case.reference(operands), expected, strict=True):
        torch.testing.assert_close(x, y)
    case = list(fused_ce.cases(QUICK, draw()))[1]
    operands = case.inputs()
    leaves = [x.double().requires_grad_() for x in operands.tensors]
    loss = F.cross_entropy(leaves[0] @ leaves[1].T, operands.fixed[0], reduction="sum")
    for x, y in zip(case.reference(operands), [loss, *torch.autograd.grad(loss, leaves)], strict=True):
        torch.testing.assert_close(x, y)


def test_bytes_of_what_multiplies_nothing() -> None:
    moved = {(case.operation, case.part): case.moved for case in pointwise.cases(QUICK, draw())}
    assert moved["rms-norm", "fwd"] == 2 * 2 * 250 * 1000
    assert moved["rms-norm", "bwd"] == 2 * 3 * 250 * 1000
    place, forth, back, slopes, choice = permute.cases(QUICK, draw())
    assert choice.moved == 4 * 301 * 16 + 8 * 301 * 4
    assert place.moved == 16 * 301 * 4
    assert forth.moved == back.moved == 2 * (301 + 301 * 4) * 100 + 4 * 301 * 4
    assert slopes.moved == 2 * (301 + 2 * 301 * 4) * 100 + 12 * 301 * 4


@pytest.mark.parametrize("part", ["permute", "unpermute", "unpermute-bwd", "choose"])
def test_what_compiled_peers_of_permute_compute_is_right(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setattr(passes, "compiled", lambda function: function)
    (case,) = (case for case in permute.cases(QUICK, draw()) if case.part == part)
    (row,) = run_case(case, timer(), ROOFLINE, ["compile"])
    assert row.verdict == "right"


def _kept_after_used() -> list[Tensor]:
    def chain(x: Tensor) -> Tensor:
        return torch.sin(torch.tanh(x @ x) @ x)

    operands = passes.Operands([torch.eye(4) / 3], [], torch.ones(4, 4))
    passes.both(passes.compiled(chain, "aot_eager"), operands)()
    call = passes.backward(passes.compiled(chain, "aot_eager"), operands)
    return [*call(), *call(), *passes.backward(chain, operands)()]


def test_a_compiled_backward_runs_again_after_one_that_used_its_graph_up() -> None:
    once, again, plain = apart(_kept_after_used)
    torch.testing.assert_close(once, plain)
    torch.testing.assert_close(again, plain)


def test_what_was_measured_is_kept_when_a_run_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "rows.jsonl"
    saved.write_bytes(b'{"device":"one of before"}\n')

    def interrupted(case: Case, *_: object) -> list:
        if case.part == "unpermute":
            raise KeyboardInterrupt
        return run_case(case, *_)

    monkeypatch.setattr(run, "run_case", interrupted)
    monkeypatch.setattr(run, "measure", lambda *_: ROOFLINE)
    report = run.run(["permute"], Request(seed=5, backends=("titan", "torch")), budget=1e-4, save=str(saved))
    assert report.interrupted
    parts = [("place", "titan"), ("place", "torch"), ("permute", "titan"), ("permute", "torch")]
    assert [(row.part, row.backend) for row in report.rows] == parts
    before, head, *rows = [json.loads(line) for line in saved.read_text().splitlines()]
    assert before == {"device": "one of before"}
    assert (head["device"], head["seed"]) == ("a test", 5)
    assert [(row["part"], row["backend"]) for row in rows] == parts
    assert rows[0]["seconds"] == report.rows[0].seconds
    with pytest.raises(UsageError, match="--save"):
        run.run(["permute"], Request(), save=str(tmp_path / "missing" / "rows.jsonl"))


def test_inputs_follow_the_seed() -> None:
    one, again, other = (Draw(CPU, seed).normal(5) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


# ------------------------------------------------------------------------------------------------ words, plots, ranks


def test_shapes_are_presets_or_four_numbers() -> None:
    assert read_shapes(["mixtral", "8,16,32,2"]) == (*PRESETS["mixtral"], Grouped(8, 16, 32, 2))
    for word, said in {"mixtrl": "mixtral", "1,2,3": "M,N,K,G", "0,1,1,1": "at least 1"}.items():
        with pytest.raises(UsageError, match=said):
            read_shapes([word])


def test_a_picture_is_drawn_or_refused_before_anything_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("x.txt", "missing/x.png"):
        with pytest.raises(TitanError, match="--plot"):
            plot.check(str(tmp_path / name))
    out = tmp_path / "x.png"
    plot.check(str(out))
    rows = [row for case in moe_gemm.cases(QUICK, draw()) for row in run_case(case, timer(), ROOFLINE, ())]
    report = Report("a test", "2", None, True, 5, ROOFLINE, rows)
    plot.draw(report, str(out))
    assert out.read_bytes().startswith(b"\x89PNG")
    assert len(out.read_bytes()) > 5000


def _collectives() -> list[tuple[str, int, float]]:
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    rows = run_collectives(world, largest=1 << 16).rows
    return [(row.name, row.size, row.bus_gigabytes_per_second * row.seconds) for row in rows]


def test_collectives_count_what_each_rank_must_send() -> None:
    for rows in run_ranks(_collectives, 2):
        assert [name for name, _, _ in rows] == list(COLLECTIVES)[:-1]  # memory that devices share needs GPUs
        for name, size, gigabytes in rows:
            share = 1.0 if name == "all_reduce" else 0.5
            assert gigabytes * 1e9 == pytest.approx(share * size)
