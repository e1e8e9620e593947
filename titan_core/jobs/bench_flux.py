"""`titan bench flux`: a training step and a run of the sampler of the debug model, beside diffusers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from titan_core.jobs.side_by_side import Row, agree, pair, take_turns
from titan_core.models import family
from titan_core.nn import flow
from titan_core.nn.latents import coordinates
from titan_core.runtime.errors import missing_extra
from titan_core.runtime.events import Listener, silent
from titan_core.tasks.flow_matching import FlowBatch
from titan_core.tasks.flow_sampling import Conditions, sample

_IMAGES, _SIDE, _TEXT, _STEPS = 8, 8, 16, 4


def run(
    *, rounds: int = 5, dtype: Literal["float32", "bfloat16"] = "float32", listener: Listener = silent
) -> list[Row]:
    """Measure both; raises `RunFailed` if they do not compute the same."""
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    flux = family("flux")
    ours, theirs = pair(flux, flux.sizes("debugmodel", zero_init=False), _diffusers, kind)
    batch = FlowBatch(*_inputs(kind))
    velocities: dict[str, Callable[[FlowBatch], Tensor]] = {"titan": _call(ours), "diffusers": _call_diffusers(theirs)}
    with torch.no_grad():
        agree("velocities", {name: call(batch) for name, call in velocities.items()}, listener)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, model in (("titan", ours), ("diffusers", theirs)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        calls["training step", name] = partial(_train, velocities[name], batch, optimizer)
        calls[f"{_STEPS} sampling steps", name] = partial(_sample, velocities[name], batch)
    return sorted(take_turns(calls, rounds), key=lambda row: row.work)


def _diffusers(config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    try:
        from diffusers import FluxTransformer2DModel
    except ImportError:
        raise missing_extra("diffusers", "test") from None
    model = FluxTransformer2DModel(**config)
    model.load_state_dict(tensors)
    return model


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


def _sample(call: Callable[[FlowBatch], Tensor], batch: FlowBatch) -> None:
    conditions = Conditions(batch.text_BSX, batch.pooled_BV, batch.ids)
    sample(call, batch.noisy_BIL, conditions, flow.schedule(_STEPS, flow.shift_of(_SIDE * _SIDE)))
