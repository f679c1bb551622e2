"""Small files that ask for much, names that lead elsewhere, texts that are none: each ends in one sentence, at once."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from crossguard import (
    PGD,
    Captions,
    CrossguardError,
    Experiment,
    Images,
    Kept,
    Linf,
    Parquet,
    Scenes,
    Shards,
    Tiny,
    ZeroShot,
    evaluate,
)
from crossguard.datasets import parquet
from crossguard.datasets.pixels import decode


def picture(size: tuple[int, int] = (6, 6), color: str = "red", form: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, color).save(content, form)
    return content.getvalue()


def claims(width: int, height: int) -> bytes:
    """A PNG whose header says this, with one line of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    line = chunk(b"IDAT", zlib.compress(b"\0" * (1 + 3 * min(width, 10_000))))
    return b"\x89PNG\r\n\x1a\n" + head + line + chunk(b"IEND", b"")


def refused(work: Callable[[], object], *said: str) -> str:
    """What is said where something is refused: one sentence, in a second of the processor."""
    began = time.process_time()
    with pytest.raises(CrossguardError) as caught:
        work()
    assert time.process_time() - began < 2, "a bound must be noticed before the work is done"
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message
    return message


_pools: list[pa.MemoryPool] = []  # a pool must outlive all that was taken from it


@contextmanager
def little_memory(most: int = 30_000_000) -> Iterator[None]:
    """Fails where Arrow has held more at a time."""
    usual = pa.default_memory_pool()
    _pools.append(counted := pa.proxy_memory_pool(usual))
    pa.set_memory_pool(counted)
    try:
        yield
    finally:
        pa.set_memory_pool(usual)
    assert counted.max_memory() < most


# Images


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (2**31 - 1, 1), (12_000, 12_000), (1, 2**28)])
def test_an_image_of_too_many_pixels_is_not_decoded(width: int, height: int) -> None:
    said = refused(lambda: decode(claims(width, height), None, "the image 'x.png'"), "the image 'x.png'")
    assert (f"{width * height:,} pixels" in said and "CROSSGUARD_MOST_PIXELS" in said) or "cannot be read" in said


def test_the_pixels_of_an_image_can_be_raised_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(picture((11, 11)))
    monkeypatch.setenv("CROSSGUARD_MOST_PIXELS", "120")
    refused(lambda: Images(str(tmp_path)).names, "a/x.png", "121 pixels", "at most 120", "CROSSGUARD_MOST_PIXELS")
    monkeypatch.setenv("CROSSGUARD_MOST_PIXELS", "121")
    assert Images(str(tmp_path)).image(1).shape == (3, 11, 11)


def test_the_limit_of_pillow_is_that_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode(picture((6, 6))).shape == (3, 6, 6), "no warning, and no error of Pillow's"
    assert Image.MAX_IMAGE_PIXELS == 10
    refused(lambda: decode(b"no image"), "is no image in a format known here")
    assert Image.MAX_IMAGE_PIXELS == 10


def transparent(mode: str) -> bytes:
    """A picture whose transparency is kept in a channel, or beside its colors."""
    random = np.random.default_rng(0)
    pixels = Image.fromarray(random.integers(0, 256, (9, 5, 4), dtype=np.uint8))
    content = io.BytesIO()
    if mode in ("RGBA", "LA"):
        pixels.convert(mode).save(content, "PNG")
    elif mode == "P":
        pixels.convert("RGB").quantize(8).save(content, "PNG", transparency=bytes(range(0, 256, 32)))
    else:
        pixels.convert("RGB").save(content, "PNG", transparency=pixels.convert("RGB").getpixel((2, 3)))
    return content.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_a_large_image_is_put_on_white_in_parts(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = transparent(mode)
    whole = decode(data)
    with Image.open(io.BytesIO(data)) as opened:
        opaque = opened.convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
    assert torch.equal(whole, torch.from_numpy(np.array(white)).permute(2, 0, 1))
    for pixels in (1, 12, 44):
        monkeypatch.setattr("crossguard.datasets.pixels.BAND", pixels)
        assert torch.equal(decode(data), whole)


def test_what_a_large_image_took_is_handed_back(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, most, handed = 0, 0, 0

    def slow(opened: Image.Image) -> Image.Image:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        time.sleep(0.02)
        at_work -= 1
        opened.load()
        return opened

    def hand_back() -> None:
        nonlocal handed
        handed += 1

    for name, value in {"LARGE": 36, "_upright": slow, "hand_back_memory": hand_back}.items():
        monkeypatch.setattr(f"crossguard.datasets.pixels.{name}", value)
    data = picture((6, 7))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(decode, [data] * 4))
    assert (most, handed) == (1, 4), "large images are decoded one at a time"
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(decode, [picture((6, 6))] * 4))
    assert most > 1 and handed == 4, "others are not"


def test_a_thin_image_is_not_made_wide() -> None:
    refused(lambda: decode(picture((1, 5_000)), 8192), "an image of 1 by 5000 pixels, brought to 8192")
    assert decode(picture((1, 5_000)), 16).shape == (3, 16, 16)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_bytes_of_an_image_have_a_limit(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = picture(form=form)
    monkeypatch.setenv("CROSSGUARD_MOST_IMAGE_BYTES", str(len(data) - 1))
    refused(
        lambda: decode(data, None, "the image"), f"the image has {len(data):,} bytes", "CROSSGUARD_MOST_IMAGE_BYTES"
    )
    monkeypatch.setenv("CROSSGUARD_MOST_IMAGE_BYTES", str(len(data)))
    decode(data)


# Parquet


def table(path: Path, rows: int = 4, **columns: Any) -> str:
    held = {"image": [picture()] * rows, "label": [0, 1] * (rows // 2), "name": ["a", "b"] * (rows // 2)} | columns
    pq.write_table(pa.table(held), path, compression="zstd", store_schema=False)
    return str(path)


def test_a_long_text_is_refused_by_what_the_file_says_of_it(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", name=["a", "b", "a", "x" * 40_000_000])
    assert Path(path).stat().st_size < 10_000
    with little_memory():
        refused(lambda: Parquet(path).names, "'name'", path, "characters", "CROSSGUARD_MOST_CHARACTERS")


def test_one_long_text_among_many_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", 2000, name=["a", "b"] * 999 + ["a", "x" * 200_000])
    refused(lambda: Parquet(path).names, "'name'", "200,000 characters")
    listed = [["ab", "c"]] * 1999 + [["ab", "x" * 200_000]]
    path = table(tmp_path / "y.parquet", 2000, captions=listed)
    refused(lambda: Parquet(path).names, "'captions'", "200,000 characters")


def test_a_text_that_is_stored_once_counts_in_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 10_000), ["a" * 60_000, "b" * 60_000])
    path = table(tmp_path / "x.parquet", 20_000, name=names)
    assert Path(path).stat().st_size < 100_000
    with little_memory():
        refused(lambda: Parquet(path).names, "'name'", "1,200,000,000 bytes", "CROSSGUARD_MOST_TABLE_BYTES")
    path = table(tmp_path / "y.parquet", 100, name=["a" * 60, "b" * 60] * 50)
    monkeypatch.setenv("CROSSGUARD_MOST_TABLE_BYTES", "5999")
    refused(lambda: Parquet(path).names, "6,000 bytes")
    monkeypatch.setenv("CROSSGUARD_MOST_TABLE_BYTES", "6000")
    assert Parquet(path).names == ("a" * 60, "b" * 60)


def test_large_images_in_a_table_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSGUARD_MOST_IMAGE_BYTES", "100000")
    path = table(tmp_path / "x.parquet", image=[picture(), bytes(4_000_000), picture(), picture()])
    refused(lambda: Parquet(path).names, "an image in row group 0 of", "CROSSGUARD_MOST_IMAGE_BYTES")
    path = table(tmp_path / "y.parquet", 100, image=[picture()] * 99 + [bytes(200_000)])
    data = Parquet(path)  # on the average, the images of the group are small
    refused(lambda: data.image(99), "an image in row group 0 of", "200,000 bytes")


def test_an_image_that_is_stored_once_is_unpacked_row_by_row(tmp_path: Path) -> None:
    images = pa.DictionaryArray.from_arrays(pa.array([0] * 200), [picture() + bytes(900_000)])
    path = table(tmp_path / "x.parquet", 200, image=images)
    assert Path(path).stat().st_size < 20_000
    opened = parquet._Table.of(path, (0, 0, ""))
    with little_memory():  # all of them are 180 MB
        assert sum(image is not None for image in opened._images(0)) == 200


def test_rows_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "x.parquet", 6)
    monkeypatch.setenv("CROSSGUARD_MOST_SAMPLES", "5")
    refused(lambda: Parquet(path).names, "6 samples", "CROSSGUARD_MOST_SAMPLES")
    monkeypatch.setenv("CROSSGUARD_MOST_SAMPLES", "6")
    assert len(Parquet(path)) == 6


def test_metadata_of_any_depth_are_no_names(tmp_path: Path) -> None:
    held = pa.table({"image": [picture()] * 2, "label": ["a", "b"]})
    pq.write_table(held.replace_schema_metadata({"huggingface": "[" * 100_000}), tmp_path / "x.parquet")
    assert Parquet(str(tmp_path / "x.parquet")).names == ("a", "b")


# Shards


def packed(root: Path, members: dict[str, bytes], change: Callable[[bytearray], None] | None = None) -> Shards:
    (root / "test").mkdir(parents=True, exist_ok=True)
    (root / "classnames.txt").write_text("a\nb\n")
    with tarfile.open(root / "test" / "0.tar", "w") as opened:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    if change is not None:
        data = bytearray((root / "test" / "0.tar").read_bytes())
        change(data)
        data[148:156] = b"        "
        data[148:156] = b"%06o\0 " % sum(data[:512])
        (root / "test" / "0.tar").write_bytes(data)
    return Shards(str(root))


SAMPLE = {"s0.png": picture(), "s0.cls": b"0", "s1.png": picture(color="blue"), "s1.cls": b"1"}


@pytest.mark.parametrize("told", ["9999999999", "²", "9" * 5000, "-1", "many"])
def test_a_number_of_shards(told: str, tmp_path: Path) -> None:
    data = packed(tmp_path, SAMPLE)
    (tmp_path / "test" / "nshards.txt").write_text(told)
    refused(lambda: data.names, "nshards.txt")


@pytest.mark.parametrize("label", [b"--5", b"9" * 5000, b"1_0", b"+1", b"\xff", b"", b"2", b"-1", "²".encode()])
def test_a_label_in_a_shard(label: bytes, tmp_path: Path) -> None:
    said = refused(lambda: packed(tmp_path, SAMPLE | {"s1.cls": label}).names, "s1.png")
    assert len(said) < 400


@pytest.mark.parametrize("size", [b"\xff" * 10 + b"\xfe\0", b"-0000000001\0", b"00000000_10\0", b"0o000000017\0"])
def test_a_member_of_an_odd_size(size: bytes, tmp_path: Path) -> None:
    def odd(data: bytearray) -> None:
        data[124:136] = size

    refused(lambda: packed(tmp_path, SAMPLE, odd).names, "0.tar")


@pytest.mark.parametrize("record", [b"size=-5", b"size=" + b"9" * 5000, b"size=1_0", "size=²".encode()])
def test_an_extended_header_of_an_odd_size(record: bytes, tmp_path: Path) -> None:
    data = packed(tmp_path, SAMPLE)
    path = tmp_path / "test" / "0.tar"
    length = len(record) + 6
    told = b"%d %s\n" % (length, record)
    told = b"%d %s\n" % (len(told), record)
    info = tarfile.TarInfo("x")
    info.type, info.size = b"x", len(told)
    header = info.tobuf(tarfile.USTAR_FORMAT) + told + bytes(-len(told) % 512)
    path.write_bytes(header + path.read_bytes())
    refused(lambda: data.names, "0.tar")


def test_a_header_that_is_larger_than_any_name(tmp_path: Path) -> None:
    data = packed(tmp_path, SAMPLE)
    info = tarfile.TarInfo("x")
    info.type, info.size = b"L", 2_000_000
    path = tmp_path / "test" / "0.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2_000_384) + path.read_bytes())
    refused(lambda: data.names, "a name in it takes 2,000,000 bytes")


def test_members_of_a_shard_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSGUARD_MOST_SAMPLES", "1")
    refused(lambda: packed(tmp_path, SAMPLE).names, "2 samples")
    monkeypatch.delenv("CROSSGUARD_MOST_SAMPLES")
    monkeypatch.setenv("CROSSGUARD_MOST_IMAGE_BYTES", "20")
    refused(lambda: packed(tmp_path, SAMPLE).names, "the image 's0.png' in", "0.tar", "CROSSGUARD_MOST_IMAGE_BYTES")
    monkeypatch.delenv("CROSSGUARD_MOST_IMAGE_BYTES")
    told = {"s0.png": picture(), "s0.txt": b"a" * 200_000}
    refused(lambda: len(packed(tmp_path, told)), "'s0.png'", "200,000 characters")


# Captions and class lists


def captions(root: Path, told: object, file: str = "c.json") -> Captions:
    (root / "i").mkdir(exist_ok=True)
    (root / "i" / "x.png").write_bytes(picture())
    (root / file).write_text(told if isinstance(told, str) else json.dumps(told))
    return Captions(str(root / "i"), str(root / file))


def test_captions_that_are_no_text_or_too_long(tmp_path: Path) -> None:
    for text in ("a \ud800 red", "a \udcff"):
        refused(
            lambda text=text: len(captions(tmp_path, [{"image": "x.png", "caption": [text]}])), "row[0]", "surrogate"
        )
    refused(lambda: len(captions(tmp_path, [{"image": "\ud800.png", "caption": "a"}])), "row[0]", "surrogate")
    long = "red " * 2_500_000
    refused(lambda: len(captions(tmp_path, [{"image": "x.png", "caption": long}])), "row[0]", "characters")
    refused(lambda: len(captions(tmp_path, f"x.png#0\t{long}\n", "c.txt")), "line 1", "characters")
    assert captions(tmp_path, [{"image": "x.png", "caption": "null \0 naïve 😀"}]).captions(0) == ("null \0 naïve 😀",)


def test_captions_name_images_of_their_folder_only(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture())
    for name in ("../secret.png", "a/../../secret.png", "/../secret.png"):
        refused(lambda name=name: len(captions(tmp_path, [{"image": name, "caption": "a"}])), "names", "no path inside")
    told = {"images": [{"filename": "secret.png", "filepath": "..", "split": "test", "sentences": [{"raw": "a"}]}]}
    refused(lambda: len(captions(tmp_path, told)), "no path inside")
    (tmp_path / "i" / "linked.png").symlink_to(tmp_path / "secret.png")  # whoever owns the folder made the link
    assert len(captions(tmp_path, [{"image": "linked.png", "caption": "a"}])) == 1


def test_class_lists_that_are_no_text(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(picture())
    refused(
        lambda: Images(str(tmp_path), classes=("cat", "d\ud800g")).names, "the class list, at label 1,", "surrogate"
    )
    (tmp_path / "names.txt").write_text("cat\n" + "x" * 100_001)
    refused(
        lambda: Images(str(tmp_path), classes=str(tmp_path / "names.txt")).names, "names.txt', at label 1, has 100,001"
    )


# Kept images


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    for form in ("safetensors", "png"):
        asked = (ZeroShot(Scenes("shape")), Tiny(), PGD(steps=1), Linf(2 / 255))
        evaluate(*asked, limit=2, keep=folder / form, keep_as=form)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"file": 5}, {"file": "x\0"}, {"file": "../secret.png"}, {"file": "secret.png"}, {"file": "/etc/hostname"},
        {"row": "x"}, {"row": 1.5}, {"row": 2**70}, {"label": "x"}, {"label": 2**70}, {"id": 3}, {"id": None},
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["safetensors", "png"])
def test_a_sample_of_kept_images(change: dict[str, Any], form: str, made: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "secret.png").write_bytes(picture((32, 32)))
    for file in (made / form).iterdir():
        (tmp_path / "kept" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "kept" / "secret.png").symlink_to(tmp_path / "secret.png")
    index = json.loads((tmp_path / "kept" / "kept.json").read_text())
    index["samples"][0] |= change
    (tmp_path / "kept" / "kept.json").write_text(json.dumps(index))
    data = Kept(str(tmp_path / "kept"))
    refused(lambda: evaluate(ZeroShot(data), Tiny()), "kept.json")


@pytest.mark.parametrize("form", ["safetensors", "png"])
def test_a_damaged_file_of_kept_images_is_named(form: str, made: Path, tmp_path: Path) -> None:
    for file in (made / form).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 60 if file.suffix != ".json" else None])
    data = Kept(str(tmp_path))
    refused(lambda: data.image(0), data._index["samples"][0]["file"], "with --keep again")


@pytest.mark.parametrize(
    "change",
    [{"names": 5}, {"names": ["a", "\ud800"]}, {"texts": [[3], ["b"]]}, {"clean_texts": 3}, {"samples": {}}],
)
def test_an_index_of_kept_images(change: dict[str, Any], made: Path, tmp_path: Path) -> None:
    index = json.loads((made / "png" / "kept.json").read_text()) | change
    (tmp_path / "kept.json").write_text(json.dumps(index))
    refused(lambda: len(Kept(str(tmp_path))), "kept.json")


# Words that stand for many


def lets(depth: int, times: int) -> str:
    lines = [f'd{n} = "Concat(({", ".join([f"d{n - 1}"] * times)},))"' for n in range(1, depth)]
    head = f'task = "ZeroShot(d{depth - 1})"\nmodel = "Tiny()"\nlimit = 1\n[let]\nd0 = "Scenes(\'shape\', count=2)"\n'
    return head + "\n".join(lines)


@pytest.mark.parametrize(("depth", "times"), [(12, 2), (22, 2), (200, 2), (7, 16)])
def test_a_few_names_do_not_stand_for_a_million_words(depth: int, times: int, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(lets(depth, times))
    refused(lambda: Experiment.load(tmp_path / "a.toml"), "a.toml: let d", "parts once its names are put in")


def test_names_do_not_nest_deeper_than_words(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(lets(15, 1))
    (cell,) = Experiment.load(tmp_path / "a.toml").cells()
    assert cell.question["task"].count("Concat") == 14
    (tmp_path / "a.toml").write_text(lets(500, 1))
    refused(lambda: Experiment.load(tmp_path / "a.toml"), "a.toml: let d", "nested too deeply")


def test_the_longest_of_words_is_no_bound_for_what_is_typed() -> None:
    from crossguard import build, show
    from crossguard.words import LONGEST

    text = "(" + "1," * ((LONGEST - 2) // 2) + ")"
    assert len(build(text)) == (LONGEST - 2) // 2
    classes = tuple(f"species number {n}" for n in range(21_000))
    assert len(show(Images("x", classes=classes))) > 400_000
