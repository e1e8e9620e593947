"""Seconds of a step, from its FLOPs, its traffic and a device's data sheet: a model to compare layouts with."""

from __future__ import annotations

from dataclasses import dataclass

from titan_core.config.layout import SINGLE, SPLIT_BACKWARD, Layout
from titan_core.config.schema import Config
from titan_core.estimation.devices import Device
from titan_core.estimation.memory import microbatches
from titan_core.estimation.traffic import Traffic

# Share of the data sheet's FLOP/s that a rank reaches while it computes: on an H200 a bf16 product of 8192^3 reaches
# 0.80, whole layers of experts 0.41 to 0.57, and the best published steps of dense models on one device 0.51 to 0.64.
WHILE_COMPUTING = 0.6
_OVERLAPPED = 0.9  # of the time of computing, in which weights and gradients can travel


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: computing, recomputation included; waiting in a pipeline; exchanges that nothing hides."""

    computing: float
    waiting: float
    exchanges: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.computing + self.waiting + sum(self.exchanges.values())


def step_time(config: Config, layout: Layout, flops: float, sent: Traffic, device: Device) -> StepTime:
    """Estimate a step of a rank that computes `flops`, recomputation not counted.

    Ranks are numbered so that tensor parallelism has the nearest, then context parallelism, then FSDP. What is gathered
    from other hosts comes once for all devices of a host that take part, over the network's share of each; rows of
    experts and a pipeline's stream are every rank's own, and have one share.
    """
    computing = flops * (1 + _recomputed(config)) / (device.peak * WHILE_COMPUTING)
    inside = layout.tp
    rates = {"tensor": _rate(layout.tp, 1, device)}
    rates["context"] = _rate(layout.cp, inside, device)
    rates["fsdp"] = _rate(layout.fsdp, inside, device)
    rates["expert"] = _own_rate(layout.ep, 1 if layout.routed_by_parts else layout.tp, device)
    rates["expert_fsdp"] = _rate(layout.expert_fsdp, layout.ep * layout.expert_tp, device)
    inside *= layout.fsdp
    rates["replicate"] = _rate(layout.dp_replicate, inside, device)
    rates["pipeline"] = _own_rate(layout.pp, inside * layout.dp_replicate, device)
    seconds = {axis: size / rates[axis] for axis, size in vars(sent).items() if size}
    hidden = _OVERLAPPED * computing
    exposed = {}
    for axis, taken in seconds.items():
        if axis in ("fsdp", "expert_fsdp", "replicate"):
            taken, hidden = max(0.0, taken - hidden), max(0.0, hidden - taken)
        if taken:
            exposed[axis] = taken
    return StepTime(computing, computing * _bubble(config, layout), exposed)


def _rate(ranks: int, stride: int, device: Device) -> float:
    """Return the bytes/s at which a rank gets what so many ranks gather or reduce that lie `stride` apart."""
    if ranks * stride <= device.neighbours:
        return device.fabric
    together = max(1, device.neighbours // stride)  # of one exchange in one host: their shares of the network add up
    return min(device.fabric, device.network * together)


def _own_rate(ranks: int, stride: int, device: Device) -> float:
    """Return the bytes/s at which a rank gets what others have for it alone, from equally many bytes of each."""
    near = min(ranks, max(1, device.neighbours // stride)) / ranks
    return device.fabric if near == 1 else min(device.fabric, device.network / (1 - near))


def _recomputed(config: Config) -> float:
    """Return how much of forward and backward is computed once more: a third is forward."""
    recompute = config.activation_checkpoint
    if recompute.mode == "full":
        return 1 / 3
    if recompute.mode == "memory_budget":
        return (1 - recompute.memory_budget) / 3
    if recompute.mode == "selective":
        option = recompute.selective_ac_option
        return 1 / 6 if option == "op" else 1 / 3 / int(option)
    return 0.0


def _bubble(config: Config, layout: Layout) -> float:
    """Return the share of the computing time for which a pipeline rank waits."""
    schedule = config.parallelism.pipeline_parallel_schedule
    stages = 1 if schedule in SINGLE else 2
    count = microbatches(config, layout)[1]
    third = 1 / 3 if schedule in SPLIT_BACKWARD else 1.0
    return third * (layout.pp - 1) / (count * stages)
