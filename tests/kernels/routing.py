"""Group sizes and tolerances that the tests of several kernels share."""

import torch
from torch import Tensor

# Rows of each group: empty, one, around a tile of 128, many groups, one hot group.
RAGGED = ([0, 1, 127, 128, 129], [1] * 64, [0, 300, 0, 0], [5])
NAN_ROWS = 7  # after the last group: they belong to nobody, and hold NaN


def ends_of(sizes: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(sizes, device=device).cumsum(0).int()


def rows_of(sizes: list[int], width: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    x = torch.randn(sum(sizes) + NAN_ROWS, width, device=device).to(dtype)
    x[sum(sizes) :] = torch.nan
    return x


def weights_of(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(dtype)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the relative distance in the Euclidean norm; NaN where one is NaN."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


# An output rounded once is off by a third of a unit in the last place: 2**-9 of bfloat16 gives 1.7e-3.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
EXACT = {"rtol": 0, "atol": 0}
