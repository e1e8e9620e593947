"""Pictures with captions by name or path: what `training.dataset` and `dataset_path` mean in a run with images."""

from __future__ import annotations

import difflib
import glob
from pathlib import Path
from typing import Any

from titan_core.config import schema
from titan_core.data.encoded import PLAN, EncodedSamples
from titan_core.data.pictures import Folder, open_rows
from titan_core.data.shapes import Shapes
from titan_core.data.tables import check_hub
from titan_core.data.tars import TarFiles
from titan_core.runtime.errors import DataError
from titan_core.runtime.events import Listener, Note

NAMED = {
    "cc12m-wds": ("pixparse/cc12m-wds", None, "train", "jpg", "txt"),
    "coco-validation": ("howard-hou/COCO-Text", None, "validation", "image", "caption"),
}
NAMES = ("embedded", "local", "cc12m-test", *NAMED)


def open_pictures(
    name: str, path: str | None, data: schema.Data, *, size: int, validation: bool, listener: Listener
) -> Any:
    """Open a data set of pictures: what has a length can be read in any order, the rest is a stream.

    Raises `DataError` with what to do. `size` is what drawn pictures are drawn in.
    """
    section = "validation" if validation else "training"
    if name == "cc12m-test":
        path = path or "tests/assets/cc12m_test"
        if not Path(path).exists():
            listener(Note(f"`cc12m-test` is not at `{path}`: drawing shapes instead"))
            name, path = "embedded", None
    if path:
        return _local(path, data, f"{section}.dataset_path", listener)
    if name == "embedded":
        return Shapes("validation" if validation else "train", size)
    where = f"{section}.dataset"
    if name in NAMED:
        repository, subset, split, image, caption = NAMED[name]
        check_hub(repository, where)
        columns = schema.Data(image_key=image, caption_key=caption)
        return open_rows(repository, subset, {"split": split}, columns, streaming=True, where=where)
    if "/" in name:
        check_hub(name, where)
        return open_rows(name, data.subset, {"split": data.split}, data, streaming=data.streaming, where=where)
    if name == "local":
        raise DataError("the data set `local` needs a path", where=f"{section}.dataset_path", tip="set `dataset_path`")
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
    tip = f"did you mean `{near[0]}`?" if near else f"one of {', '.join(NAMES)}, or org/name of the Hub"
    raise DataError(f"no data set of pictures `{name}`", where=where, tip=tip)


def _local(path: str, data: schema.Data, where: str, listener: Listener) -> Any:
    place = Path(path)
    if (place / PLAN).exists():
        return EncodedSamples(place)
    found = [place] if place.is_file() else sorted(Path(p) for p in glob.glob(path) if Path(p).is_file())
    if place.is_dir():
        found = sorted(p for p in place.rglob("*") if p.suffix in (".tar", ".parquet"))
    tars = [p for p in found if p.suffix == ".tar"]
    if tars:
        return TarFiles(tars, data.image_key, data.caption_key, where, listener)
    tables = [str(p) for p in found if p.suffix == ".parquet"]
    if tables:
        options = {"data_files": tables, "split": "train"}
        return open_rows("parquet", None, options, data, streaming=data.streaming, where=where)
    if place.is_dir():
        return Folder(place, where)
    tip = (
        "tar files (webdataset), a folder of images with captions, parquet files, or what `titan data encode-flux` made"
    )
    raise DataError(f"no pictures at `{path}`", where=where, tip=tip)
