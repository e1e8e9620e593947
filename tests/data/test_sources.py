"""Opening data sets: what is there is found, what is not is explained."""

import json
from pathlib import Path

import pytest

from titan_core.config.schema import Data
from titan_core.data.sources import Stream, open_source
from titan_core.runtime.errors import DataError


def opened(name: str = "local", path: Path | str | None = None, validation: bool = False, **data):
    heard: list = []
    source = open_source(name, str(path) if path else None, Data(**data), validation=validation, listener=heard.append)
    return source, heard


def test_embedded_splits_share_no_file() -> None:
    train, _ = opened("embedded")
    held_out, _ = opened("embedded", validation=True)
    assert len(train) > 300
    assert 10 < len(held_out) < len(train) / 8
    assert not {train.text(i) for i in range(len(train)) if len(train.text(i)) > 200} & {
        held_out.text(i) for i in range(len(held_out)) if len(held_out.text(i)) > 200
    }


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "folder", "glob"])
def test_local_formats(kind: str, tmp_path: Path) -> None:
    texts = ["first text", "second\ntext", "third é"]
    if kind in ("txt", "folder", "glob"):
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
        path: Path | str = tmp_path / "*.txt" if kind == "glob" else tmp_path
    elif kind == "jsonl":
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": texts}), path)
    source, _ = opened(path=path)
    assert [source.text(i) for i in range(len(source))] == texts


def test_streaming_local(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"t{i}"}) for i in range(10)))
    source, _ = opened(path=path, streaming=True)
    assert isinstance(source, Stream)
    reader = source.read(None)
    assert [next(reader) for _ in range(4)] == ["t0", "t1", "t2", "t3"]
    state = source.state()
    assert list(source.read(state)) == [f"t{i}" for i in range(4, 10)]
    assert next(iter(source.read(None))) == "t0"


def test_other_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x"}\n')
    assert opened(path=path, text_key="content")[0].text(0) == "x"
    with pytest.raises(DataError, match="no column `text`") as caught:
        opened(path=path)
    assert "content" in (caught.value.tip or "")


def test_c4_test_falls_back_and_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, heard = opened("c4_test")
    assert len(source) > 300
    assert len(heard) == 1
    assert "embedded text" in heard[0].text


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("nosuch", None, "no data set `nosuch`"),
        ("embeded", None, "no data set `embeded`"),
        ("local", None, "needs a path"),
        ("local", "missing", "does not exist"),
        ("local", "empty folder", "holds no data files"),
        ("local", "mixed", "mixes formats"),
        ("local", "empty file", "cannot read|is empty|no column"),
        ("local", "not json", "cannot read"),
        ("some/dataset", None, "cannot reach|cannot read"),
    ],
)
def test_mistakes_are_explained(name: str, make: str | None, message: str, tmp_path: Path) -> None:
    path: Path | None = None
    if make == "missing":
        path = tmp_path / "nothing.jsonl"
    elif make == "empty folder":
        path = tmp_path
    elif make == "mixed":
        path = tmp_path
        (path / "a.txt").write_text("x")
        (path / "b.jsonl").write_text('{"text": "x"}')
    elif make in ("empty file", "not json"):
        path = tmp_path / "a.jsonl"
        path.write_text("" if make == "empty file" else "this is not JSON {{{")
    with pytest.raises(DataError, match=message):
        opened(name, path)
