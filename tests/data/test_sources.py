"""Opening data sets: what is there is found, what is not is explained."""

import gzip
import json
import socket
from pathlib import Path

import pytest

from titan_core.config.schema import Data
from titan_core.data import embedded, tables
from titan_core.data.local_files import PIECE_BYTES, fingerprint
from titan_core.data.sources import Stream, open_source
from titan_core.runtime.errors import DataError


def opened(name: str = "local", path: Path | str | None = None, validation: bool = False, **data):
    heard: list = []
    source = open_source(name, str(path) if path else None, Data(**data), validation=validation, listener=heard.append)
    return source, heard


def test_embedded_splits_share_no_file() -> None:
    train, _ = opened("embedded")
    held_out, _ = opened("embedded", validation=True)
    assert len(train) > 3000
    assert 100 < len(held_out) < len(train) / 8
    assert not set(embedded.files("train")) & set(embedded.files("validation"))


def test_embedded_pieces_are_the_files_whole() -> None:
    held_out, _ = opened("embedded", validation=True)
    pieces = "".join(held_out.item(i) for i in range(len(held_out)))
    assert pieces == "".join(path.read_bytes().decode() for path in embedded.files("validation"))


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
    assert [source.item(i) for i in range(len(source))] == texts


def write(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"number": range(len(texts)), "text": texts})
        pq.write_table(table, path, row_group_size=3)
    else:
        path.write_text("\n".join(json.dumps({"number": i, "text": text}) for i, text in enumerate(texts)))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_stream_goes_on_where_its_state_was_taken(suffix: str, tmp_path: Path) -> None:
    texts = [f"t{i}" for i in range(20)]
    write(tmp_path / f"a{suffix}", texts[:11])
    write(tmp_path / f"b{suffix}", texts[11:])
    source, _ = opened(path=tmp_path, streaming=True)
    assert isinstance(source, Stream)
    for cut in (1, 4, 10, 11, 12, 19):
        reader = source.read(None)
        assert [next(reader) for _ in range(cut)] == texts[:cut]
        state = json.loads(json.dumps(source.state()))
        again, _ = opened(path=tmp_path, streaming=True)
        assert isinstance(again, Stream)
        assert list(again.read(state)) == texts[cut:]
    assert list(source.read(None)) == texts


def test_a_large_text_file_is_cut_into_pieces_at_line_starts(tmp_path: Path) -> None:
    lines = [f"line {i} é日本\r\n" for i in range(9000)]
    (tmp_path / "a.txt").write_bytes("".join(lines).encode())
    (tmp_path / "b.txt").write_text("small")
    (tmp_path / "c.txt").write_bytes("日".encode() * 40_000)  # not one line end
    late = "x" * (2 * PIECE_BYTES - 9) + "\n" + "x" * 2 * PIECE_BYTES
    (tmp_path / "d.txt").write_text(late)
    source, _ = opened(path=tmp_path)
    pieces = [source.item(i) for i in range(len(source))]
    small = pieces.index("small")
    assert "".join(pieces[:small]) == "".join(lines)
    assert all(piece.startswith("line ") for piece in pieces[:small])
    assert "".join(pieces[small + 1 :]) == "日" * 40_000 + late
    sizes = [len(piece.encode()) for piece in pieces if piece != "small"]
    assert min(sizes) >= PIECE_BYTES // 2
    assert max(sizes) <= 2 * PIECE_BYTES


def test_what_lies_beside_the_data_is_not_read(tmp_path: Path) -> None:
    """A folder as the Hub's client leaves it: a read-me, and files of its own in a hidden folder."""
    write(tmp_path / "train.parquet", ["a", "b"])
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "old.parquet", ["c"])
    source, _ = opened(path=tmp_path)
    assert [source.item(i) for i in range(len(source))] == ["a", "b"]


def test_a_missing_text_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": null}\n')
    assert [opened(path=path)[0].item(i) for i in range(2)] == ["x", ""]
    stream, _ = opened(path=path, streaming=True)
    assert isinstance(stream, Stream)
    assert list(stream.read(None)) == ["x", ""]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_numbers_is_no_text(streaming: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1, "body": "x"}\n')
    with pytest.raises(DataError, match="is not text, but int64") as caught:
        opened(path=path, streaming=streaming)
    assert "body" in (caught.value.tip or "")


def test_a_value_that_is_no_text_is_refused_where_no_type_was_declared() -> None:
    with pytest.raises(DataError, match="column `text` of `mine` is not text, but list"):
        tables.Table([{"text": [1]}], "text", "mine", "").item(0)


def test_a_stream_that_breaks_off_says_why(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "b.jsonl").write_text("not JSON {")
    stream, _ = opened(path=tmp_path, streaming=True)
    assert isinstance(stream, Stream)
    with pytest.raises(DataError, match="broke off: JSON parse error"):
        list(stream.read(None))


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(tables, "_HUB_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent_hub:
        address = f"http://127.0.0.1:{silent_hub.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        with pytest.raises(DataError, match="cannot reach the Hub for the data set `some/dataset`"):
            opened("some/dataset")
    with pytest.raises(DataError, match=r"cannot reach the Hub .*refused") as caught:
        opened("c4")
    assert "embedded" in (caught.value.tip or "")


def test_other_column(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x"}\n')
    assert opened(path=path, text_key="content")[0].item(0) == "x"
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
        ("embeded", None, "no data set `embeded`"),  # codespell:ignore embeded
        ("local", None, "needs a path"),
        ("local", "missing", "does not exist"),
        ("local", "empty folder", "holds no data files"),
        ("local", "mixed", "mixes formats"),
        ("local", "empty file", r"`.*a\.jsonl` is empty"),
        ("local", "not json", r"cannot read .*a\.jsonl`: JSON parse error"),
        ("some/dataset", None, "cannot reach the Hub"),
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


@pytest.mark.parametrize("name", ["a.bin", "a.txt", "a.csv"])
@pytest.mark.parametrize("content", [bytes(range(256)) * 9, "words of text ".encode("utf-16"), b"\x93\xfa" * 900])
def test_what_is_not_utf8_text_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"a\.\w+` is not UTF-8 text"):
        opened(path=tmp_path / name)


def test_text_with_a_few_odd_bytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"caf\xe9 \x00 " + b"plain words " * 50)  # codespell:ignore caf
    (tmp_path / "b.log").write_bytes("é".encode() * 4096)  # the first bytes end within a character
    source, _ = opened(path=tmp_path / "*.log")
    assert source.item(0).startswith("caf\ufffd \0 plain")  # codespell:ignore caf
    assert source.item(1) == "é" * 4096


def test_compressed_text_is_refused_by_name_and_compressed_lines_of_json_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"words"))
    with pytest.raises(DataError, match=r"a\.txt\.gz` is compressed text") as caught:
        opened(path=tmp_path / "a.txt.gz")
    assert "unpack" in (caught.value.tip or "")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    assert opened(path=tmp_path / "b.json.gz")[0].item(0) == "x"


def test_fingerprints_see_content_and_many_files_cost_no_more_than_some(tmp_path: Path) -> None:
    files = []
    for i in range(1200):
        file = tmp_path / f"{i:04}.txt"
        file.write_text("x" * 100)
        files.append(file)
    before = fingerprint(files)
    files[0].write_text("x" * 99 + "y")
    assert fingerprint(files) != before
    files[0].write_text("x" * 100)
    assert fingerprint(files) == before
    files[0].unlink()
    with pytest.raises(DataError, match="cannot read"):
        fingerprint(files)
