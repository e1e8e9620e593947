"""Drawn shapes with captions that describe them: images that every machine has, as text is.

Picture n is a function of n and of the split only. One or two flat shapes on a plain background, with their size,
colour, form and place in the caption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan_core.data.pictures import Picture

COUNT = {"train": 1 << 20, "validation": 1 << 12}  # the splits have no picture in common
COLORS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 200), "yellow": (250, 210, 40),
    "purple": (140, 60, 170), "orange": (250, 130, 20), "cyan": (60, 200, 220), "pink": (245, 140, 190),
}  # fmt: skip
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128)}
FORMS = ("circle", "square", "triangle", "diamond", "ring", "cross")
PLACES = {
    "in the center": (0.5, 0.5), "at the top": (0.5, 0.25), "at the bottom": (0.5, 0.75), "at the left": (0.25, 0.5),
    "at the right": (0.75, 0.5),
}  # fmt: skip
_SIDES = (("left of", (0.27, 0.5), (0.73, 0.5)), ("above", (0.5, 0.27), (0.5, 0.73)))
_RADII = {"small": 0.13, "large": 0.23}


class Shapes:
    """The pictures of a split, drawn when they are read."""

    def __init__(self, split: str, size: int) -> None:
        self.split, self.size = split, size
        self.fingerprint = f"shapes/1/{split}/{size}"

    def __len__(self) -> int:
        return COUNT[self.split]

    def item(self, index: int) -> Picture:
        """Draw a picture."""
        digest = hashlib.sha256(f"{self.split}/{index}".encode()).digest()
        caption, shapes, background = _compose(np.random.default_rng(int.from_bytes(digest[:8], "little")))
        return Picture(draw(shapes, background, self.size), caption, f"drawn shape {index}")


@dataclass(frozen=True)
class Shape:
    """A form, its colour, its middle and its radius; lengths are parts of the picture's side, from its top left."""

    form: str
    color: str
    x: float
    y: float
    radius: float


def _compose(random: np.random.Generator) -> tuple[str, list[Shape], str]:
    background = _pick(random, tuple(BACKGROUNDS))

    def shape(place: tuple[float, float], radius: float) -> Shape:
        x, y = (at + random.uniform(-0.03, 0.03) for at in place)
        return Shape(_pick(random, FORMS), _pick(random, tuple(COLORS)), x, y, radius * random.uniform(0.92, 1.08))

    if random.random() < 0.6:
        size, place = _pick(random, tuple(_RADII)), _pick(random, tuple(PLACES))
        one = shape(PLACES[place], _RADII[size])
        return f"a {size} {one.color} {one.form} {place} on a {background} background", [one], background
    word, first_place, second_place = _SIDES[random.integers(len(_SIDES))]
    first, second = shape(first_place, 0.18), shape(second_place, 0.18)
    said = f"{_named(first)} {word} {_named(second)} on a {background} background"
    return said, [first, second], background


def _named(shape: Shape) -> str:
    return f"{'an' if shape.color[0] in 'aeiou' else 'a'} {shape.color} {shape.form}"


def _pick(random: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(random.integers(len(words)))]


def draw(shapes: Sequence[Shape], background: str, size: int) -> np.ndarray:
    """Return a picture (size, size, 3) uint8; edges are smooth over one pixel."""
    image = np.empty((size, size, 3), dtype=np.float32)
    image[:] = BACKGROUNDS[background]
    middles = (np.arange(size, dtype=np.float32) + 0.5) / size
    for shape in shapes:
        x, y = middles[None, :] - shape.x, middles[:, None] - shape.y
        inside = np.clip(0.5 - _distance(shape.form, x, y, shape.radius) * size, 0, 1)[..., None]
        image += inside * (np.asarray(COLORS[shape.color], dtype=np.float32) - image)
    return np.rint(image).astype(np.uint8)


def _distance(form: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return about how far each point lies outside of a form, negative inside."""
    across, down = np.abs(x), np.abs(y)
    if form == "circle":
        return np.hypot(x, y) - radius
    if form == "square":
        return np.maximum(across, down) - 0.85 * radius
    if form == "diamond":
        return (across + down - 1.15 * radius) / np.sqrt(np.float32(2))
    if form == "ring":
        return np.abs(np.hypot(x, y) - 0.78 * radius) - 0.22 * radius
    if form == "cross":
        beam = 0.3 * radius
        return np.minimum(np.maximum(across - beam, down - radius), np.maximum(across - radius, down - beam))
    slope = np.float32(np.sqrt(3) / 2)  # a triangle that stands on its base
    return np.maximum(slope * across - 0.5 * y, y) - 0.55 * radius
