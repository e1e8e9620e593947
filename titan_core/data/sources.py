"""Where documents come from. A source gives the text of document i; order, epochs and packing are not its business."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Protocol

from titan_core.config import schema
from titan_core.data import embedded, local_files
from titan_core.data.local_files import TextFiles
from titan_core.data.tables import Stream, check_hub, load_table
from titan_core.runtime.errors import DataError
from titan_core.runtime.events import Listener, Note

# name -> (Hub repository, configuration, split)
NAMED = {
    "c4": ("allenai/c4", "en", "train"),
    "c4_validation": ("allenai/c4", "en", "validation"),
}
NAMES = ("embedded", "local", "c4_test", *NAMED)


class IndexedSource(Protocol):
    """Documents that can be read in any order."""

    fingerprint: str

    def __len__(self) -> int: ...

    def item(self, index: int) -> Any:
        """Return one document."""
        ...


class Embedded(TextFiles):
    """The standard library's text, in pieces of a page or two: a batch then shows many kinds of text."""

    def __init__(self, split: embedded.Split) -> None:
        files = list(embedded.files(split))
        if not files:
            tip = "name local files with dataset_path, or a data set of the Hub"
            raise DataError("this Python comes without the source of its standard library", tip=tip)
        super().__init__(files, piece_bytes=2048)
        self.fingerprint = f"embedded/{split}/2048/{embedded.fingerprint(split)}"


Source = IndexedSource | Stream


def open_source(name: str, path: str | None, data: schema.Data, *, validation: bool, listener: Listener) -> Source:
    """Open a data set by name, or the local files at `path`. Raises `DataError` with what to do."""
    section = "validation" if validation else "training"
    name = name.lower() if name.lower() in NAMES else name
    if name == "c4_test":
        path = path or "tests/assets/c4_test"
        if not Path(path).exists():
            listener(Note(f"`c4_test` is not at `{path}`: reading the embedded text instead"))
            name, path = "embedded", None
    if path:
        return _local(path, data, f"{section}.dataset_path")
    if name == "embedded":
        return Embedded("validation" if validation else "train")
    if name == "local":
        tip = "set `dataset_path` to a file, a folder or a glob"
        raise DataError("the data set `local` needs a path", where=f"{section}.dataset_path", tip=tip)
    where = f"{section}.dataset"
    if name in NAMED:
        repository, subset, split = NAMED[name]
        return _hub(repository, subset, split, data, streaming=True, where=where)
    if "/" in name:
        return _hub(name, data.subset, data.split, data, streaming=data.streaming, where=where)
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
    tip = f"did you mean `{near[0]}`?" if near else f"one of {', '.join(NAMES)}, or org/name of the Hub"
    raise DataError(f"no data set `{name}`", where=where, tip=tip)


def _local(path: str, data: schema.Data, where: str) -> Source:
    kind, files = local_files.of_one_format(local_files.local_files(path, where), path, where)
    if kind == "text":
        local_files.refuse_other_than_text(files, where)
        return TextFiles(files)
    return load_table(
        kind,
        None,
        {"data_files": [str(file) for file in files], "split": "train"},
        column=data.text_key,
        streaming=data.streaming,
        name=path,
        fingerprint=f"local/{local_files.fingerprint(files)}",
        where=where,
    )


def _hub(name: str, subset: str | None, split: str, data: schema.Data, *, streaming: bool, where: str) -> Source:
    check_hub(name, where)
    return load_table(
        name,
        subset,
        {"split": split},
        column=data.text_key,
        streaming=streaming,
        name=name,
        fingerprint=f"{name}/{subset}/{split}",
        where=where,
    )
