"""Seeds and deterministic algorithms."""

from __future__ import annotations

import base64
import os
import random
import secrets
from typing import Any

import torch
import torch.distributed as dist


def agree_on_seed(seed: int | None) -> int:
    """Return the seed, or one that rank 0 draws for all."""
    if seed is not None:
        return seed
    drawn = [secrets.randbits(31)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(drawn, src=0)
    return drawn[0]


def seed_all(seed: int, rank: int) -> None:
    """Seed the generators that dropout and the like use; weights and data have their own, per name and position."""
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def use_deterministic_algorithms() -> None:
    """Make torch refuse or replace every algorithm that is not deterministic."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return this rank's generator states, JSON-able."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }
    if device.type == "cuda":
        cuda = torch.cuda.get_rng_state(device).numpy().tobytes()
        state["cuda"] = base64.b64encode(cuda).decode()
    return state


def restore_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(_tensor(state["torch"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
