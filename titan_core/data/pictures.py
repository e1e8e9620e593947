"""Pictures with captions: tar files of webdataset, folders, data sets of the Hub.

A source gives pictures as they are stored; `prepare` makes pixels of one size of them. A picture that cannot be read,
or is too small, is a `Problem` with its place; the run goes on without it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from titan_core.config import schema
from titan_core.data import tables
from titan_core.runtime.errors import DataError, missing_extra

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_CAPTION_ENDINGS = (".txt", ".caption")
_LISTS = ("metadata.jsonl", "metadata.csv")
_CAPTION_COLUMNS = ("text", "caption")
_MOST_PIXELS = 200_000_000  # a decompression bomb would fill the memory


@dataclass(frozen=True)
class Picture:
    """A picture as it is stored (or drawn, as (H, W, 3) uint8), with its caption and where it is from."""

    image: bytes | np.ndarray
    caption: str
    where: str


@dataclass(frozen=True)
class Problem:
    """Why a sample cannot be used."""

    reason: str
    where: str


def prepare(picture: Picture, size: int, place: float) -> np.ndarray | Problem:
    """Return pixels (3, size, size) uint8: the short side is brought to `size`, and of the long side a part is taken
    that begins at `place`, in [0, 1], of what is too much."""
    if isinstance(picture.image, np.ndarray):
        return np.ascontiguousarray(picture.image.transpose(2, 0, 1))
    image = _library()
    try:
        with image.open(io.BytesIO(picture.image)) as opened:
            width, height = opened.size
            if min(width, height) < size:
                return Problem(f"{width} x {height} pixels are less than {size}", picture.where)
            if width * height > _MOST_PIXELS:
                return Problem(f"{width} x {height} pixels are too many", picture.where)
            pixels = opened.convert("RGB")
    except Exception as error:  # decoders raise many kinds for damaged files
        return Problem(f"not a readable image: {str(error).split(chr(10))[0] or type(error).__name__}", picture.where)
    if width <= height:
        pixels = pixels.resize((size, math.ceil(height * size / width)), image.Resampling.BICUBIC)
    else:
        pixels = pixels.resize((math.ceil(width * size / height), size), image.Resampling.BICUBIC)
    left, top = (round(place * (length - size)) for length in pixels.size)
    found = np.asarray(pixels.crop((left, top, left + size, top + size)))
    return np.ascontiguousarray(found.transpose(2, 0, 1))


def _library() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("pillow", "flux") from None
    return Image


# ---------------------------------------------------------------------------------------------- a folder


class Folder:
    """Images in a folder, each with a caption in a text file of its name, or all in `metadata.jsonl` or `.csv`."""

    def __init__(self, folder: Path, where: str) -> None:
        self.folder = folder
        listed = next((folder / name for name in _LISTS if (folder / name).exists()), None)
        self.files = _listed(listed, where) if listed is not None else _side_by_side(folder)
        if not self.files:
            tip = f"captions go into `name.txt` beside `name.jpg`, or into {' or '.join(_LISTS)}"
            raise DataError(f"no images with captions in `{folder}`", where=where, tip=tip)
        digest = hashlib.sha256()
        for file, caption in self.files:
            size = file.stat().st_size if file.exists() else -1
            digest.update(f"{file.relative_to(folder)};{size};{caption};".encode())
        self.fingerprint = f"pictures/{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.files)

    def item(self, index: int) -> Picture | Problem:
        """Read a picture."""
        file, caption = self.files[index]
        try:
            text = caption if caption is not None else _caption_file(file).read_text(encoding="utf-8").strip()
            return Picture(file.read_bytes(), text, str(file))
        except (OSError, UnicodeDecodeError) as error:
            return Problem(f"cannot be read: {error}", str(file))


def _side_by_side(folder: Path) -> list[tuple[Path, str | None]]:
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
    return [(path, None) for path in images if _caption_file(path).exists()]


def _caption_file(image: Path) -> Path:
    return next(
        (p for ending in _CAPTION_ENDINGS if (p := image.with_suffix(ending)).exists()), image.with_suffix(".txt")
    )


def _listed(path: Path, where: str) -> list[tuple[Path, str | None]]:
    """Read a list of files and captions, in the columns that `datasets`' image folders have."""
    found: list[tuple[Path, str | None]] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows: Iterator[dict[str, Any]] = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, file)
            for number, row in enumerate(rows, 1):
                caption = next((row[key] for key in _CAPTION_COLUMNS if row.get(key) is not None), None)
                name = row.get("file_name")
                if not isinstance(caption, str) or not isinstance(name, str):
                    tip = f"each has `file_name` and {' or '.join(f'`{key}`' for key in _CAPTION_COLUMNS)}"
                    raise DataError(f"entry {number} names no image with a caption", where=str(path), tip=tip)
                found.append((path.parent / name, caption))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the list of images: {error}", where=str(path)) from error
    return found


# ---------------------------------------------------------------------------------------------- the Hub


class Rows:
    """Pictures in the columns of a table."""

    def __init__(self, table: Any, convert: Any, fingerprint: str) -> None:
        self._table, self._convert, self.fingerprint = table, convert, fingerprint

    def __len__(self) -> int:
        return len(self._table)

    def item(self, index: int) -> Picture | Problem:
        """Read a row."""
        return self._convert(self._table[index])


def open_rows(
    name: str, subset: str | None, options: dict[str, Any], data: schema.Data, *, streaming: bool, where: str
) -> Rows | tables.Stream:
    """Open the columns `data.image_key` and `data.caption_key` of what `datasets` loads."""
    loaded, columns = tables.load_rows(name, subset, options, streaming=streaming, name=name, where=where)
    for key in ("image_key", "caption_key"):
        if getattr(data, key) not in columns:
            tip = "its columns: " + ", ".join(columns)
            raise DataError(f"`{name}` has no column `{getattr(data, key)}`", where=f"data.{key}", tip=tip)
    import datasets

    kept = loaded.select_columns([data.image_key, data.caption_key])
    kept = kept.cast_column(data.image_key, datasets.Image(decode=False))  # bytes: we decode, and note what is damaged

    def convert(row: dict[str, Any]) -> Picture | Problem:
        image, caption = row[data.image_key], row[data.caption_key]
        caption = caption[0] if isinstance(caption, list) and caption else caption
        if not isinstance(image, dict) or not isinstance(caption, str):
            return Problem("an image or a caption is missing", name)
        content = image.get("bytes")
        if content is None and image.get("path"):
            try:
                content = Path(image["path"]).read_bytes()
            except OSError as error:
                return Problem(f"cannot be read: {error}", name)
        return Problem("an image is missing", name) if content is None else Picture(content, caption, name)

    fingerprint = f"{name}/{subset}/{options.get('split')}/{data.image_key}/{data.caption_key}"
    return tables.Stream(kept, convert, name, fingerprint) if streaming else Rows(kept, convert, fingerprint)
