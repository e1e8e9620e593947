"""Small checkpoints for the tests to save, load and damage."""

from pathlib import Path

import torch

from titan_core.checkpoint import Checkpointer, Snapshot
from titan_core.config.schema import Checkpoint

SHAPES = {"a.weight": (7, 4), "b.weight": (5, 6), "b.bias": (5,), "step": ()}


def make(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def empty() -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, float("nan")) for name, shape in SHAPES.items()}


def open_at(folder, listener=lambda event: None, **config) -> Checkpointer:
    return Checkpointer(str(folder), Checkpoint(**config), listener=listener)


def save(checkpointer: Checkpointer, step: int, seed: int | None = None, **options) -> dict[str, torch.Tensor]:
    tensors = make(step if seed is None else seed)
    snapshot = Snapshot(tensors, {"step": step}, {"rng": step}, {"tokenizer/x.json": b"{}"})
    checkpointer.save(step, snapshot, blocking=options.pop("blocking", True), **options)
    return tensors


def assert_equal(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def data_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step}" / "__0_0.distcp"


def flip(path: Path, place: int | None = None) -> None:
    """Flip the bits of four bytes, those in the middle unless told."""
    content = bytearray(path.read_bytes())
    start = len(content) // 2 if place is None else place
    for i in range(start, start + 4):
        content[i] ^= 0xFF
    path.write_bytes(content)
