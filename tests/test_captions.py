"""Captions beside a folder of images: every format, every sentence about bad input."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import crossguard
from crossguard.datasets.captions import Captions
from crossguard.datasets.combined import Concat, Prompted, Subset
from crossguard.datasets.parquet import Parquet
from crossguard.errors import CrossguardError

COLORS = {"a.png": (255, 0, 0), "b.png": (0, 255, 0), "c.png": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    root.mkdir()
    for name, color in COLORS.items():
        Image.new("RGB", (6, 4), color).save(root / name)
    return root


def refused(act: Callable[[], object]) -> str:
    """The sentence of the error, which is one line without a traceback in it."""
    with pytest.raises(CrossguardError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and message
    return message


def written(folder: Path, content: object, name: str = "captions") -> str:
    file = folder.parent / name
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def held(data: Captions) -> dict[str, tuple[str, ...]]:
    """Ids and captions, in order; the images are those of the ids."""
    for index in range(len(data)):
        color = torch.tensor(COLORS[Path(data.id(index)).name], dtype=torch.uint8)
        assert torch.equal(data.image(index), color[:, None, None].expand(3, 4, 6))
    return {data.id(index): data.captions(index) for index in range(len(data))}


def opened(folder: Path, content: object, **options: Any) -> dict[str, tuple[str, ...]]:
    return held(Captions(str(folder), written(folder, content), **options))


def said(folder: Path, content: object, **options: Any) -> str:
    file = written(folder, content)
    return refused(lambda: len(Captions(str(folder), file, **options)))


# --- formats ---


def coco() -> dict[str, Any]:
    return {
        "info": {"year": 2014},
        "images": [{"id": 7, "file_name": "b.png", "width": 6}, {"id": 3, "file_name": "a.png"}],
        "annotations": [
            {"id": 1, "image_id": 3, "caption": " red\n"},
            {"id": 2, "image_id": 7, "caption": "green"},
            {"id": 3, "image_id": 3, "caption": "a red one"},
        ],
    }


def karpathy() -> dict[str, Any]:
    rows = (("c.png", "test", ["blue", " sea "]), ("a.png", "restval", ["red"]), ("b.png", "train", ["green"]))
    return {
        "images": [
            {"filename": name, "split": split, "sentences": [{"raw": text, "tokens": []} for text in texts], "imgid": 0}
            for name, split, texts in rows
        ],
        "dataset": "flickr8k",
    }


def test_coco(folder: Path) -> None:
    assert opened(folder, coco()) == {"b.png": ("green",), "a.png": ("red", "a red one")}
    data = Captions(str(folder), written(folder, coco()), size=2)
    assert data.labels().tolist() == [-1, -1] and data.labels().dtype == torch.int64 and data.names == ()
    assert data.image(0).shape == (3, 2, 2) and data.skipped == 0
    (batch,) = data.batches(4)
    assert batch.ids == ("b.png", "a.png")


def test_karpathy(folder: Path) -> None:
    assert opened(folder, karpathy(), split="test") == {"c.png": ("blue", "sea")}
    assert opened(folder, karpathy(), split="restval") == {"a.png": ("red",)}
    assert list(opened(folder, karpathy(), split="all")) == ["c.png", "a.png", "b.png"]
    message = said(folder, karpathy())
    assert "the splits restval, test, train" in message and "split='test'" in message and "split='all'" in message
    assert "no image of the split 'val'; its splits are restval, test, train" in said(folder, karpathy(), split="val")
    one = {"images": karpathy()["images"][:1]}
    assert opened(folder, one) == {"c.png": ("blue", "sea")}
    del one["images"][0]["split"]
    assert opened(folder, one) == opened(folder, one, split="all") == {"c.png": ("blue", "sea")}
    assert "has no splits; leave split='test' out" in said(folder, one, split="test")


def test_lists(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a.png").rename(folder / "sub" / "a.png")
    rows = [{"image": "sub/a.png", "caption": ["red", "rouge"]}, {"image": "b.png", "caption": "green "}]
    assert opened(folder, rows) == {"sub/a.png": ("red", "rouge"), "b.png": ("green",)}
    training = [  # a row a caption
        {"image": "b.png", "caption": "green", "image_id": 1},
        {"image": "c.png", "caption": "blue", "image_id": 2},
        {"image": "b.png", "caption": "vert", "image_id": 1},
    ]
    assert opened(folder, training) == {"b.png": ("green", "vert"), "c.png": ("blue",)}
    assert "has no splits" in said(folder, training, split="train")


def test_tokens(folder: Path) -> None:
    text = "b.png#0\tgreen , a #1 .\nb.png#1\tvert\t!\n\na.png#0\t red\r\n"
    assert opened(folder, text) == {"b.png": ("green , a #1 .", "vert\t!"), "a.png": ("red",)}


@pytest.mark.parametrize(
    "text",
    [
        'image,caption\nb.png,"green, ""vert"""\nb.png,plain, and more\na.png,red\n',
        '\ufeffimage,caption\r\nb.png,"green, ""vert"""\r\nb.png,"plain, and more"\r\na.png,red',
        'image_name| comment_number| comment\nb.png| 0| green, "vert"\nb.png| 1|plain, and more\na.png| 0| red\n\n',
        'image_name,comment_number,comment\nb.png,0,"green, ""vert"""\nb.png, 1,"plain, and more"\na.png,0, red',
        ',image,caption\n0,b.png,"green, ""vert"""\n1,b.png,"plain, and more"\n2,a.png,red',
    ],
)
def test_tables(folder: Path, text: str) -> None:
    assert opened(folder, text) == {"b.png": ('green, "vert"', "plain, and more"), "a.png": ("red",)}


def test_the_row_of_flickr30k_without_its_second_mark(folder: Path) -> None:
    text = 'image_name| comment_number| comment\na.png| 3| a "red | one\na.png| 4   A dog runs across the grass .\n'
    assert opened(folder, text) == {"a.png": ('a "red | one', "A dog runs across the grass .")}
    text = "image_name,comment_number,comment\na.png, 4   A dog runs .,\n"
    assert opened(folder, text) == {"a.png": ("A dog runs .",)}


# --- where the images are ---


def test_images_of_subfolders_and_of_names_with_folders(folder: Path) -> None:
    (folder / "val2014").mkdir()
    (folder / "c.png").rename(folder / "val2014" / "c.png")
    told = karpathy()
    for image in told["images"]:
        image["filepath"] = "val2014"
    assert opened(folder, told, split="test") == {"c.png": ("blue", "sea")}
    assert list(opened(folder, told, split="all")) == ["c.png", "a.png", "b.png"]
    assert list(opened(folder, [{"image": "flickr30k-images/a.png", "caption": "red"}])) == ["flickr30k-images/a.png"]
    assert list(opened(folder, [{"image": "/data/a.png", "caption": "red"}])) == ["/data/a.png"]
    both = [{"image": f"{place}/a.png", "caption": "red"} for place in ("one", "two")]
    message = said(folder, both)
    assert "'one/a.png' and 'two/a.png'" in message and str(folder / "a.png") in message


def test_missing_images_are_counted_or_skipped(folder: Path) -> None:
    rows = [{"image": name, "caption": name} for name in ("no.png", "b.png", "nor\0.png", "n" * 300, "a.png", ".")]
    message = said(folder, rows)
    assert "4 of the 6 images" in message and "'no.png'" in message and "--skip-broken" in message
    (folder / "a.png").write_bytes(b"?")
    data = Captions(str(folder), written(folder, rows), skip_broken=True)
    assert held(data) == {"b.png": ("b.png",)} and data.skipped == 5 and data.labels().tolist() == [-1]
    assert "no.png" in data.opened.skipped[0] and "a.png" in data.opened.skipped[3]
    assert "none of the 1 images" in said(folder, rows[:1], skip_broken=True)
    assert str(folder / "a.png") in said(folder, rows[4:5])


# --- the word ---


def test_the_word_and_its_copies(folder: Path) -> None:
    data = Captions(str(folder), written(folder, karpathy()), split="test", size=4, skip_broken=True)
    for short in (False, True):
        assert crossguard.build(crossguard.show(data, short=short)) == data
    assert len(data) == 1
    copy = pickle.loads(pickle.dumps(data))
    assert copy == data and copy.captions(0) == ("blue", "sea")
    assert Captions(str(folder), data.file, "test", skip_broken=True).opened is data.opened
    assert crossguard.Captions is Captions


def test_a_new_word_sees_what_has_changed(folder: Path) -> None:
    file = written(folder, "image,caption\na.png,red\n")
    first = Captions(str(folder), file)
    assert held(first) == {"a.png": ("red",)}
    written(folder, "image,caption\na.png,scarlet\nb.png,green\n")
    assert held(Captions(str(folder), file)) == {"a.png": ("scarlet",), "b.png": ("green",)} and len(first) == 1
    Image.new("RGB", (9, 9), "white").save(folder / "a.png")
    assert Captions(str(folder), file).image(0).shape == (3, 9, 9)


def test_captions_go_on_through_other_datasets(folder: Path) -> None:
    data = Captions(str(folder), written(folder, karpathy()), split="all")
    part = Subset(data, 2)
    rows = data.chosen(2)
    assert [part.captions(place) for place in range(2)] == [data.captions(row) for row in rows]
    assert [part.id(place) for place in range(2)] == [data.id(row) for row in rows]
    both = Concat((part, Prompted(data)))
    assert [both.captions(index) for index in range(5)][1:3] == [data.captions(rows[1]), ("blue", "sea")]
    assert both.labels().tolist() == [-1] * 5 and both.names == () and both.id(2) == "1/c.png"


# --- bad input ---


def test_places(folder: Path) -> None:
    file = written(folder, coco())
    assert "does not exist" in refused(lambda: len(Captions(str(folder / "no"), file)))
    assert "is a file, not a folder" in refused(lambda: len(Captions(file, file)))
    assert "does not exist" in refused(lambda: len(Captions(str(folder), file + "x")))
    assert "is a folder" in refused(lambda: len(Captions(str(folder), str(folder))))
    assert "not UTF-8" in refused(lambda: len(Captions(str(folder), str(folder / "a.png"))))
    assert "not possible" in refused(lambda: len(Captions(str(folder), file, size=0)))


def changed(told: dict[str, Any], which: str, index: int, **values: Any) -> dict[str, Any]:
    told[which][index].update(values)
    return told


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no captions file known here"),
        ("a.png red\n", "no captions file known here"),
        ("image,text\na.png,red\n", "no captions file known here"),
        ('{"images": [', "is not whole JSON"),
        ("[" * 9999, "nested too deeply"),
        ({"images": 3}, "no captions file known here"),
        ({"images": [{"id": 1, "file_name": "a.png"}]}, "no captions file known here"),
        ([{"image": "a.png", "question": "red?"}], "no captions file known here"),
        ([1], "no captions file known here"),
        ([], "lists no image"),
        ({"images": [], "annotations": []}, "lists no image"),
        ("image,caption\n", "lists no image"),
        # COCO
        (changed(coco(), "annotations", 1, image_id=3), "the image 'b.png' of"),
        (changed(coco(), "annotations", 1, image_id=8), "annotations[1] of"),
        (changed(coco(), "annotations", 1, image_id=8), "is of the image 8"),
        (changed(coco(), "annotations", 1, image_id=[7]), "is of the image [7]"),
        (changed(coco(), "annotations", 1, caption=" "), "a caption of the image 'b.png'"),
        (changed(coco(), "annotations", 2, caption=None), "annotations[2]"),
        (changed(coco(), "images", 1, id=7), "images[1]"),
        (changed(coco(), "images", 1, file_name="b.png"), "lists the image 'b.png' 2 times"),
        (changed(coco(), "images", 1, file_name=5), "no name of an image file"),
        ({**coco(), "annotations": [{"image_id": 3, "bbox": []}]}, "annotations[0] of"),
        ({**coco(), "annotations": [{"image_id": 3, "bbox": []}]}, "has no 'caption'"),
        # Karpathy
        (changed({"images": karpathy()["images"][:1]}, "images", 0, sentences=[]), "image 'c.png' of"),
        (changed({"images": karpathy()["images"][:1]}, "images", 0, sentences=[]), "has no caption"),
        (changed({"images": karpathy()["images"][:1]}, "images", 0, sentences=[{"raw": " "}]), "is empty"),
        (changed({"images": karpathy()["images"][:1]}, "images", 0, sentences=["red"]), "caption that is no text"),
        (changed({"images": karpathy()["images"][:1]}, "images", 0, sentences="red"), "no list of sentences"),
        ({"images": [*karpathy()["images"][:1], {"filename": "b.png"}]}, "images[1] of"),
        # lists
        ([{"image": "a.png", "caption": []}], "the image 'a.png' of"),
        ([{"image": "a.png", "caption": ["red", ""]}], "a caption of the image 'a.png'"),
        ([{"image": "a.png", "caption": ["red", 5]}], "row[0] of"),
        ([{"image": "a.png", "caption": "red"}, {"image": "b.png"}], "row[1] of"),
        ([{"image": "a.png", "caption": "red"}, "b.png"], "row[1] of"),
        ([{"image": " ", "caption": "red"}], "no name of an image file"),
        # lines and tables
        ("a.png#0\tred\nb.png green\n", "line 2 of"),
        ("a.png#0\t \n", "a caption of the image 'a.png'"),
        ("image,caption\na.png,red\nb.png\n", "line 3 of"),
        ("image,caption\na.png,\n", "a caption of the image 'a.png'"),
        ('image,caption\na.png,"red\nb.png,green\n', "no row of a table"),
        ("image,caption\n,red\n", "line 2 of"),
        ("image_name| comment_number| comment\na.png\n", "line 2 of"),
        ("image_name| comment_number| comment\na.png| 1\n", "2 of 3 columns"),
    ],
)
def test_bad_files(folder: Path, content: object, words: str) -> None:
    assert words in (message := said(folder, content)), message
    assert str(folder.parent / "captions") in message and len(message) < 400


def test_what_another_split_lacks_does_not_matter(folder: Path) -> None:
    told = changed(karpathy(), "images", 2, sentences=[], filename="gone.png")
    assert opened(folder, told, split="test") == {"c.png": ("blue", "sea")}
    assert "'gone.png'" in said(folder, told, split="all")


# --- captions in Parquet files ---


def parquet(path: Path, **columns: Any) -> str:
    png = path.parent / "x.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(png)
    rows = len(next(iter(columns.values())))
    pq.write_table(pa.table({"image": [png.read_bytes()] * rows, **columns}), path)
    return str(path)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"captions": [["red"], []]}, "row 1 of"),
        ({"captions": [["red"], None]}, "has no caption"),
        ({"captions": [["red"], ["blue", " "]]}, "a caption in row 1"),
        ({"captions": [["red", None], ["blue"]]}, "a caption in row 0"),
        ({"caption": ["red", ""]}, "is empty"),
        ({"caption": ["red", None]}, "has no caption"),
    ],
)
def test_parquet_of_captions_alone_lacks_none(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    path = parquet(tmp_path / "x.parquet", **columns)
    assert words in (message := refused(lambda: len(Parquet(path)))) and path in message, message
    labeled = parquet(tmp_path / "y.parquet", **columns, label=[0, 1], name=["a", "b"])
    assert Parquet(labeled).labels().tolist() == [0, 1]


def test_parquet_files_of_captions_all_have_them(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", captions=[["red"]])
    other = parquet(tmp_path / "b.parquet", key=["k"])
    assert other in (message := refused(lambda: len(Parquet(str(tmp_path))))) and "has no caption" in message
