"""Where documents come from. A source gives the text of document i; order, epochs and packing are not its business."""

from __future__ import annotations

import copy
import difflib
import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from titan_core.config import schema
from titan_core.data import embedded
from titan_core.runtime.errors import DataError
from titan_core.runtime.events import Listener, Note

# name -> (Hub repository, configuration, split)
NAMED = {
    "c4": ("allenai/c4", "en", "train"),
    "c4_validation": ("allenai/c4", "en", "validation"),
}
NAMES = ("embedded", "local", "c4_test", *NAMED)
_FORMATS = {".txt": "text", ".md": "text", ".py": "text", ".json": "json", ".jsonl": "json",
            ".gz": "json", ".zst": "json", ".parquet": "parquet"}  # fmt: skip


class IndexedSource(Protocol):
    """Documents that can be read in any order."""

    fingerprint: str

    def __len__(self) -> int: ...

    def text(self, index: int) -> str:
        """Return one document."""
        ...


class Embedded:
    """The standard library's text."""

    def __init__(self, split: embedded.Split) -> None:
        self._files = embedded.files(split)
        self.fingerprint = f"embedded/{split}/{embedded.fingerprint(split)}"

    def __len__(self) -> int:
        return len(self._files)

    def text(self, index: int) -> str:
        """Return one file."""
        return embedded.text(self._files[index])


class TextFiles:
    """Text files, each one document."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self.fingerprint = _fingerprint(files)

    def __len__(self) -> int:
        return len(self._files)

    def text(self, index: int) -> str:
        """Return one file; bytes that are not UTF-8 are replaced."""
        try:
            return self._files[index].read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise DataError(f"cannot read `{self._files[index]}`: {error.strerror}") from error


class Table:
    """A column of a `datasets` table that is on disk."""

    def __init__(self, table: Any, column: str, fingerprint: str) -> None:
        self._table = table
        self._column = column
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._table)

    def text(self, index: int) -> str:
        """Return one row's text; a missing text is empty."""
        return self._table[index][self._column] or ""


class Stream:
    """A column of a `datasets` stream, read in order, with a state that goes on exactly where it was taken.

    The library's own shuffle buffer is not used: it loses its rows on a resume.
    """

    def __init__(self, stream: Any, column: str, fingerprint: str) -> None:
        self._stream = stream
        self._column = column
        self._beginning = copy.deepcopy(stream.state_dict())
        self.fingerprint = fingerprint

    def read(self, state: Any) -> Iterator[str]:
        """Yield the texts of one epoch from a state on, None for its beginning."""
        self._stream.load_state_dict(copy.deepcopy(self._beginning if state is None else state))
        for row in self._stream:
            yield row[self._column] or ""

    def state(self) -> Any:
        """Return the state after the text that was yielded last."""
        return self._stream.state_dict()


Source = IndexedSource | Stream


def open_source(name: str, path: str | None, data: schema.Data, *, validation: bool, listener: Listener) -> Source:
    """Open a data set by name, or the local files at `path`. Raises `DataError` with what to do."""
    if name == "c4_test":
        path = path or "tests/assets/c4_test"
        if not Path(path).exists():
            listener(Note(f"`c4_test` is not at `{path}`: reading the embedded text instead"))
            name, path = "embedded", None
    if path:
        return _local(path, data)
    if name == "embedded":
        return Embedded("validation" if validation else "train")
    if name == "local":
        tip = "set `dataset_path` to a file, a folder or a glob"
        raise DataError("the data set `local` needs a path", where="training.dataset_path", tip=tip)
    if name in NAMED:
        repository, subset, split = NAMED[name]
        return _hub(repository, subset, split, data, streaming=True)
    if "/" in name:
        return _hub(name, data.subset, data.split, data, streaming=data.streaming)
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
    tip = f"did you mean `{near[0]}`?" if near else f"one of {', '.join(NAMES)}, or org/name of the Hub"
    raise DataError(f"no data set `{name}`", where="training.dataset", tip=tip)


def local_files(path: str) -> list[Path]:
    """Return the data files that a file, folder or glob names, sorted."""
    place = Path(path)
    if place.is_dir():
        files = [p for p in sorted(place.rglob("*")) if p.is_file() and p.suffix in _FORMATS]
    elif place.is_file():
        files = [place]
    else:
        files = [Path(p) for p in sorted(glob.glob(path, recursive=True)) if Path(p).is_file()]
    if not files:
        kinds = ", ".join(_FORMATS)
        what = "holds no data files" if place.is_dir() else "does not exist"
        raise DataError(f"`{path}` {what}", where="dataset_path", tip=f"titan reads {kinds}")
    return files


def _local(path: str, data: schema.Data) -> Source:
    files = local_files(path)
    kinds = {_FORMATS.get(file.suffix, "text") for file in files}
    if len(kinds) > 1:
        mixed = ", ".join(sorted({file.suffix for file in files}))
        raise DataError(f"`{path}` mixes formats: {mixed}", tip="point dataset_path at one of them, with a glob")
    kind = kinds.pop()
    if kind == "text":
        return _not_empty(TextFiles(files), path)
    options = {"data_files": [str(file) for file in files], "split": "train"}
    return _load(kind, None, options, data, data.streaming, f"local/{_fingerprint(files)}")


def _hub(name: str, subset: str | None, split: str, data: schema.Data, *, streaming: bool) -> Source:
    return _load(name, subset, {"split": split}, data, streaming, f"{name}/{subset}/{split}")


def _load(
    name: str,
    subset: str | None,
    options: dict,
    data: schema.Data,
    streaming: bool,
    fingerprint: str,
) -> Source:
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded: Any = datasets.load_dataset(name, subset, streaming=streaming, **options)
    except (ConnectionError, OSError) as error:
        raise DataError(
            f"cannot reach the data set `{name}`: {_first_line(error)}",
            where="training.dataset",
            tip="without network use `embedded`, or local files with training.dataset_path",
        ) from error
    except Exception as error:  # the library's readers raise many kinds for a bad file or name
        raise DataError(f"cannot read the data set `{name}`: {_first_line(error)}") from error
    columns = loaded.column_names or list(next(iter(loaded), {}))
    if data.text_key not in columns:
        near = difflib.get_close_matches(data.text_key, columns, n=1, cutoff=0.3)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise DataError(
            f"`{name}` has no column `{data.text_key}`{hint}",
            where="data.text_key",
            tip="its columns: " + (", ".join(columns) or "none, it is empty"),
        )
    if streaming:
        return Stream(loaded, data.text_key, fingerprint)
    return _not_empty(Table(loaded, data.text_key, fingerprint), name)


def _not_empty(source: Any, name: str) -> Any:
    if len(source) == 0:
        raise DataError(f"the data set `{name}` is empty", where="training.dataset")
    return source


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size};".encode())
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
