"""Images as rows: 2 x 2 latents become one row of a transformer, and where a row lies in its image.

Shape letters: B batch, Z latent channels, h and w height and width of the latents, I = (h / 2) (w / 2) image rows,
L = 4 Z numbers of a row, S text rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents_BZhw: Tensor) -> Tensor:
    """Return latents as rows (B, I, L): image rows from left to right and top to bottom, channels first within one."""
    parts = latents_BZhw.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, Z, h / 2, 2, w / 2, 2)
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(rows_BIL: Tensor, height: int, width: int) -> Tensor:
    """Undo `pack` for latents of that height and width."""
    parts = rows_BIL.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def coordinates(rows: int, columns: int, text: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return the coordinates (0, row, column) of text and image rows, (S, 3) and (I, 3) integers; 0 for all text."""
    grid = torch.zeros(rows, columns, 3, dtype=torch.int64, device=device)
    grid[..., 1] = torch.arange(rows, device=device)[:, None]
    grid[..., 2] = torch.arange(columns, device=device)
    return torch.zeros(text, 3, dtype=torch.int64, device=device), grid.flatten(0, 1)
