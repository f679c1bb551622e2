"""What data on disk can be mistaken for: splits for classes, copies for new images, codes for names, bytes for text."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import crossguard
from crossguard import Report, Tiny, ZeroShot, evaluate, reading, shapes
from crossguard.attacks.synonyms import CharacterEdits, Synonyms, word_list
from crossguard.datasets import index, parquet, shards, tar
from crossguard.datasets.captions import Captions
from crossguard.datasets.folders import Images
from crossguard.datasets.known import Known
from crossguard.datasets.names import check_order, class_list, known_names, split_of, spoken, unspoken
from crossguard.datasets.packed import Lazy, Packed
from crossguard.datasets.parquet import Parquet
from crossguard.datasets.pixels import Memory
from crossguard.datasets.shards import Shards
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel, cosine
from crossguard.shapes import Embeddings, Logits
from crossguard.words import contents

MARK = "\ufeff".encode()


def picture(seed: int = 0, size: int = 6) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def put(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def table(path: Path, schema_names: Sequence[str] = (), group: int = 1000, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = pa.table(columns)
    if schema_names:
        told = {"info": {"features": {"label": {"names": list(schema_names), "_type": "ClassLabel"}}}}
        written = written.replace_schema_metadata({"huggingface": json.dumps(told)})
    pq.write_table(written, path, row_group_size=group)
    return str(path)


def packed(path: Path, *members: tuple[str, bytes], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as opened:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    return path


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(CrossguardError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ids(data: crossguard.Dataset) -> list[str]:
    return [data.id(place) for place in range(len(data))]


def told(data: crossguard.Dataset) -> list[tuple[str, ...]]:
    return [data.captions(place) for place in range(len(data))]


# --- texts ---


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(MARK + "tench\r\na\u2028b\x0cc\u0085d \n\n cow\n\n".encode())
    assert reading.lines(reading.text(file, "")) == ["tench", "a\u2028b\x0cc\u0085d", "", "cow"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_texts_of_other_encodings_are_refused(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "names.txt").write_bytes("café\nthé\n".encode(encoding))
    message = refused(lambda: class_list(str(tmp_path / "names.txt")))
    assert "is not UTF-8 text" in message and "one class name a line" in message
    words = str(tmp_path / "names.txt")
    assert "not UTF-8 text" in refused(lambda: word_list(words))


def test_lists_of_words(tmp_path: Path) -> None:
    words, synonyms = tmp_path / "words.txt", tmp_path / "s.json"
    words.write_bytes(MARK + "Cat\r\nsea\u2028lion\r\n".encode())
    assert word_list(str(words)) == {"cat", "sea\u2028lion"}
    synonyms.write_bytes(MARK + json.dumps({"cat": ["kitty"]}).encode())
    source, edits = Synonyms(str(synonyms)), CharacterEdits(no_new_words=str(words))
    (found,) = source.read(["cat"], 5, 0.0, False)
    assert [one.word for one in found[0]] == ["kitty"]
    before = contents((source, edits))
    words.write_text("dog\n")
    assert word_list(str(words)) == {"dog"} and contents((source, edits)) != before
    after = contents((source, edits))
    synonyms.write_text(json.dumps({"cat": ["tiger"]}))
    assert source.read(["cat"], 5, 0.0, False)[0][0][0].word == "tiger" and contents((source, edits)) != after
    assert contents(CharacterEdits()) == ""


def test_captions_file_with_a_mark_and_in_latin(tmp_path: Path) -> None:
    put(tmp_path / "i", "a.png")
    (tmp_path / "c").write_bytes(MARK + "a.png#0\ta dog\u2028on grass\r\n".encode())
    assert told(Captions(str(tmp_path / "i"), str(tmp_path / "c"))) == [("a dog\u2028on grass",)]
    (tmp_path / "c").write_bytes("a.png#0\tein Café\n".encode("latin-1"))
    assert "not UTF-8" in refused(lambda: len(Captions(str(tmp_path / "i"), str(tmp_path / "c"))))


# --- folders ---


def test_hidden_folders_at_any_depth_and_links(tmp_path: Path) -> None:
    root = put(tmp_path / "a", "cat/0.png", "cat/.thumbs/1.png", "cat/x/.ipynb_checkpoints/2.png", "dog/y/3.png")
    put(tmp_path / "a", "__MACOSX/cat/4.png", "dog/__MACOSX/5.png")
    put(tmp_path / "elsewhere", "6.png", "deeper/7.png")
    (root / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "dog" / "round").symlink_to(root)  # a link to where it lies
    (root / "cow").symlink_to(tmp_path / "elsewhere" / "deeper")
    (root / "dog" / "broken.png").symlink_to(root / "nowhere")
    data = Images(str(root))
    assert ids(data)[:4] == ["cat/0.png", "cow/7.png", "dog/more/6.png", "dog/more/deeper/7.png"]
    assert data.names == ("cat", "cow", "dog") and "dog/y/3.png" in ids(data)
    assert not any("round/dog" in one or "round/round" in one for one in ids(data))
    (root / "dog" / "round").unlink()
    assert len(Images(str(root))) == 5


def test_a_folder_that_is_not_utf_8(tmp_path: Path) -> None:
    put(tmp_path, "cat/0.png")
    try:
        os.mkdir(os.fsencode(str(tmp_path)) + b"/caf\xe9")  # noqa: PTH102
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    assert "not UTF-8; rename it" in refused(lambda: Images(str(tmp_path)).names)


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    put(tmp_path, "cat/0.png", "dog/1.png")
    try:
        (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    report = evaluate(ZeroShot(Images(str(tmp_path))), Tiny(), limit=2, out=tmp_path / "r.json")
    assert set(report.outcomes.id) == {"cat/caf\udce9.png", "dog/1.png"}
    assert Report.load(tmp_path / "r.json").outcomes.id == report.outcomes.id


@pytest.mark.parametrize(
    ("names", "which"),
    [
        (("train/cat/0.png", "val/cat/0.png"), "train, val"),
        (("train/cat/0.png", "train/dog/0.png"), "train"),
        (("Test/0.png", "Training/1.png"), "Test, Training"),
        (("extra/0.png", "dev/cat/0.png", "dev/dog/0.png"), "dev"),
    ],
)
def test_folders_of_splits_are_no_classes(tmp_path: Path, names: tuple[str, ...], which: str) -> None:
    message = refused(lambda: Images(str(put(tmp_path, *names))).names)
    assert f"are the splits {which}, not classes" in message and str(tmp_path / which.split(", ")[0]) in message


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = put(tmp_path, "train/0.png", "bus/0.png", "train/more/0.png", "train/old/0.png")
    assert Images(str(root)).names == ("bus", "train")


def test_classes_sorted_by_letter(tmp_path: Path) -> None:
    data = Images(str(put(tmp_path, "a/abbey/0.png", "b/bakery/shop/0.png", "b/bar/0.png", "a/art_school/0.png")))
    assert data.names == ("abbey", "art school", "bakery shop", "bar") and data.labels().tolist() == [0, 1, 2, 3]
    signs = put(tmp_path / "signs", "a/0.png", "b/session/1.png")  # letters that are the classes themselves
    assert Images(str(signs)).names == ("a", "b")
    nested = put(tmp_path / "nested", "a/day/0.png", "b/day/1.png")
    assert Images(str(nested)).names == ("a", "b")


def test_folders_can_be_named(tmp_path: Path) -> None:
    root = put(tmp_path, "n02123045/0.png", "n02084071/0.png")
    assert Images(str(root), classes=("dog", "cat")).prompts().flat[1] == "a photo of a cat"
    assert "2 class folders" in refused(lambda: Images(str(root), classes=("dog",)).names)
    (tmp_path / "b").mkdir()
    pets = put(tmp_path / "b", "sea_lion/0.png", "dog/0.png")
    assert Images(str(pets), classes=("Dog", "sea lion")).names == ("Dog", "sea lion")
    assert "label 0 'Sea lion', but" in refused(lambda: Images(str(pets), classes=("Sea lion", "dog")).names)


# --- Parquet: splits ---


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("test-00000-of-00002.parquet", "test"),
        ("x/data/train-00000-of-00001-ab12.parquet", "train"),
        ("default/validation/0000.parquet", "validation"),
        ("default/partial-train/0000.parquet", "train"),
        ("cifar10_test.parquet", "test"),
        ("train2017.parquet", "train"),
        ("train/test-set.parquet", "test"),
        ("Test/part-00000-of-00002.parquet", "test"),
        ("extra-00000-of-00001.parquet", "extra"),
        ("dev-test.parquet", "test"),
        ("contest/latest.parquet", None),
        ("0000.parquet", None),
    ],
)
def test_splits_by_path(path: str, split: str | None) -> None:
    assert split_of(path) == split


def many(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        table(root / name, image=[picture(number)], label=[0], name=["cat"])
    return root


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "test.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("x_train.parquet", "x-test-00000-of-00001.parquet"),
    ],
)
def test_files_of_several_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = many(tmp_path, *names)
    message = refused(lambda: len(Parquet(str(root))))
    assert "several splits (test, train)" in message and "split='test'" in message
    assert "several splits" in refused(lambda: len(Parquet(str(root / "**" / "*.parquet"))))
    test = Parquet(str(root), split="test")
    assert len(test) == 1 and torch.equal(test.image(0), Parquet(str(root / names[1])).image(0))
    assert len(set(ids(Parquet(str(root), split="all")))) == 2
    assert "its splits are test, train" in refused(lambda: len(Parquet(str(root), split="val")))
    (root / ".ipynb_checkpoints").mkdir()
    Path(root / names[0]).rename(root / ".ipynb_checkpoints" / "train-checkpoint.parquet")
    assert len(Parquet(str(root))) == 1  # what is hidden is not there


def test_files_beside_a_split_are_not_of_it(tmp_path: Path) -> None:
    root = many(tmp_path, "test.parquet", "more.parquet")
    assert "(test, and files of none)" in refused(lambda: len(Parquet(str(root))))
    assert len(Parquet(str(root), split="test")) == 1
    assert "has no splits; leave split='test' out" in refused(
        lambda: len(Parquet(str(root / "more.parquet"), split="test"))
    )


def test_ids_of_files_of_one_name(tmp_path: Path) -> None:
    root = many(tmp_path, "en/test/0000.parquet", "fr/test/0000.parquet")
    assert ids(Parquet(str(root))) == ["en/test/0000.parquet:0", "fr/test/0000.parquet:0"]
    many(tmp_path / "flat", "0000.parquet", "0001.parquet")
    assert ids(Parquet(str(tmp_path / "flat"))) == ["0000.parquet:0", "0001.parquet:0"]


def test_a_column_of_splits(tmp_path: Path) -> None:
    path = table(
        tmp_path / "x.parquet",
        image=[picture(number) for number in range(4)],
        caption=list("abcd"),
        split=["train", "test", "train", "val"],
    )
    assert "holds the splits test, train, val (column 'split')" in refused(lambda: len(Parquet(path)))
    assert told(Parquet(path, split="train")) == [("a",), ("c",)] and ids(Parquet(path, split="val")) == ["3"]
    assert len(Parquet(path, split="all")) == 4
    assert "its splits are test, train, val" in refused(lambda: len(Parquet(path, split="dev")))
    one = table(tmp_path / "y.parquet", image=[picture()], caption=["a"], split=["test"])
    assert len(Parquet(one)) == 1


# --- Parquet: names ---


def test_underscores_are_spaces_wherever_a_name_comes_from(tmp_path: Path) -> None:
    held = {"image": [picture(0), picture(1)]}
    paths = [
        table(tmp_path / "a.parquet", label=[0, 1], name=["sea_lion", "t_rex"], **held),
        table(tmp_path / "b.parquet", ["sea_lion", "t_rex"], label=[0, 1], **held),
        table(tmp_path / "c.parquet", label=["sea_lion", "t_rex"], **held),
    ]
    sources: list[crossguard.Dataset] = [Parquet(path) for path in paths]
    bare = table(tmp_path / "d.parquet", label=[0, 1], **held)
    sources.append(Parquet(bare, classes=("sea_lion", "t_rex")))
    sources.append(Images(str(put(tmp_path / "f", "sea_lion/0.png", "t_rex/1.png"))))
    packed(tmp_path / "w/test/0.tar", ("0.png", picture()), ("0.cls", b"0"))
    (tmp_path / "w/classnames.txt").write_text("sea_lion\nt_rex\n")
    sources.append(Shards(str(tmp_path / "w")))
    assert [data.names for data in sources] == [("sea lion", "t rex")] * 6
    assert crossguard.Concat(tuple(sources)).names == ("sea lion", "t rex")


def test_an_order_that_the_data_contradict() -> None:
    check_order(("a Cat", "dog"), {0: "cat", 1: "dog"}, "x")
    check_order(("Sea_Lion", "dog", "crane", "crane"), {0: "sea lion", 2: "crane", 3: "crane"}, "x")
    message = refused(lambda: check_order(("dog", "kitten", "cow"), {0: "cow", 1: "cat", 2: "dog"}, "x"))
    assert "label 0 'dog', but x names it 'cow' and has 'dog' at label 2" in message


def test_class_lists_in_another_order_are_refused(tmp_path: Path) -> None:
    held = {"image": [picture(0), picture(1)], "label": [0, 1]}
    for path in (
        table(tmp_path / "a.parquet", name=["cat", "sea_lion"], **held),
        table(tmp_path / "b.parquet", ["cat", "sea_lion"], **held),
    ):
        assert Parquet(path, classes=("kitten", "seal")).names == ("kitten", "seal")
        assert "label 0 'Sea Lion', but" in refused(lambda path=path: Parquet(path, classes=("Sea Lion", "cat")).names)
    packed(tmp_path / "w/test/0.tar", ("0.png", picture()), ("0.cls", b"0"))
    (tmp_path / "w/classnames.txt").write_bytes(MARK + b"cat\r\ndog\r\n")
    assert Shards(str(tmp_path / "w"), classes=("kitten", "dog")).names == ("kitten", "dog")
    assert "classnames.txt' names it 'cat'" in refused(
        lambda: Shards(str(tmp_path / "w"), classes=("dog", "cat")).names
    )


def test_a_column_name_that_names_files(tmp_path: Path) -> None:
    held = {"image": [picture(number) for number in range(4)], "label": [0, 1, 0, 1], "name": list("abcd")}
    assert Parquet(table(tmp_path / "a.parquet", ["cat", "dog"], **held)).names == ("cat", "dog")
    bare = table(tmp_path / "b.parquet", **held)
    assert "called both 'a' and 'c'" in refused(lambda: Parquet(bare).names)
    assert Parquet(bare, classes=("cat", "dog")).names == ("cat", "dog")
    mixed = table(tmp_path / "c.parquet", ["cat", "dog"], **held | {"name": ["cat", "dog", "dog", "dog"]})
    assert "called both 'cat' and 'dog'" in refused(lambda: Parquet(mixed).names)


def test_the_kinds_of_bytes_that_arrow_has(tmp_path: Path) -> None:
    images = [picture(0), picture(1), picture(0)]
    views = pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])
    columns = {
        "view": pa.array(images, pa.binary_view()),
        "large": pa.array(images, pa.large_binary()),
        "dictionary": pa.array(images).dictionary_encode(),
        "struct of views": pa.array([{"bytes": one, "path": None} for one in images], views),
    }
    for number, column in enumerate(columns.values()):
        path = table(tmp_path / f"{number}.parquet", ["a", "b"], image=column, label=[0, 1, 0])
        data = Parquet(path)
        assert [data.opened.read(place) for place in range(3)] == images
    many = [bytes([number % 7]) * number for number in range(600)]  # more than are read at once
    path = table(tmp_path / "many.parquet", image=pa.array([picture(), *many], pa.binary_view()), caption=["a"] * 601)
    opened = parquet._Table.of(path, (0, 0, ""))
    assert [opened.read(row) for row in range(1, 601)] == many


def test_texts_of_another_encoding_in_a_column(tmp_path: Path) -> None:
    latin = pa.array(["café".encode("latin-1")]).view(pa.string())  # as a careless writer leaves them
    path = table(tmp_path / "x.parquet", image=[picture()], caption=latin)
    assert "column 'caption' of" in (message := refused(lambda: len(Parquet(path)))) and "not UTF-8" in message


# --- rows for captions ---


@pytest.mark.parametrize("order", ["rows", "shuffled"])
def test_rows_of_one_image_are_one_sample(tmp_path: Path, order: str) -> None:
    images, texts = [picture(number) for number in range(4)], [["a", "b"], ["c"], ["d", "e", "e"], ["f"]]
    pairs = [(image, text) for image, several in zip(images, texts, strict=True) for text in several]
    if order == "shuffled":
        pairs = pairs[::2] + pairs[1::2]
    lists = Parquet(table(tmp_path / "lists.parquet", image=images, captions=texts))
    rows = Parquet(
        table(tmp_path / "rows.parquet", image=[i for i, _ in pairs], caption=[t for _, t in pairs], group=2)
    )
    assert sorted(map(sorted, told(rows))) == sorted(map(sorted, told(lists))) and len(rows) == 4
    for place in range(4):
        (same,) = [other for other in range(4) if torch.equal(lists.image(other), rows.image(place))]
        assert sorted(lists.captions(same)) == sorted(rows.captions(place))
    assert ids(rows) == [str([image for image, _ in pairs].index(rows.opened.read(place))) for place in range(4)]


def test_rows_of_one_image_and_several_classes_stay_apart(tmp_path: Path) -> None:
    held = {"image": [picture()] * 3, "caption": ["a", "b", "c"], "label": [0, 1, 0], "name": ["cat", "dog", "cat"]}
    data = Parquet(table(tmp_path / "x.parquet", **held))
    assert data.labels().tolist() == [0, 1] and told(data) == [("a", "c"), ("b",)]
    del held["caption"]
    assert len(Parquet(table(tmp_path / "y.parquet", **held))) == 3  # a classification may ask twice


def test_shards_with_a_sample_for_each_caption(tmp_path: Path) -> None:
    root = tmp_path / "w"
    held = [(0, b"a\nb\n"), (1, b"c"), (0, b"d"), (2, MARK + b"e\x0c!\r\n")]
    members = [((f"{n}.png", picture(image)), (f"{n}.txt", text)) for n, (image, text) in enumerate(held)]
    packed(root / "test/0.tar", *members[0], *members[1])
    packed(root / "test/1.tar", *members[2], *members[3])
    (root / "dataset_type.txt").write_text("retrieval\n")
    data = Shards(str(root))
    assert told(data) == [("a", "b", "d"), ("c",), ("e\x0c!",)] and ids(data) == ["0/0", "0/1", "1/3"]
    assert [data.opened.read(place) for place in range(3)] == [picture(number) for number in range(3)]
    large = picture(3, 9)  # two images alone have this size
    packed(root / "test/2.tar", ("4.png", large), ("4.txt", b"f"), ("5.png", large), ("5.txt", b"g"))
    assert told(Shards(str(root)))[3:] == [("f", "g")]


COLORS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "teal": (0, 1, 1), "pink": (1, 0, 1)}


@dataclass(frozen=True)
class Painter(VisionLanguageModel):
    """Embeds an image by its mean color, and a text by the color that its last word names."""

    def encode_image(self, images: shapes.Images) -> Embeddings:
        return images.mean((2, 3)) - 0.4

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        return torch.tensor([COLORS[text.split()[-1]] for text in texts], dtype=torch.float32) - 0.4

    def logits(self, images: Embeddings, texts: Embeddings) -> Logits:
        return cosine(images, texts)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def test_retrieval_of_rows_is_that_of_lists(tmp_path: Path) -> None:
    images, texts = [], []
    for name, color in COLORS.items():
        out = io.BytesIO()
        Image.new("RGB", (4, 4), tuple(255 * part for part in color)).save(out, "PNG")
        images.append(out.getvalue())
        texts.append([f"a photo of {name}", f"painted {name}"])
    flat = [(image, text) for image, several in zip(images, texts, strict=True) for text in several]
    flat = flat[::2] + flat[1::2]  # the captions of an image are not side by side
    paths = [
        table(tmp_path / "lists.parquet", image=images, captions=texts),
        table(tmp_path / "rows.parquet", image=[image for image, _ in flat], caption=[text for _, text in flat]),
    ]
    for path in paths:
        report = crossguard.evaluate(crossguard.Retrieval(Parquet(path)), Painter())
        for way, count in (("image to text", 5), ("text to image", 10)):
            assert report.outcomes.recall(1, way).successes == report.outcomes.recall(1, way).n == count
        said = [note for note in report.notes if "10 rows of the data have 5 images" in note]
        assert len(said) == (path == paths[1])


# --- large row groups ---


def test_a_row_group_that_memory_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSGUARD_CACHE", str(tmp_path / "cache"))
    images = [None if number == 5 else picture(number, 16) for number in range(40)]
    path = table(tmp_path / "x.parquet", image=pa.array(images, pa.binary()), label=[0] * 40, name=["a"] * 40)
    monkeypatch.setattr(parquet, "GROUPS", Memory(5_000, parquet._bytes))
    reads: list[int] = []
    whole = parquet._Table._images
    monkeypatch.setattr(parquet._Table, "_images", lambda self, group: reads.append(group) or whole(self, group))
    data = Parquet(path)
    order = [3, 39, 0, *range(1, 39)]
    for place in order:
        if place == 5:
            assert "row 5 of" in refused(lambda: data.opened.read(5))
        else:
            assert data.opened.read(place) == images[place]
    assert reads == [0] and parquet.GROUPS.size < 5_000
    assert list((tmp_path / "cache").iterdir()) == []  # the file has no name


# --- shards ---


def test_members_are_those_of_tarfile(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) * 4):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=form, pax_headers={"comment": "all"} if form == 2 else None) as opened:
            for place in range(12):
                letters = "ab/" if form == tarfile.USTAR_FORMAT else "aé/"
                name = "".join(letters[one] for one in rng.integers(0, 3, int(rng.choice([5, 60, 95, 240]))))
                member = tarfile.TarInfo(f"{name[: 80 if form == tarfile.USTAR_FORMAT else None].strip('/')}{place}.x")
                member.type = [b"0", b"0", b"7", b"5", b"2"][rng.integers(5)]
                member.size = int(rng.choice([0, 1, 512, 1300])) if member.type in b"07" else 0
                member.mtime = 1.5 if place % 2 and form == tarfile.PAX_FORMAT else 3
                opened.addfile(member, io.BytesIO(bytes(member.size)))
        with tarfile.open(path) as opened:
            wanted = [(member.name, member.offset_data, member.size) for member in opened if member.isfile()]
        with path.open("rb") as file:
            assert list(tar.members(file, "x")) == wanted


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "0.tar", *((f"{number}.png", picture(number)) for number in range(4)))
    data = path.read_bytes()

    def said(content: bytes) -> str:
        path.write_bytes(content)
        with path.open("rb") as file:
            return refused(lambda: list(tar.members(file, "x")))

    second = 512 * (1 + -(-len(picture(0)) // 512))
    assert "damaged" in said(data[: second + 20] + b"?" + data[second + 21 :])  # tarfile takes it for the end
    assert "damaged" in said(data[: second + 124] + b"99999999999" + data[second + 135 :])
    assert "cut short" in said(data[: second + 300]) and "cut short" in said(data[:600])
    assert "no whole tar file" in said(b"") and "no whole tar file" in said(b"no tar at all")
    assert "not UTF-8" in said(data.replace(b"1.png", b"\xe9.png", 1))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ((("0.png", 0), ("1.png", 1), ("0.png", 2)), "holds '0.png' and '0.png', two members"),
        ((("0.png", 0), ("0.PNG", 1)), "holds '0.png' and '0.PNG', two members"),
        ((("0.png", 0), ("0.jpg", 1)), "has 2 images"),
    ],
)
def test_members_that_come_twice(tmp_path: Path, members: tuple[tuple[str, int], ...], words: str) -> None:
    packed(tmp_path / "test/0.tar", *((name, picture(seed)) for name, seed in members))
    assert words in refused(lambda: len(Shards(str(tmp_path))))


def labeled(root: Path, count: int, label: int = 0) -> Path:
    samples = [((f"{n}.png", picture(n)), (f"{n}.cls", str(label).encode())) for n in range(count)]
    packed(root / "test/0.tar", *(member for sample in samples for member in sample))
    (root / "classnames.txt").write_text("cat\ndog\n")
    return root


def test_shards_are_remembered_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSGUARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "WORTH_KEEPING", 3)
    looks: list[int] = []
    look = shards._looked_through
    monkeypatch.setattr(shards, "_looked_through", lambda n, file: looks.append(n) or look(n, file))
    root = labeled(tmp_path / "w", 3)

    def opened() -> tuple[list[str], list[int], list[bytes]]:
        shards._opened.cache_clear()
        data = Shards(str(root))
        return ids(data), data.labels().tolist(), [data.opened.read(place) for place in range(len(data))]

    first = opened()
    assert opened() == first and looks == [0]
    assert first == (["0/0", "0/1", "0/2"], [0, 0, 0], [picture(number) for number in range(3)])
    (kept,) = (tmp_path / "cache").iterdir()
    content = kept.read_bytes()
    for broken in (b"", content[: len(content) // 2], content.replace(b"0.png", b"9.png", 1), b"PK\x03\x04"):
        kept.write_bytes(broken)
        assert opened() == first
    assert len(looks) == 5
    before = Shards(str(root)).opened.fingerprint
    labeled(root, 4, 1)
    assert opened()[1] == [1] * 4 and len(list((tmp_path / "cache").iterdir())) == 1
    assert Shards(str(root)).opened.fingerprint != before
    dated = (root / "test/0.tar").stat()
    os.utime(root / "test/0.tar", ns=(dated.st_atime_ns, dated.st_mtime_ns + 1))
    opened()
    assert len(looks) == 7


def test_a_shard_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    """The places of the old shard hold other images now, which would come with the labels of the old ones."""
    root = labeled(tmp_path / "w", 4)
    data = Shards(str(root))
    assert data.opened.read(2) == picture(2)
    labeled(root, 4, 1)
    with pytest.raises(CrossguardError, match=r"0\.tar' has changed since it was looked through"):
        data.opened.read(2)
    again = Shards(str(root))
    assert again.labels().tolist() == [1] * 4 and again.opened.read(2) == picture(2)


def test_an_index_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CROSSGUARD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(shards, "WORTH_KEEPING", 1)
    assert len(Shards(str(labeled(tmp_path / "w", 2)))) == 2
    monkeypatch.delenv("CROSSGUARD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert index.folder() == tmp_path / "crossguard"


def test_packed_strings() -> None:
    held = Packed.joined([Packed.of([b"a", b"", b"bc"]), Packed.of([]), Packed.of([b"", b"d"])])
    assert list(held) == [b"a", b"", b"bc", b"", b"d"] and held[-1] == b"d" and held[1:3] == (b"", b"bc")
    assert Lazy(3, str)[::-1] == ("2", "1", "0")
    with pytest.raises(IndexError):
        held[5]


# --- names that one says ---


def test_what_nobody_says() -> None:
    assert spoken("sea_lion") == "sea lion"
    assert unspoken(["n01440764", "n01443537"]) == "WordNet ids" and unspoken(["0", "12"]) == "numbers"
    assert unspoken(["a", "É"]) == "single letters"
    assert unspoken(["0", "cat"]) is unspoken(["n1", "n2"]) is unspoken([]) is unspoken(["707-320"]) is None


@pytest.mark.parametrize(
    ("word", "options", "folders", "names"),
    [
        ("ImageNet", {}, ("val/n01440764", "val/n15075141"), ("tench", "toilet paper")),
        ("ImageNet", {"split": "train"}, ("train/0", "train/999"), ("tench", "toilet paper")),
        (
            "TinyImageNet",
            {"split": "train"},
            ("train/n01443537/images", "train/n12267677/images"),
            ("goldfish", "acorn"),
        ),
        ("Caltech256", {}, ("001.ak47", "253.faces-easy-101", "232.t-shirt"), ("ak47", "t-shirt", "faces easy")),
        ("SUN397", {}, ("a/abbey", "c/casino/indoor"), ("abbey", "casino indoor")),
        ("Country211", {}, ("test/AD", "test/ZW"), ("Andorra", "Zimbabwe")),
        ("Flowers102", {}, ("test/1", "test/102", "test/9"), ("pink primrose", "blackberry lily", "monkshood")),
        ("Flowers102", {}, ("test/00", "test/101"), ("pink primrose", "blackberry lily")),
        ("STL10", {}, ("test/0", "test/9"), ("airplane", "truck")),
        ("Food101", {}, ("test/apple_pie", "test/pho"), ("apple pie", "pho")),
    ],
)
def test_published_sets_have_spoken_names(
    tmp_path: Path, word: str, options: dict[str, Any], folders: tuple[str, ...], names: tuple[str, ...]
) -> None:
    root = put(tmp_path, *(f"{folder}/0.png" for folder in folders))
    assert getattr(crossguard, word)(str(root), **options).names == names


def test_names_that_are_not_known_are_refused(tmp_path: Path) -> None:
    def kind(word: str, *folders: str, **options: Any) -> Known:
        root = put(tmp_path / word, *(f"test/{folder}/0.png" for folder in folders))
        return getattr(crossguard, word)(str(root), split="test", **options)

    data = kind("ImageNet", "n01440764", "n00000001")
    message = refused(data.prompts)
    assert "are WordNet ids (n00000001)" in message and "classes='names.txt'" in message
    (tmp_path / "ImageNet" / "words.txt").write_text("n00000001\tthing, object\nn01440764\tother\n")
    assert kind("ImageNet").names == ("thing", "tench")
    assert "are numbers (0, 1)" in refused(lambda: kind("OxfordPets", "0", "1").names)
    assert kind("OxfordPets", classes=("Abyssinian", "Bengal")).names == ("Abyssinian", "Bengal")
    assert "are numbers" in refused(lambda: kind("Flowers102", "0", "102").names)
    assert "are single letters" in refused(lambda: kind("DTD", "a", "b").names)
    assert "codes of countries (QQ)" in refused(lambda: kind("Country211", "AD", "QQ").names)


def test_tables_of_names() -> None:
    sizes = {"wordnet": 1000, "countries": 211, "flowers": 102}
    assert {table: len(known_names(table)) for table in sizes} == sizes
    for names in map(known_names, sizes):
        assert all(name == name.strip() and name for name in (*names, *names.values()))
    assert list(known_names("flowers")) == [str(number) for number in range(1, 103)]
    assert list(known_names("wordnet")) == sorted(known_names("wordnet"))


def test_a_copy_as_the_hub_is_downloaded(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        held = {"img": [picture(number) for number in range(count)], "label": [0] * count}
        table(tmp_path / f"plain_text/{split}-00000-of-00001.parquet", **held)
        table(tmp_path / f"c/default/{split}/0000.parquet", **held)
    for path in (tmp_path, tmp_path / "c", tmp_path / "c/default"):
        assert len(crossguard.CIFAR10(str(path))) == 2 and len(crossguard.CIFAR10(str(path), split="train")) == 3
    table(tmp_path / "other/test.parquet", image=[picture()], label=[0])
    assert "several versions of CIFAR10 (other, plain_text)" in refused(lambda: len(crossguard.CIFAR10(str(tmp_path))))


def test_a_file_of_several_splits_answers_for_one(tmp_path: Path) -> None:
    held = {"image": [picture(number) for number in range(3)], "label": [0, 0, 0]}
    path = table(tmp_path / "x.parquet", split=["train", "test", "train"], **held)
    assert ids(crossguard.CIFAR10(path)) == ["1"] and len(crossguard.CIFAR10(path, split="train")) == 2
    assert "its splits are test, train" in refused(lambda: len(crossguard.CIFAR10(path, split="val")))


def test_tiny_imagenet_as_it_is_published(tmp_path: Path) -> None:
    root = put(tmp_path, *(f"val/images/val_{number}.JPEG" for number in range(3)))
    listed = [("val_0", "n12267677"), ("val_1", "n01443537"), ("val_2", "n12267677"), ("val_3", "n02123045")]
    text = "".join(f"{name}.JPEG\t{wnid}\t0\t0\t62\t62\n" for name, wnid in listed)
    (root / "val/val_annotations.txt").write_text(text)
    data = crossguard.TinyImageNet(str(root))
    assert data.names == ("goldfish", "tabby cat", "acorn") and data.labels().tolist() == [2, 0, 2]
    assert data.id(1) == "images/val_1.JPEG"
    put(root, "val/images/more.JPEG")
    assert "does not list the image 'images/more.JPEG'" in refused(lambda: len(crossguard.TinyImageNet(str(root))))


def test_data_that_nobody_can_name_is_noted(tmp_path: Path) -> None:
    root = put(tmp_path, "0/0.png", "1/1.png")
    report = crossguard.evaluate(crossguard.ZeroShot(Images(str(root), templates=("{} red",))), Painter())
    assert any("class names are numbers" in note and "classes=" in note for note in report.notes)


# --- fingerprints ---


def test_fingerprints_follow_the_files(tmp_path: Path) -> None:
    def prints() -> list[str]:
        parquet._opened.cache_clear()
        words = (
            Images(str(tmp_path / "f")),
            Images(str(tmp_path / "f"), classes=("a", "b")),
            Parquet(str(tmp_path / "x.parquet")),
            Captions(str(tmp_path / "f"), str(tmp_path / "c.json")),
        )
        return [word.opened.fingerprint for word in words]

    put(tmp_path / "f", "cat/0.png", "dog/0.png")
    table(tmp_path / "x.parquet", image=[picture()], label=[0], name=["cat"])
    (tmp_path / "c.json").write_text(json.dumps([{"image": "cat/0.png", "caption": "a cat"}]))
    first = prints()
    assert prints() == first and len(set(first)) == 4 and all(first)
    (tmp_path / "f" / "cat" / "0.png").write_bytes(picture(1))
    second = prints()
    assert [one != other for one, other in zip(first, second, strict=True)] == [True, True, False, True]
    table(tmp_path / "x.parquet", image=[picture(1)], label=[0], name=["cow"])
    (tmp_path / "c.json").write_text(json.dumps([{"image": "cat/0.png", "caption": "a cow"}]))
    third = prints()
    assert [one != other for one, other in zip(second, third, strict=True)] == [False, False, True, True]
