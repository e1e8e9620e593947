"""Pictures with captions: drawn, in folders, tar files and tables; what is damaged is left out, and said."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from titan_core.config.schema import Data
from titan_core.data.open_pictures import open_pictures
from titan_core.data.pictures import Picture, Problem, prepare
from titan_core.data.shapes import COLORS, Shape, Shapes, draw
from titan_core.runtime.errors import DataError
from titan_core.runtime.events import Event, Warned, silent


def image(width: int, height: int, color: tuple[int, int, int] = (200, 30, 60), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), color).save(out, kind)
    return out.getvalue()


def opened(path: Path | str | None = None, name: str = "local", listener: Any = silent, **keys: Any) -> Any:
    where = None if path is None else str(path)
    return open_pictures(name, where, Data(**keys), size=16, validation=False, listener=listener)


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_drawn_shapes_are_what_their_captions_say() -> None:
    source = Shapes("train", 32)
    again, held_out = Shapes("train", 32), Shapes("validation", 32)
    captions = []
    for n in range(40):
        one = source.item(n)
        assert np.array_equal(one.image, again.item(n).image)
        captions.append(one.caption)
        named = [COLORS[word] for word in one.caption.split() if word in COLORS]
        assert isinstance(one.image, np.ndarray)
        pixels = {tuple(pixel) for pixel in one.image.reshape(-1, 3).tolist()}
        assert all(color in pixels for color in named), one.caption
    assert len(set(captions)) > 30
    assert captions != [held_out.item(n).caption for n in range(40)]


@pytest.mark.parametrize("form", ["circle", "square", "triangle", "diamond", "ring", "cross"])
def test_forms_cover_what_they_should(form: str) -> None:
    """Areas against closed forms, and symmetry."""
    size, r = 200, 0.3
    inside = (draw([Shape(form, "red", 0.5, 0.5, r)], "white", size) != 255).any(-1)
    area = {
        "circle": np.pi * r**2, "square": (1.7 * r) ** 2, "diamond": 2 * (1.15 * r) ** 2,
        "ring": np.pi * r**2 * (1 - 0.56**2), "cross": 2 * (0.6 * r * 2 * r) - (0.6 * r) ** 2,
        "triangle": 3 * np.sqrt(3) * (0.55 * r) ** 2,
    }[form]  # fmt: skip
    assert inside.mean() == pytest.approx(area, rel=0.05)
    assert np.array_equal(inside, inside[:, ::-1])


def test_long_sides_are_cut_and_small_pictures_refused() -> None:
    wide = np.zeros((20, 40, 3), dtype=np.uint8)
    wide[:, 20:] = 255
    out = io.BytesIO()
    Image.fromarray(wide).save(out, "PNG")
    left, right = (prepare(Picture(out.getvalue(), "", "x"), 20, place) for place in (0.0, 1.0))
    assert isinstance(left, np.ndarray)
    assert isinstance(right, np.ndarray)
    assert left.shape == (3, 20, 20)
    assert (left.max(), right.min()) == (0, 255)
    shrunk = prepare(Picture(image(64, 33), "", "x"), 16, 0.5)
    assert isinstance(shrunk, np.ndarray)
    assert shrunk.shape == (3, 16, 16)
    assert (shrunk[:, 0, 0] == (200, 30, 60)).all()
    small = prepare(Picture(image(64, 15), "", "here"), 16, 0.5)
    assert small == Problem("64 x 15 pixels are less than 16", "here")
    broken = prepare(Picture(image(64, 64)[:100], "", "here"), 16, 0.5)
    assert isinstance(broken, Problem)
    assert "not a readable image" in broken.reason


def test_folders_of_images_with_captions(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(image(20, 20))
        (tmp_path / f"{n}.txt").write_text(f"picture {n}\n")
    (tmp_path / "alone.png").write_bytes(image(20, 20))
    source = opened(tmp_path)
    assert [source.item(n).caption for n in range(len(source))] == ["picture 0", "picture 1", "picture 2"]
    listed = tmp_path / "listed"
    listed.mkdir()
    (listed / "a.png").write_bytes(image(20, 20))
    rows = [{"file_name": "a.png", "text": "an a"}, {"file_name": "gone.png", "text": "gone"}]
    (listed / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = opened(listed)
    assert source.item(0).caption == "an a"
    assert isinstance(source.item(1), Problem)
    (listed / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    with pytest.raises(DataError, match="entry 1 names no image with a caption"):
        opened(listed)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images with captions"):
        opened(tmp_path / "empty")


def test_tar_files_of_webdataset(tmp_path: Path) -> None:
    members = {
        f"{n:04d}.{e}": c for n in range(4) for e, c in (("jpg", image(20, 20, kind="JPEG")), ("txt", b"cap %d" % n))
    }
    tar(tmp_path / "a.tar", {**members, "0009.jpg": b"no caption", "0009.json": b"{}"})
    tar(tmp_path / "b.tar", {"x/1.2.png": image(20, 20), "x/1.txt": b"of b"})
    source = opened(tmp_path)
    assert [source.item(n).caption for n in range(len(source))] == ["cap 0", "cap 1", "cap 2", "cap 3"]
    assert isinstance(prepare(source.item(3), 16, 0.0), np.ndarray)
    with pytest.raises(DataError, match="no sample in the tar files"):
        opened(tmp_path / "b.tar")
    tar(tmp_path / "c.tar", {"1.png": image(20, 20), "1.caption": b"other endings"})
    assert opened(tmp_path / "c.tar", image_key="png", caption_key="caption").item(0).caption == "other endings"


def test_damaged_tar_files_give_what_comes_before(tmp_path: Path) -> None:
    members = {f"{n}.{e}": c for n in range(4) for e, c in (("png", image(20, 20)), ("txt", b"cap %d" % n))}
    content = tar(tmp_path / "whole.tar", members).read_bytes()
    said: list[Event] = []
    (tmp_path / "cut.tar").write_bytes(content[: 4 * 1024 + 512 + 10])
    assert len(opened(tmp_path / "cut.tar", listener=said.append)) == 2
    assert isinstance(said[0], Warned)
    assert "unexpected end of data" in said[0].text
    (tmp_path / "bad.tar").write_bytes(content[:2048] + b"\xff" * 512 + content[2560:])
    assert len(opened(tmp_path / "bad.tar", listener=said.append)) == 1
    assert "no header at byte 2048" in said[1].text  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "no.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(DataError, match="no sample in the tar files"):
        opened(tmp_path / "no.tar", listener=said.append)


def test_tables_of_images(tmp_path: Path) -> None:
    import datasets

    rows = {"jpg": [image(20, 20), image(30, 20)], "txt": ["one", "two"], "other": [1, 2]}
    features = datasets.Features(
        {"jpg": datasets.Image(), "txt": datasets.Value("string"), "other": datasets.Value("int64")}
    )
    table = datasets.Dataset.from_dict(
        {**rows, "jpg": [{"bytes": b, "path": None} for b in rows["jpg"]]}, features=features
    )
    table.to_parquet(str(tmp_path / "a.parquet"))
    source = opened(tmp_path)
    assert [source.item(n).caption for n in range(len(source))] == ["one", "two"]
    assert isinstance(prepare(source.item(1), 16, 0.0), np.ndarray)
    streamed = opened(tmp_path, streaming=True)
    assert [picture.caption for picture in streamed.read(None)] == ["one", "two"]
    with pytest.raises(DataError, match="has no column `image`"):
        opened(tmp_path, image_key="image")


@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets_of_the_hub_are_read_by_name_split_and_columns(streaming: bool, tmp_path: Path, monkeypatch) -> None:
    """`datasets` reads a folder `org/name` as it reads what it has of the Hub; captions may be lists."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/pictures").mkdir(parents=True)
    features = datasets.Features(
        {"image": datasets.Image(), "captions": datasets.List(datasets.Value("string")), "n": datasets.Value("int64")}
    )
    for split, width in (("train", 20), ("validation", 30)):
        pictures = [{"bytes": image(width, 20), "path": None}] * 2
        columns = {"image": pictures, "captions": [[f"{split} one", "again"], [f"{split} two"]], "n": [1, 2]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(f"some/pictures/{split}.parquet")
    keys = {"image_key": "image", "caption_key": "captions", "split": "validation", "streaming": streaming}
    source = opened(name="some/pictures", **keys)
    found = list(source.read(None)) if streaming else [source.item(n) for n in range(len(source))]
    assert [picture.caption for picture in found] == ["validation one", "validation two"]
    assert prepare(found[0], 16, 0.0).shape == (3, 16, 16)
    assert source.fingerprint == "some/pictures/None/validation/image/captions"
    with pytest.raises(DataError, match="`some/pictures` has no column `jpg`") as caught:
        opened(name="some/pictures", streaming=streaming)
    assert caught.value.tip == "its columns: image, captions, n"
    with pytest.raises(DataError, match="cannot read the data set `some/pictures`"):
        opened(name="some/pictures", **{**keys, "split": "test"})
    with pytest.raises(DataError, match="cannot reach the Hub for the data set `some/other`"):
        opened(name="some/other", streaming=streaming)


def test_names_that_are_not_known_are_answered(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set of pictures `cc12-wds`") as error:
        opened(name="cc12-wds")
    assert error.value.tip == "did you mean `cc12m-wds`?"
    with pytest.raises(DataError, match="no pictures at"):
        opened(tmp_path / "nothing")
    with pytest.raises(DataError, match="needs a path"):
        opened()
