"""Rates, shares and times of the step meter, on a clock that the test moves."""

import mmap

import psutil
import pytest
import torch

from titan_core.observe import metrics
from titan_core.observe.metrics import StepMeter
from titan_core.runtime.events import StepDone

GIB = 1 << 30
CPU = torch.device("cpu")


class Clock:
    """Stands for the time module."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def meter(clock: Clock, device: torch.device = CPU, *, steps: int = 100, world_size: int = 4) -> StepMeter:
    made = StepMeter(device=device, world_size=world_size, steps=steps, flops_per_token=2e9, _began=clock.now)
    made.begin()
    return made


def report(meter: StepMeter, step: int) -> StepDone:
    return meter.report(step=step, loss=2.0, max_loss=3.0, grad_norm=1.0, lr=0.1, total_tokens=step * 1000)


def test_rates_are_per_device_and_over_the_steps_since_the_last_line(clock: Clock) -> None:
    one = meter(clock)
    clock.now += 4.0
    one.add(1000, data_seconds=1.0)
    first = report(one, 1)
    assert first.seconds == pytest.approx(4.0)
    assert first.tokens_per_second == pytest.approx(1000 / 4 / 4)
    assert first.tflops == pytest.approx(1000 / 16 * 2e9 / 1e12)
    assert first.data_share == pytest.approx(0.25)
    for _ in range(10):
        clock.now += 0.5
        one.add(1000, data_seconds=0.1)
    later = report(one, 11)
    assert later.seconds == pytest.approx(0.5)
    assert later.tokens_per_second == pytest.approx(10_000 / 5 / 4)
    assert later.data_share == pytest.approx(0.2)
    assert (later.loss, later.max_loss, later.lr, later.tokens) == (2.0, 3.0, 0.1, 11_000)


def test_what_is_not_training_does_not_count(clock: Clock) -> None:
    one = meter(clock)
    clock.now += 60.0  # building and loading
    one.begin()
    clock.now += 2.0
    one.add(1000, 0.0)
    assert report(one, 1).seconds == pytest.approx(2.0)
    clock.now += 30.0  # a validation
    one.pause(30.0)
    clock.now += 2.0
    one.add(1000, 0.0)
    assert report(one, 2).seconds == pytest.approx(2.0)


def test_the_first_line_does_not_set_the_pace(clock: Clock) -> None:
    one = meter(clock, steps=101)
    clock.now += 100.0  # compilation
    one.add(1000, 0.0)
    assert report(one, 1).eta_seconds == pytest.approx(100 * 100.0)
    for seconds, step, pace in ((1.0, 2, 1.0), (2.0, 3, 0.8 * 1.0 + 0.2 * 2.0)):
        clock.now += seconds
        one.add(1000, 0.0)
        assert report(one, step).eta_seconds == pytest.approx((101 - step) * pace)


def test_host_memory_is_the_peak(clock: Clock) -> None:
    one = meter(clock)
    before = psutil.Process().memory_info().rss / GIB
    with mmap.mmap(-1, GIB // 4) as big:  # not from the allocator, which may have as much at hand
        big.write(bytes(GIB // 4))
    one.add(1, 0.0)
    done = report(one, 1)
    assert done.memory_gib > before + 0.24
    assert done.memory_share is not None
    assert 0 < done.memory_share <= 1
    assert done.extra == {}
    assert done.mfu is None


class Properties:
    total_memory = 80 * GIB


@pytest.mark.parametrize(
    ("name", "mfu"), [("NVIDIA H100 80GB HBM3", 500e12 / 989.4e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)]
)
def test_a_known_gpu_has_an_mfu(clock: Clock, monkeypatch, name: str, mfu: float | None) -> None:
    stats = {"active_bytes.all.peak": 30 * GIB, "num_alloc_retries": 2, "num_ooms": 1}
    resets = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _device: 40 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _device: stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: Properties)
    one = meter(clock, torch.device("cuda", 0), world_size=2)
    clock.now += 1.0
    one.add(500_000, 0.0)
    done = report(one, 1)
    assert done.tflops == pytest.approx(500.0)
    assert done.mfu == (None if mfu is None else pytest.approx(mfu))
    assert (done.memory_gib, done.memory_share) == (40.0, 0.5)
    assert done.extra["memory/max_active(GiB)"] == 30.0
    assert done.extra["memory/num_alloc_retries"] == 2
    assert done.extra["memory/num_ooms"] == 1
    assert resets == [torch.device("cuda", 0)]
