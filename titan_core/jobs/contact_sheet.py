"""All images of a call on one page, with what they were to show."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from titan_core.runtime.png import png

_WIDEST = 192  # pixels of an image on the page
_GAP, _LINE, _LETTER = 8, 12, 6
_MOST_COLUMNS = 6


class Sheet:
    """Images in rows: one a prompt if several were drawn of each, else as many as fit."""

    def __init__(self, thumbs: Sequence[Tensor], captions: Sequence[str], images_per_prompt: int) -> None:
        self.thumbs, self.captions = list(thumbs), list(captions)
        columns = images_per_prompt if images_per_prompt > 1 else math.ceil(math.sqrt(len(thumbs)))
        self.columns = min(columns, _MOST_COLUMNS)

    @staticmethod
    def thumb(pixels: Tensor) -> Tensor:
        """Return an image (H, W, 3) uint8 in the size of the page: shrunk, or small ones enlarged by a whole factor."""
        height, width, _ = pixels.shape
        planes = pixels.permute(2, 0, 1)[None].float()
        longest = max(height, width)
        if longest > _WIDEST:
            size = round(height * _WIDEST / longest), round(width * _WIDEST / longest)
            planes = F.interpolate(planes, size=size, mode="area")
        else:
            planes = F.interpolate(planes, scale_factor=float(max(1, _WIDEST // longest)), mode="nearest")
        return planes[0].permute(1, 2, 0).round().to(torch.uint8)

    def write(self, path: Path) -> str | None:
        """Write the page; returns a remark if it has no captions."""
        height, width = (max(thumb.shape[axis] for thumb in self.thumbs) for axis in (0, 1))
        draw = _letters()
        wrapped = [
            textwrap.wrap(text, max(8, width // _LETTER), max_lines=4, placeholder="...") for text in self.captions
        ]
        room = (max(map(len, wrapped)) * _LINE + 4) if draw is not None else 0
        rows = math.ceil(len(self.thumbs) / self.columns)
        page = np.full((_GAP + rows * (height + room + _GAP), _GAP + self.columns * (width + _GAP), 3), 255, np.uint8)
        for number, thumb in enumerate(self.thumbs):
            row, column = divmod(number, self.columns)
            top, left = _GAP + row * (height + room + _GAP), _GAP + column * (width + _GAP)
            page[top : top + thumb.shape[0], left : left + thumb.shape[1]] = thumb.numpy()
            if draw is not None:
                page[top + height : top + height + room, left : left + width] = draw(wrapped[number], width, room)
        path.write_bytes(png(page.tobytes(), page.shape[1], page.shape[0]))
        return None if draw is not None else "the sheet has no captions: they need `pip install pillow`"


def _letters() -> Any:
    """Return what writes lines of text into an area, None without Pillow."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        return None

    def write(lines: list[str], width: int, height: int) -> np.ndarray:
        area = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(area).multiline_text((0, 2), "\n".join(lines), fill="black", spacing=1)
        return np.asarray(area)

    return write
