"""`titan bench flux`: a training step and a run of the sampler of the debug model, beside diffusers, in one process.

Both have the same weights and inputs, and take turns; what counts is the CPU time, which other load hardly changes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from titan_core.interop.boxes import Index, read_whole
from titan_core.interop.mapping import work_out
from titan_core.interop.views import TheirView
from titan_core.models import family
from titan_core.nn import flow
from titan_core.nn.latents import coordinates
from titan_core.parallel.materialise import materialise
from titan_core.runtime.errors import RunFailed, missing_extra
from titan_core.runtime.events import Listener, Note, silent
from titan_core.tasks.flow_matching import FlowBatch
from titan_core.tasks.flow_sampling import Conditions, sample

_IMAGES, _SIDE, _TEXT, _STEPS = 8, 8, 16, 4
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class FluxRow:
    """CPU seconds of one kind of work, over all rounds but the first."""

    work: str
    name: str
    cpu_seconds: float
    cpu_seconds_min: float
    cpu_seconds_max: float


class _Stored:
    """The weights of a model as a source of tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = dict(model.named_parameters())
        self.index: Index = {name: (tuple(x.shape), x.dtype) for name, x in self.tensors.items()}

    def read(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """Return a region."""
        x = self.tensors[name].detach()
        for dim, (first, length) in enumerate(zip(start, size, strict=True)):
            x = x.narrow(dim, first, length)
        return x

    def locate(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> None:
        """Return None: no file holds them."""


def run(
    *, rounds: int = 5, dtype: Literal["float32", "bfloat16"] = "float32", listener: Listener = silent
) -> list[FluxRow]:
    """Measure both; raises `RunFailed` if they do not compute the same."""
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    ours, theirs = _both(kind)
    inputs = _inputs(kind)
    calls: dict[str, Callable[[FlowBatch], Tensor]] = {"titan": _call(ours), "diffusers": _call_diffusers(theirs)}
    batch = FlowBatch(*inputs)
    with torch.no_grad():
        found, wanted = (call(batch).float() for call in calls.values())
    gap = float((found - wanted).abs().max() / wanted.abs().max())
    if gap > _TOLERANCE[kind]:
        raise RunFailed(f"titan's velocities differ from diffusers' by {gap:.1e} of the largest")
    listener(Note(f"the velocities are equal to {gap:.1e} of the largest"))
    models = {"titan": ours, "diffusers": theirs}
    steps = {name: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) for name, model in models.items()}
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, call in calls.items() if number % 2 else reversed(calls.items()):
            for work, function in (("training step", _train), ("4 sampling steps", _sample)):
                began = time.process_time()
                function(call, batch, steps[name])
                if number:
                    seconds.setdefault((work, name), []).append(time.process_time() - began)
    return [FluxRow(*key, statistics.median(found), min(found), max(found)) for key, found in sorted(seconds.items())]


def _both(dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Return titan's model and diffusers' with the same random weights."""
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError:
        raise missing_extra("diffusers", "test") from None
    flux = family("flux")
    sizes = flux.sizes("debugmodel", zero_init=False)
    assert flux.weights is not None
    with torch.device("meta"):
        ours = flux.build(sizes)
    materialise(ours, flux.parameters(sizes), 0, torch.device("cpu"))
    config = {key: value for key, value in flux.weights.write_config(sizes).items() if not key.startswith("_")}
    theirs: Any = FluxTransformer2DModel(**config)
    view = TheirView(_Stored(ours), work_out(flux.weights.rules(sizes), flux.parameters(sizes)))
    theirs.load_state_dict({name: read_whole(view, name) for name in view.index})
    for model in (ours, theirs):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return ours, theirs


def _inputs(dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = family("flux").flavors["debugmodel"]
    shapes = (_SIDE * _SIDE, sizes.in_channels), (_TEXT, sizes.context_dim), (sizes.vector_dim,)
    images, text, pooled = (torch.randn(_IMAGES, *shape, generator=generator).to(dtype) for shape in shapes)
    t = torch.rand(_IMAGES, generator=generator)
    ids = coordinates(_SIDE, _SIDE, _TEXT)
    return images, t, text, pooled, ids


def _call(model: nn.Module) -> Callable[[FlowBatch], Tensor]:
    return lambda b: model(b.noisy_BIL.to(b.text_BSX.dtype), b.text_BSX, b.pooled_BV, b.t_B, b.ids)


def _call_diffusers(model: Any) -> Callable[[FlowBatch], Tensor]:
    def call(b: FlowBatch) -> Tensor:
        dtype, (text_ids, image_ids) = b.text_BSX.dtype, b.ids
        return model(
            hidden_states=b.noisy_BIL.to(dtype), encoder_hidden_states=b.text_BSX, pooled_projections=b.pooled_BV,
            timestep=b.t_B.to(dtype), txt_ids=text_ids.float(), img_ids=image_ids.float(), return_dict=False,
        )[0]  # fmt: skip

    return call


def _train(call: Callable[[FlowBatch], Tensor], batch: FlowBatch, optimizer: torch.optim.Optimizer) -> None:
    (call(batch).float() - batch.noisy_BIL).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _sample(call: Callable[[FlowBatch], Tensor], batch: FlowBatch, _: torch.optim.Optimizer) -> None:
    conditions = Conditions(batch.text_BSX, batch.pooled_BV, batch.ids)
    sample(call, batch.noisy_BIL, conditions, flow.schedule(_STEPS, flow.shift_of(_SIDE * _SIDE)))
