"""One column of text out of a table or stream of the `datasets` library, from local files or the Hub."""

from __future__ import annotations

import copy
import difflib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from titan_core.runtime.errors import DataError

_HUB_SECONDS = 5.0  # the library itself gives up after 23 s a call


class Table:
    """A column of a `datasets` table that is on disk."""

    def __init__(self, table: Any, column: str, name: str, fingerprint: str) -> None:
        self._table = table
        self._column = column
        self._name = name
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._table)

    def item(self, index: int) -> str:
        """Return one row's text; a missing text is empty."""
        try:
            value = self._table[index][self._column]
        except Exception as error:  # the library's readers raise many kinds for a bad file
            raise DataError(f"cannot read row {index} of `{self._name}`: {_cause(error)}") from error
        return _as_text(value, self._column, self._name)


class Stream:
    """A `datasets` stream, read in order, with a state that goes on exactly where it was taken; `convert` makes
    documents of its rows.

    The library's own shuffle buffer is not used: it loses its rows on a resume.
    """

    def __init__(self, stream: Any, convert: Callable[[Any], Any], name: str, fingerprint: str) -> None:
        self._stream = stream
        self._convert = convert
        self._name = name
        self._beginning = copy.deepcopy(stream.state_dict())
        self.fingerprint = fingerprint

    def read(self, state: Any) -> Iterator[Any]:
        """Yield the documents of one epoch from a state on, None for its beginning."""
        self._stream.load_state_dict(copy.deepcopy(self._beginning if state is None else state))
        rows = iter(self._stream)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the library's readers raise many kinds for a bad file or a lost connection
                tip = "the same command goes on from the last checkpoint"
                raise DataError(f"the stream of `{self._name}` broke off: {_cause(error)}", tip=tip) from error
            yield self._convert(row)

    def state(self) -> Any:
        """Return the state after the document that was yielded last."""
        return self._stream.state_dict()


def load_table(
    builder: str,
    subset: str | None,
    options: dict[str, Any],
    *,
    column: str,
    streaming: bool,
    name: str,
    fingerprint: str,
    where: str,
) -> Table | Stream:
    """Load what `datasets.load_dataset(builder, subset, **options)` gives, as its one column of text.

    `name` is what the user calls it. Raises `DataError` if it cannot be read, is empty, or has no such column of text.
    """
    loaded, columns = load_rows(builder, subset, options, streaming=streaming, name=name, where=where)
    _check_column(loaded, columns, column, name)
    fingerprint = f"{fingerprint}/{column}"
    loaded = loaded.select_columns([column])
    if streaming:
        return Stream(loaded, lambda row: _as_text(row[column], column, name), name, fingerprint)
    if len(loaded) == 0:
        raise DataError(f"the data set `{name}` is empty", where=where)
    return Table(loaded, column, name, fingerprint)


def load_rows(
    builder: str, subset: str | None, options: dict[str, Any], *, streaming: bool, name: str, where: str
) -> tuple[Any, list[str]]:
    """Return what `datasets.load_dataset` gives, and its columns. Raises `DataError` if it cannot be read."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    datasets.disable_progress_bars()
    try:
        with _silence():
            loaded: Any = datasets.load_dataset(builder, subset, streaming=streaming, **options)
            columns = loaded.column_names or list(next(iter(loaded), {}))
    except DatasetNotFoundError as error:
        tip = "is the name right? for a gated one: `hf auth login`"
        raise DataError(f"the Hub shows no data set `{name}`: {_cause(error)}", where=where, tip=tip) from error
    except ConnectionError as error:
        raise _unreachable(name, _cause(error), where) from error
    except Exception as error:  # the library's readers raise many kinds for a bad file or name
        raise DataError(f"cannot read the data set `{name}`: {_cause(error)}", where=where) from error
    return loaded, columns


def check_hub(name: str, where: str) -> None:
    """Raise `DataError` within seconds if the Hub does not answer at all; the library's offline mode is respected."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return  # the library looks only at what it has stored, and answers at once
    failed: list[str] = ["no answer"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
            failed.clear()
        except Exception as error:  # the hub's client decides whose errors these are
            failed[:] = [_cause(error)]

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no timeout of its own
    thread.start()
    thread.join(_HUB_SECONDS)
    if failed:
        raise _unreachable(name, failed[0], where)


def _unreachable(name: str, reason: str, where: str) -> DataError:
    return DataError(
        f"cannot reach the Hub for the data set `{name}`: {reason}",
        where=where,
        tip="without network use `embedded` or local files (dataset_path); HF_HUB_OFFLINE=1 reads what is stored here",
    )


def _check_column(loaded: Any, columns: list[str], column: str, name: str) -> None:
    if column not in columns:
        near = difflib.get_close_matches(column, columns, n=1, cutoff=0.3)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise DataError(
            f"`{name}` has no column `{column}`{hint}",
            where="data.text_key",
            tip="its columns: " + (", ".join(columns) or "none, it is empty"),
        )
    kinds = {key: getattr(kind, "dtype", "a table") for key, kind in (loaded.features or {}).items()}
    texts = ("string", "large_string", "null")
    if kinds.get(column, "string") not in texts:
        others = ", ".join(key for key, kind in kinds.items() if kind in texts[:2])
        raise DataError(
            f"the column `{column}` of `{name}` is not text, but {kinds[column]}",
            where="data.text_key",
            tip=f"its columns of text: {others or 'none'}",
        )


def _as_text(value: Any, column: str, name: str) -> str:
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"the column `{column}` of `{name}` is not text, but {kind}", where="data.text_key")
    return value or ""


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the library from logging what is raised, and told better, anyway."""
    from datasets.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _cause(error: BaseException) -> str:
    """Return the first line of the error that started it all."""
    while error.__cause__ is not None and str(error.__cause__).strip():
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).split("\n")[0]
