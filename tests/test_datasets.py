"""Datasets read from disk: every format, every sentence about bad input, real data where there is some."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from crossguard.data import Dataset
from crossguard.datasets.combined import Concat, Prompted, Rest, Subset
from crossguard.datasets.embedded import Scenes
from crossguard.datasets.folders import Images
from crossguard.datasets.known import CIFAR10, Caltech101, EuroSAT, ImageNet, Known, TinyImageNet
from crossguard.datasets.parquet import Parquet
from crossguard.datasets.pixels import DECODED, Memory, decode
from crossguard.datasets.shards import Shards
from crossguard.errors import CrossguardError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def picture(width: int = 8, height: int = 8, seed: int = 0, mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def refused(act: Callable[[], object]) -> str:
    """The sentence of the error, which is one line without a traceback in it."""
    with pytest.raises(CrossguardError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and message
    return message


# --- pixels ---


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"])
def test_every_format_is_read(kind: str) -> None:
    image = Image.new("RGB", (6, 4), RED)
    got = decode(encoded(image, kind))
    assert got.dtype == torch.uint8 and got.shape == (3, 4, 6)
    assert (got.float().mean(dim=(1, 2)) - torch.tensor([255.0, 0, 0])).abs().max() < 3


def test_grey_is_repeated() -> None:
    grey = picture(mode="L")
    got = decode(encoded(grey))
    assert torch.equal(got[0], torch.from_numpy(np.array(grey))) and torch.equal(got[0], got[1])
    assert torch.equal(got[1], got[2])


def test_sixteen_bits_are_cut_to_eight() -> None:
    deep = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert decode(encoded(deep))[0].tolist() == [[0, 1, 255]]


def test_transparency_is_white() -> None:
    image = Image.new("RGBA", (3, 1), (*RED, 255))
    image.putpixel((1, 0), (*RED, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))
    got = decode(encoded(image))
    assert [tuple(got[:, 0, x].tolist()) for x in range(3)] == [RED, (255, 255, 255), (204, 204, 204)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    assert decode(encoded(palette))[:, 0, 1].tolist() == list(BLUE)
    assert decode(encoded(palette, transparency=0))[:, 0, 0].tolist() == [255, 255, 255]
    grey = Image.merge("LA", (Image.new("L", (1, 1), 10), Image.new("L", (1, 1), 0)))
    assert decode(encoded(grey))[:, 0, 0].tolist() == [255, 255, 255]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in (GREEN, BLUE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[:, 0, 0].tolist() == list(GREEN)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(kind: str) -> None:
    image = Image.new("RGB", (16, 8), RED)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(image, kind, exif=exif)).shape == (3, 16, 8)


@pytest.mark.parametrize("shape", [(9, 9), (20, 13), (13, 20), (5, 8), (17, 16)])
def test_resizing_is_pillows(shape: tuple[int, int]) -> None:
    image = picture(*shape)
    width, height = shape
    scaled = (12 * width // height, 12) if width >= height else (12, 12 * height // width)
    large = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = round((large.width - 12) / 2), round((large.height - 12) / 2)
    assert torch.equal(decode(encoded(image), 12), pixels(large.crop((left, top, left + 12, top + 12))))


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    memory: Memory[str] = Memory(limit=10, size=lambda held: 11 if held == "huge" else 4)
    made: list[str] = []

    def get(key: str) -> str:
        return memory.get(key, lambda: made.append(key) or key)

    assert [get(key) for key in "abaca"] == list("abaca")
    assert "".join(made) == "abc" and memory.size == 8
    get("huge")
    get("b")
    assert made[-2:] == ["huge", "b"] and memory.size == 8
    memory.clear()
    assert memory.size == 0
    memory.limit = 5
    assert [get(key) for key in "de"] == ["d", "e"] and memory.size == 4 and memory.limit == 5


def test_memory_makes_a_thing_once_for_all_threads_that_ask() -> None:
    memory: Memory[str] = Memory(limit=100, size=len)
    made: list[str] = []
    together = threading.Barrier(4)

    def make(key: str) -> str:
        made.append(key)
        time.sleep(0.02)
        return key

    def ask(key: str) -> str:
        together.wait()
        return memory.get(key, lambda: make(key))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, "aaab")) == list("aaab")
    assert sorted(made) == ["a", "b"]
    with pytest.raises(KeyError):
        memory.get("c", lambda: {}["c"])
    assert memory.get("c", lambda: "c") == "c"  # who failed leaves nothing behind


# --- folders ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for label, name in enumerate(("dog", "sea_lion")):
        (root / name / "more").mkdir(parents=True)
        for number in range(3):
            picture(seed=10 * label + number).save(root / name / f"{number}.png")
    picture(seed=5).save(root / "dog" / "more" / "4.webp", lossless=True)
    (root / "dog" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    return root


def test_images(folder: Path) -> None:
    data = Images(str(folder))
    assert data.names == ("dog", "sea lion") and len(data) == 7
    assert data.labels().tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert [data.id(index) for index in (0, 3, 4)] == ["dog/0.png", "dog/more/4.webp", "sea_lion/0.png"]
    assert torch.equal(data.image(4), pixels(picture(seed=10)))
    assert torch.equal(data.image(3), pixels(picture(seed=5)))
    assert data.prompts().flat == ["a photo of a dog", "a photo of a sea lion"]
    assert Images(str(folder), templates=("{}!",)).prompts().flat == ["dog!", "sea lion!"]
    assert data.opened is Images(str(folder), templates=("{}!",)).opened
    batches = list(data.batches(3))
    assert [len(batch) for batch in batches] == [3, 3, 1] and batches[0].images.max() <= 1
    with pytest.raises(IndexError):
        data.image(7)


def test_a_sample_cannot_be_spoiled_by_its_user(folder: Path) -> None:
    data = Images(str(folder))
    data.image(0).zero_()
    assert torch.equal(data.image(0), pixels(picture()))


def test_a_new_word_sees_a_changed_folder(folder: Path) -> None:
    assert len(Images(str(folder))) == 7
    picture(seed=3).save(folder / "sea_lion" / "9.png")
    assert len(Images(str(folder))) == 8


def test_a_word_travels_without_its_data(folder: Path) -> None:
    data = Images(str(folder), size=4)
    assert data.image(0).shape == (3, 4, 4)
    copy = pickle.loads(pickle.dumps(data))
    assert copy == data and copy.image(0).shape == (3, 4, 4)
    both = Subset(Concat((data, data)), 3)
    assert len(both) == 3 and pickle.loads(pickle.dumps(both)) == both


def test_folder_errors(folder: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(lambda: Images(str(tmp_path / "none")).names)
    assert "is a file" in refused(lambda: Images(str(folder / "dog" / "0.png")).names)
    assert "has no subfolder" in refused(lambda: Images(str(folder / "dog" / "more")).names)
    assert "not possible" in refused(lambda: len(Images(str(folder), size=0)))
    (folder / "cat").mkdir()
    assert "cat" in (message := refused(lambda: Images(str(folder)).names)) and "holds no image" in message


def broken(kind: str) -> bytes:
    data = encoded(picture(64, 64), kind)
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    "data",
    [
        *(broken(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")),
        b"",
        b"text, not an image",
        b"%!PS-Adobe",
    ],
)
def test_a_broken_image_is_named_or_skipped(folder: Path, data: bytes) -> None:
    (folder / "sea_lion" / "1.png").write_bytes(data)
    plain = Images(str(folder))
    message = refused(lambda: list(plain.batches(4)))
    assert str(folder / "sea_lion" / "1.png") in message and "--skip-broken" in message
    with pytest.raises(CrossguardError):
        plain.image(5)
    skipping = Images(str(folder), skip_broken=True)
    assert skipping.skipped == 1 and len(skipping) == 6 and "1.png" in skipping.opened.skipped[0]
    assert [skipping.id(index) for index in (4, 5)] == ["sea_lion/0.png", "sea_lion/2.png"]
    assert torch.equal(skipping.image(5), pixels(picture(seed=12)))
    assert skipping.labels().tolist() == [0, 0, 0, 0, 1, 1] and plain.skipped == 0


def test_nothing_but_broken_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"?")
    assert "none of the 1 images" in refused(lambda: Images(str(tmp_path), skip_broken=True).names)
    assert "no image in a format" in refused(lambda: Images(str(tmp_path)).names)


# --- Parquet ---


def table(path: Path, metadata: dict[str, Any] | None = None, group: int = 2, **columns: Any) -> str:
    written = pa.table(columns)
    if metadata is not None:
        written = written.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(written, path, row_group_size=group)
    return str(path)


def images(count: int) -> list[bytes]:
    return [encoded(picture(seed=seed)) for seed in range(count)]


def features(*names: str) -> dict[str, Any]:
    return {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}, "image": {"_type": "Image"}}}}


def test_parquet(tmp_path: Path) -> None:
    path = table(
        tmp_path / "x.parquet",
        image=images(5),
        label=pa.array([1, 0, 1, 0, 1], pa.int32()),
        name=["dog", "cat", "dog", "cat", "dog"],
        key=list("abcde"),
        domain=["photo", "sketch", "photo", "photo", "sketch"],
    )
    data = Parquet(path)
    assert data.names == ("cat", "dog") and data.labels().tolist() == [1, 0, 1, 0, 1]
    assert data.labels().dtype == torch.int64 and [data.id(index) for index in range(5)] == list("abcde")
    assert all(torch.equal(data.image(seed), pixels(picture(seed=seed))) for seed in (4, 0, 3))
    sketches = Parquet(path, domain="sketch", classes=("a cat", "a dog"))
    assert [sketches.id(index) for index in range(2)] == ["b", "e"] and sketches.names == ("a cat", "a dog")
    assert torch.equal(sketches.image(1), pixels(picture(seed=4))) and sketches.labels().tolist() == [0, 1]
    assert "photo, sketch" in refused(lambda: Parquet(path, domain="oil").names)
    (tmp_path / "names.txt").write_text("kitten\npuppy\n")
    assert Parquet(path, classes=str(tmp_path / "names.txt")).names == ("kitten", "puppy")
    assert "class list" in refused(lambda: Parquet(path, classes="no.txt").names)
    assert "outside the class list of 1" in refused(lambda: Parquet(path, classes=("cat",)).names)


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    structs = [{"bytes": data, "path": None} for data in images(3)]
    for number in range(2):
        table(
            tmp_path / f"data/test-0000{number}-of-00002.parquet",
            features("cat", "dog"),
            image=structs,
            label=[1, 0, 1],
        )
    data = Parquet(str(tmp_path))
    assert data.names == ("cat", "dog") and len(data) == 6
    assert data.id(4) == "test-00001-of-00002.parquet:1" and torch.equal(data.image(4), pixels(picture(seed=1)))
    path = table(tmp_path / "data/train-00000-of-00001.parquet", features("cat", "dog"), img=structs, label=[1, 0, 1])
    assert "several splits (test, train)" in refused(lambda: Parquet(str(tmp_path)).names)
    assert len(Parquet(str(tmp_path / "**" / "test-*.parquet"))) == 6
    assert len(Parquet(path)) == 3
    other = table(tmp_path / "other.parquet", features("cat", "cow"), image=structs, label=[1, 0, 1])
    (tmp_path / "data/train-00000-of-00001.parquet").rename(tmp_path / "another.parquet")
    assert "same class names" in refused(lambda: Parquet(str(tmp_path / "*other.parquet")).names), other


@pytest.mark.parametrize("column", [[1, 2], [[1, 2], [3]], [["a cat"], [3.5]][1:] * 2])
def test_captions_that_are_no_strings_are_refused(tmp_path: Path, column: list[Any]) -> None:
    path = table(tmp_path / "n.parquet", image=images(2), captions=column)
    assert "which is no caption; give strings or lists of them" in refused(lambda: Parquet(path).captions(0))


def test_parquet_captions(tmp_path: Path) -> None:
    several = table(tmp_path / "s.parquet", image=images(2), captions=[["a cat", "cat"], ["a dog"]])
    data = Parquet(several)
    assert data.captions(0) == ("a cat", "cat") and data.names == () and data.labels().tolist() == [-1, -1]
    single = table(tmp_path / "o.parquet", image=images(2), caption=["a cat", "a dog"], key=["k", "k"])
    assert Parquet(single).captions(1) == ("a dog",) and Parquet(single).id(1) == "1"


def test_parquet_names_alone(tmp_path: Path) -> None:
    named = Parquet(table(tmp_path / "n.parquet", image=images(3), name=["dog", "cat", "dog"]))
    assert named.names == ("cat", "dog") and named.labels().tolist() == [1, 0, 1]
    labeled = Parquet(
        table(tmp_path / "l.parquet", image=images(3), label=["dog", "cat", "dog"]), classes=("dog", "cat")
    )
    assert labeled.labels().tolist() == [0, 1, 0]
    assert "'cat'" in refused(lambda: Parquet(labeled.path, classes=("dog", "cow")).names)


@pytest.mark.parametrize(
    ("columns", "metadata", "words"),
    [
        ({"label": [0, 1], "name": ["a", "b"]}, None, "no column 'image' (its columns: label, name)"),
        ({"image": ["x.png", "y.png"], "label": [0, 1]}, None, "holds string, not encoded images"),
        ({"image": [1, 2], "label": [0, 1]}, None, "holds int64, not encoded images"),
        ({"image": [b"a", b"b"], "label": [0, 1], "name": ["a", "b"]}, None, "row 0 of"),
        ({"image": [None, b"b"], "label": [0, 1], "name": ["a", "b"]}, None, "row 0 of"),
        ({"image": 2}, None, "neither labels nor captions"),
        ({"image": 2, "label": [0, 1]}, None, "no class names"),
        ({"image": 2, "label": [0, 2], "name": ["a", "b"]}, None, "label 1 of"),
        ({"image": 2, "label": [0, 0], "name": ["a", "b"]}, None, "called both 'a' and 'b'"),
        ({"image": 2, "label": [0, 1], "name": ["a", "b"]}, ("a", "c"), "called both 'c' and 'b'"),
        ({"image": 2, "label": [0, 2]}, ("a", "b"), "outside the class list of 2 names (0 to 1)"),
        ({"image": 2, "label": [0, -1]}, ("a", "b"), "label -1 in row 1"),
        ({"image": 2, "label": [0.5, 1.0]}, ("a", "b"), "0.5 in row 0"),
        ({"image": 2, "label": [0, None]}, ("a", "b"), "None in row 1"),
        ({"image": 2, "name": ["a", None]}, None, "has no class"),
        ({"image": 0, "label": pa.array([], pa.int32())}, ("a", "b"), "no rows"),
    ],
)
def test_parquet_errors(tmp_path: Path, columns: dict[str, Any], metadata: tuple[str, ...] | None, words: str) -> None:
    if isinstance(columns.get("image"), int):
        columns = {**columns, "image": pa.array(images(columns["image"]), pa.binary())}
    path = table(tmp_path / "x.parquet", features(*metadata) if metadata else None, **columns)
    assert words in (message := refused(lambda: Parquet(path).names)), message


def test_parquet_places(tmp_path: Path) -> None:
    assert "there is no file" in refused(lambda: Parquet(str(tmp_path / "x.parquet")).names)
    assert "holds no .parquet" in refused(lambda: Parquet(str(tmp_path)).names)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    assert "not a whole Parquet file" in refused(lambda: Parquet(str(tmp_path / "x.parquet")).names)
    path = table(tmp_path / "y.parquet", image=images(2), label=[0, 1], name=["a", "b"])
    assert "no column 'domain'" in refused(lambda: Parquet(path, domain="photo").names)


def test_parquet_skips_broken(tmp_path: Path) -> None:
    data = [images(1)[0], None, b"?", broken("PNG"), images(3)[2]]
    path = table(tmp_path / "x.parquet", image=data, label=[0, 1, 0, 1, 1], name=list("ababb"))
    assert "row 1 of" in refused(lambda: Parquet(path).image(1))
    whole = Parquet(path, skip_broken=True)
    assert whole.skipped == 3 and [whole.id(index) for index in range(2)] == ["0", "4"]
    assert whole.labels().tolist() == [0, 1] and torch.equal(whole.image(1), pixels(picture(seed=2)))


# --- shards ---


def shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for ending, data in files.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def labeled(seed: int, label: object) -> dict[str, bytes]:
    return {"cls": str(label).encode(), "png": images(seed + 1)[seed]}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "wds_toys"
    shard(root / "test/0.tar", {"s0": labeled(0, 0), "s1": labeled(1, 1)})
    shard(root / "test/1.tar", {"s2": labeled(2, 1), "s3": labeled(3, 0)})
    (root / "test/nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("toy cat\ntoy dog\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    return root


def test_shards(shards: Path) -> None:
    data = Shards(str(shards))
    assert data.names == ("toy cat", "toy dog") and data.templates == ("a photo of a {}.", "{}")
    assert data.labels().tolist() == [0, 1, 1, 0] and [data.id(index) for index in (0, 3)] == ["0/s0", "1/s3"]
    assert all(torch.equal(data.image(seed), pixels(picture(seed=seed))) for seed in range(4))
    (shards / "zeroshot_classification_templates.txt").unlink()
    assert Shards(str(shards)).templates == ("a photo of a {}",)


def test_ten_shards_are_read_in_order(shards: Path) -> None:
    for number in range(2, 11):
        shard(shards / f"test/{number}.tar", {f"s{number}": labeled(0, 0)})
    (shards / "test/nshards.txt").write_text("11")
    assert Shards(str(shards)).id(12) == "10/s10" and Shards(str(shards)).id(4) == "2/s2"


def test_shards_for_retrieval(shards: Path) -> None:
    (shards / "dataset_type.txt").write_text("retrieval")
    for number in range(2):
        shard(
            shards / f"test/{number}.tar",
            {f"s{number}": {"jpg": encoded(picture(seed=number), "JPEG"), "txt": b"one\ntwo\n"}},
        )
    data = Shards(str(shards))
    assert data.captions(1) == ("one", "two") and data.names == () and data.labels().tolist() == [-1, -1]


def test_shard_errors(shards: Path, tmp_path: Path) -> None:
    def said(words: str, split: str = "test") -> None:
        assert words in (message := refused(lambda: Shards(str(shards), split).names)), message

    assert "does not exist" in refused(lambda: Shards(str(tmp_path / "none")).names)
    said("has no split 'train'; there are test", "train")
    (shards / "test/nshards.txt").write_text("3")
    said("should hold 3 shards by its nshards.txt and holds 2: 2.tar is missing")
    (shards / "test/nshards.txt").write_text("1")
    said("should hold 1 shards by its nshards.txt and holds 2")
    (shards / "test/nshards.txt").write_text("many")
    said("not a number of shards")
    (shards / "test/nshards.txt").unlink()
    shard(shards / "test/1.tar", {"s2": labeled(2, 2)})
    said("label 2 of 's2.png'")
    shard(shards / "test/1.tar", {"s2": labeled(2, "x")})
    said("'x', which is not a whole number")
    shard(shards / "test/1.tar", {"s2": {"png": images(1)[0]}})
    said("no label (.cls)")
    shard(shards / "test/1.tar", {"s2": {"cls": b"0"}})
    said("has 0 images")
    shard(shards / "test/1.tar", {"s2": {"cls": b"0", "png": b"?"}})
    message = refused(lambda: Shards(str(shards)).image(2))
    assert "'s2.png' in" in message and "--skip-broken" in message
    assert Shards(str(shards), skip_broken=True).skipped == 1
    (shards / "classnames.txt").unlink()
    said("no classnames.txt")
    data = (shards / "test/0.tar").read_bytes()
    (shards / "test/0.tar").write_bytes(data[:600])
    said("0.tar")
    (shards / "test/0.tar").write_bytes(b"no tar at all")
    said("no whole tar file")
    (shards / "dataset_type.txt").write_text("multilabel")
    said("not supported")


def test_an_empty_class_name_in_the_middle_is_kept(shards: Path) -> None:
    (shards / "classnames.txt").write_text("toy cat\n\ntoy dog\n")
    data = Shards(str(shards))
    assert data.names == ("toy cat", "", "toy dog")
    assert "label 1 is empty" in refused(data.prompts)


# --- published data sets ---


def test_known_is_abstract() -> None:
    with pytest.raises(TypeError):
        Known()  # pyright: ignore[reportAbstractUsage]


def test_known_says_what_to_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CROSSGUARD_DATA", raising=False)
    message = refused(lambda: len(CIFAR10()))
    assert "clip-benchmark/wds_vtab-cifar10" in message and "CROSSGUARD_DATA is not set" in message
    assert "CIFAR10(path='data/wds_vtab-cifar10')" in message
    monkeypatch.setenv("CROSSGUARD_DATA", str(tmp_path))
    assert str(tmp_path) in refused(lambda: len(CIFAR10()))
    assert "publisher" in refused(lambda: len(TinyImageNet()))
    assert "there is no" in refused(lambda: len(CIFAR10(path=str(tmp_path / "none"))))


def test_known_finds_every_layout(shards: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    monkeypatch.setenv("CROSSGUARD_DATA", str(root))
    columns: dict[str, Any] = {"image": images(2), "label": [0, 9]}
    table(root / "cifar10_test.parquet", **columns)
    data = CIFAR10()
    assert len(data) == 2 and data.names[9] == "truck" and data.prompts().flat[0] == "This is a photo of a airplane"
    (root / "vtab").mkdir()
    shards.rename(root / "vtab" / "cifar10")
    assert isinstance(CIFAR10().copy, Shards) and CIFAR10(size=4).image(0).shape == (3, 4, 4)
    assert CIFAR10().templates == ("This is a photo of a {}",) and CIFAR10().id(0) == "0/s0"
    folder.rename(root / "caltech101")
    assert isinstance(Caltech101().copy, Images) and len(Caltech101()) == 7
    assert "without splits" in refused(lambda: len(Caltech101(split="train")))
    table(
        root / "imagenet/data/validation-00000-of-00001.parquet",
        features("cat", "dog"),
        image=images(2),
        label=[0, 1],
    )
    assert ImageNet().names == ("cat", "dog")
    assert "no split 'train'" in refused(lambda: len(ImageNet(split="train")))
    for name in ("AnnualCrop", "SeaLake"):
        (root / "eurosat" / name).mkdir(parents=True)
        picture().save(root / "eurosat" / name / "1.png")
    assert EuroSAT().prompts().flat[1] == "A centered satellite photo of a sea or a lake."
    (root / "stranger").mkdir()
    assert "neither folders" in refused(lambda: len(CIFAR10(path=str(root / "stranger"))))
    for split in ("train", "val"):
        (root / "tiny_imagenet" / split / "cat").mkdir(parents=True)
    assert "no split 'test'" in refused(lambda: len(TinyImageNet(split="test")))


# --- combined ---


def two(tmp_path: Path) -> tuple[Dataset, Dataset]:
    first = table(tmp_path / "a.parquet", image=images(2), label=[0, 1], name=["cat", "dog"])
    large = [encoded(picture(12, 10, seed)) for seed in range(3)]
    second = table(tmp_path / "b.parquet", image=large, label=[0, 1, 2], name=["ant", "cat", "cow"])
    return Parquet(first), Parquet(second, templates=("one {}", "two {}"))


def test_concat(tmp_path: Path) -> None:
    parts = two(tmp_path)
    data = Concat(parts)
    assert data.names == ("cat", "dog", "ant", "cow") and data.labels().tolist() == [0, 1, 2, 0, 3]
    assert data.captions(1) == ("a photo of a dog",) and data.captions(3) == ("one cat", "two cat")
    assert [data.id(index) for index in (0, 2)] == ["0/0", "1/0"] and len(data) == 5
    assert torch.equal(data.image(2), parts[1].image(0)) and torch.equal(data.image(-1), parts[1].image(2))
    assert [batch.images.shape[-2:] for batch in data.batches(8)] == [(8, 8), (10, 12)]
    assert [len(batch) for batch in Concat(parts, size=6).batches(8)] == [5]
    small = Parquet(str(tmp_path / "b.parquet"), size=6)
    assert torch.equal(Concat(parts, size=6).image(3), small.image(1))
    with pytest.raises(IndexError):
        data.image(5)
    assert "nothing to put together" in refused(lambda: len(Concat(())))


def test_concat_keeps_captions(tmp_path: Path) -> None:
    told = Parquet(table(tmp_path / "c.parquet", image=images(1), captions=[["words"]]))
    data = Concat((told, two(tmp_path)[0]))
    assert data.captions(0) == ("words",) and data.captions(1) == ("a photo of a cat",)
    assert data.labels().tolist() == [-1, 0, 1] and data.names == ("cat", "dog")


def test_subset_and_prompted(tmp_path: Path) -> None:
    whole = two(tmp_path)[1]
    part = Subset(whole, 2)
    assert [part.id(index) for index in range(2)] == ["0", "1"] and part.labels().tolist() == [0, 1]
    assert len(Subset(whole, 9)) == 3 and part.templates == whole.templates
    assert Prompted(part, ("my {}",)).prompts().flat == ["my ant", "my cat", "my cow"]
    assert torch.equal(Prompted(part).image(1), whole.image(1))


def test_the_rest_is_what_a_limit_leaves() -> None:
    data = Scenes("color", count=40, size=16)
    asked, rest = Subset(data, 13), Rest(data, 13)
    ids = [{one.id(index) for index in range(len(one))} for one in (asked, rest, data)]
    assert len(rest) == 27 and not ids[0] & ids[1] and ids[0] | ids[1] == ids[2]
    assert [rest.names[label] for label in rest.labels().tolist()] == [
        data.names[data.labels()[place]] for place in map(rest.place, range(27))
    ]
    assert torch.equal(rest.image(5), data.image(rest.place(5)))
    assert {rest.id(index) for index in rest.chosen(9)} <= ids[1]
    for count in (40, 41):
        with pytest.raises(CrossguardError, match=r"40 samples, of which .* leaves none"):
            len(Rest(data, count))


# --- the real thing ---

SHARED = Path(os.environ.get("CROSSGUARD_SHARED") or Path(__file__).parents[2] / "shared" / "data")
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data are not at {SHARED} (set CROSSGUARD_SHARED)")


@real
def test_real_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Parquet(str(SHARED / "cifar10_test.parquet"))
    assert len(data) == 3000 and len(data.names) == 10 and data.names[0] == "airplane"
    assert torch.bincount(data.labels()).tolist() == [300] * 10
    (batch,) = data.batches(64, range(0, 3000, 47))
    assert batch.images.shape == (64, 3, 32, 32) and len(set(batch.ids)) == 64
    monkeypatch.setenv("CROSSGUARD_DATA", str(SHARED))
    assert len(CIFAR10()) == 3000 and CIFAR10().names == data.names and len(Caltech101()) == 2020
    assert len(TinyImageNet().names) == 200 and CIFAR10().copy.opened is data.opened


@real
def test_real_domains() -> None:
    path = str(SHARED / "pacs.parquet")
    parts = [Parquet(path, domain=domain) for domain in ("photo", "art_painting", "cartoon", "sketch")]
    assert sum(map(len, parts)) == 8003 and all(len(part.names) == 7 for part in parts)
    assert all("sketch" in parts[3].id(index) for index in range(20))


@real
def test_real_captions() -> None:
    data = Parquet(str(SHARED / "flickr8k_dev.parquet"))
    assert all(len(data.captions(index)) == 5 for index in range(len(data))) and data.image(0).shape == (
        3,
        96,
        96,
    )


@real
def test_real_bad_input() -> None:
    assert "no column 'image'" in refused(lambda: Parquet(str(SHARED / "roco_captions.parquet")).names)
    assert "classes=(...)" in refused(lambda: Parquet(str(SHARED / "imagenet_sample_224.parquet")).names)
    names = json.loads((SHARED / "prompts.json").read_text())["openai_clip"]["ImageNet"]["classes"]
    data = Parquet(str(SHARED / "imagenet_sample_224.parquet"), classes=tuple(names), size=64)
    assert len(data.names) == 1000 and data.image(0).shape == (3, 64, 64)
    assert DECODED.size <= DECODED.limit
