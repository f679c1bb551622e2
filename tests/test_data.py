"""What every dataset does: choosing samples, loading ahead of use, prompts and rivals; words over datasets that forget
nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

import crossguard
from crossguard import CIFAR10, Captions, Concat, Images, Kept, Parquet, Prompted, Rest, Scenes, Shards, Subset, reading
from crossguard.data import Dataset, Prompts, Rivals, all_rivals, in_floats
from crossguard.datasets import kept
from crossguard.datasets.combined import Over
from crossguard.datasets.digits import Digits
from crossguard.datasets.domains import Domains, Unlabelled
from crossguard.datasets.keeping import keeping
from crossguard.datasets.known import Known
from crossguard.errors import CrossguardError
from crossguard.processes import ALONE
from crossguard.shapes import Labels
from crossguard.threads import ahead, workers
from crossguard.words import contents, is_word


@dataclass(frozen=True)
class Listed(Dataset):
    """Images of one pixel, with these ids and labels."""

    ids: tuple[str, ...]
    classes: tuple[int, ...]
    many: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"name {number}" for number in range(self.many or max(self.classes) + 1))

    def id(self, index: int) -> str:
        return self.ids[index]

    def image(self, index: int) -> Tensor:
        return torch.full((3, 1, 1), index % 256, dtype=torch.uint8)

    def labels(self) -> Labels:
        return torch.tensor(self.classes)


def listed(counts: Sequence[int], prefix: str = "") -> Listed:
    """So many samples of each class, sorted by class."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return Listed(tuple(f"{prefix}{number}" for number in range(len(labels))), tuple(labels))


def ordered(data: Listed, order: Sequence[int]) -> Listed:
    return Listed(tuple(data.ids[i] for i in order), tuple(data.classes[i] for i in order))


def names(data: Dataset, limit: int) -> set[str]:
    return {data.id(index) for index in data.chosen(limit)}


# --- choosing


@pytest.mark.parametrize("limit", [10, 57, 100, 400])
def test_a_limit_sees_every_class_whatever_the_order(limit: int) -> None:
    by_class = listed([100] * 10)
    in_turns = ordered(by_class, [100 * label + place for place in range(100) for label in range(10)])
    mixed = ordered(by_class, np.random.default_rng(0).permutation(1000).tolist())
    assert names(by_class, limit) == names(in_turns, limit) == names(mixed, limit)
    for data in (by_class, in_turns, mixed):
        chosen = data.chosen(limit)
        assert chosen == sorted(set(chosen)) and len(chosen) == limit
        counts = data.labels()[chosen].bincount(minlength=10)
        assert counts.min() >= limit // 10 and counts.max() <= -(-limit // 10)
        assert Subset(data, limit).labels().bincount(minlength=10).equal(counts)
        rest = Rest(data, limit)
        left = {data.id(index) for index in range(len(data))} - {data.id(index) for index in chosen}
        assert [rest.id(index) for index in range(len(rest))] == [
            id for id in map(data.id, range(len(data))) if id in left
        ]
        assert rest.labels().bincount(minlength=10).equal(data.labels().bincount(minlength=10) - counts)


def test_every_class_has_its_share_and_a_smaller_limit_chooses_some_of_the_same() -> None:
    sizes = [1000, 300, 61, 7, 1]
    data, before = listed(sizes), set[str]()
    for limit in (1, 5, 50, 137, 1000, 1368):
        counts = data.labels()[data.chosen(limit)].bincount(minlength=5).tolist()
        shares = [limit * size / sum(sizes) for size in sizes]
        assert all(abs(count - share) < 1.01 for count, share in zip(counts, shares, strict=True)), (counts, shares)
        assert before <= names(data, limit)
        before = names(data, limit)
    assert data.chosen(None) == data.chosen(1369) == data.chosen(9999) == list(range(1369))


def test_small_classes_are_neither_favored_nor_left_out() -> None:
    seen = [sum(label == 1 for label in _labels(listed([995, 5], f"{draw}/"), 100)) for draw in range(200)]
    assert set(seen) == {0, 1} and abs(sum(seen) / 200 - 0.5) < 0.12  # its share is half a sample


def _labels(data: Dataset, limit: int) -> list[int]:
    return data.labels()[data.chosen(limit)].tolist()


def test_within_a_class_the_smallest_hashes_are_chosen() -> None:
    data = listed([40, 20])
    chosen = data.chosen(15)
    for label, count in ((0, 10), (1, 5)):
        ids = [data.id(index) for index, own in enumerate(data.classes) if own == label]
        first = sorted(ids, key=lambda one: hashlib.sha256(one.encode()).digest())[:count]
        assert {data.id(index) for index in chosen if data.classes[index] == label} == set(first)


def test_captions_alone_are_chosen_by_hash() -> None:
    data = Scenes("relation", count=50)
    first = sorted(range(50), key=lambda index: hashlib.sha256(data.id(index).encode()).digest())[:8]
    assert data.chosen(8) == sorted(first) and data.missing([0]) == ()


@pytest.mark.parametrize("limit", [0, -3])
def test_an_impossible_limit_is_refused(limit: int) -> None:
    with pytest.raises(CrossguardError, match=f"a limit of samples must be a whole number of at least 1, not {limit}"):
        listed([3, 3]).chosen(limit)


def test_classes_without_a_sample_are_named_in_the_report() -> None:
    data = Scenes("object", "test", count=240)
    assert data.missing(range(240)) == tuple(
        name for label, name in enumerate(data.names) if label not in data.labels().tolist()
    )
    report = crossguard.evaluate(crossguard.ZeroShot(data), crossguard.Tiny(), limit=60)
    missing = 120 - len(set(report.outcomes.label.tolist()))
    assert missing == 60
    assert any(note.startswith("60 of 120 classes have no sample among the 60 that were") for note in report.notes)
    whole = Listed(("a", "b"), (0, 1))
    assert whole.missing([0, 1]) == () and whole.missing([1]) == ("name 0",)


# --- loading


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_change_neither_order_nor_pixels(count: int) -> None:
    data = Scenes("shape", "val", size=16)
    order = [*range(40, 0, -1), 7, 7]
    alone, many = list(data.batches(9, order, workers=0)), list(data.batches(9, order, workers=count))
    assert [batch.ids for batch in alone] == [batch.ids for batch in many]
    assert [len(batch) for batch in many] == [9, 9, 9, 9, 6]
    for one, other in zip(alone, many, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert all(torch.equal(one, data.image(index)) for index, one in zip(order, data.load(order, count), strict=True))
    assert data.load([], count) == [] and list(data.batches(4, [], count)) == []


@dataclass(frozen=True)
class Slow(Listed):
    """Takes its time, notes in a list which images were asked for, and has one that cannot be read."""

    broken: int = -1
    seconds: float = 0.002

    def image(self, index: int) -> Tensor:
        if index == self.broken:
            raise CrossguardError("the image 'x' cannot be read")
        time.sleep(self.seconds)
        _asked.append(index)
        return torch.zeros(3, 1, 1, dtype=torch.uint8)


_asked: list[int] = []


def slow(count: int, **how: Any) -> Slow:
    _asked.clear()
    return Slow(tuple(map(str, range(count))), (0, 1) * (count // 2), **how)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_goes_wrong_is_said_where_its_turn_is(count: int) -> None:
    batches = slow(60, broken=37).batches(4, workers=count)
    for _ in range(8):
        next(batches)
    with pytest.raises(CrossguardError, match="the image 'x' cannot be read"):
        list(batches)
    assert _asked[:36] == list(range(36)) or count


@pytest.mark.parametrize("count", [0, 1, 3])
def test_what_comes_before_a_mistake_is_handed_out_first(count: int) -> None:
    """Also what the same thread made in one go with what went wrong."""
    made = ahead(lambda item: item + 0 // (item - 13), range(50), 40, count)
    assert [next(made) for _ in range(13)] == list(range(13))
    with pytest.raises(ZeroDivisionError):
        next(made)


def test_the_next_batches_are_decoded_while_one_is_used_and_no_more() -> None:
    batches = slow(600).batches(10, workers=2)
    next(batches)
    deadline = time.monotonic() + 5
    while len(_asked) < 20 and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)
    assert 20 <= len(_asked) <= 30
    batches.close()


def test_who_stops_early_waits_for_nothing() -> None:
    batches = slow(600, seconds=0.05).batches(8, workers=2)
    next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 0.05
    time.sleep(0.5)
    asked = len(_asked)
    time.sleep(0.2)
    assert len(_asked) == asked <= 20  # what nobody has begun is not done


def test_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CROSSGUARD_WORKERS", raising=False)
    assert 1 <= workers() <= 4
    monkeypatch.setenv("CROSSGUARD_WORKERS", "3")
    assert workers() == 3
    for wrong in ("many", "-1"):
        monkeypatch.setenv("CROSSGUARD_WORKERS", wrong)
        with pytest.raises(CrossguardError, match="give a number of threads"):
            slow(4).load([0])
    monkeypatch.setenv("CROSSGUARD_WORKERS", "0")
    with pytest.raises(CrossguardError, match="-2 threads are not possible"):
        slow(4).load([0], -2)
    before = threading.active_count()
    slow(20).load(range(20))
    assert threading.active_count() == before


def test_eight_bits_become_floats_exactly() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert torch.equal(in_floats(pixels), torch.from_numpy(pixels.numpy() / np.float32(255)))
    floats = torch.rand(1, 3, 2, 2)
    assert in_floats(floats) is floats


@dataclass(frozen=True)
class Wrong(Listed):
    """Gives whatever images and labels a test wants."""

    given: Callable[[], Tensor] = lambda: torch.zeros(3, 1, 1, dtype=torch.uint8)
    told: Callable[[], Tensor] = lambda: torch.tensor([0, 1])

    def image(self, index: int) -> Tensor:
        return self.given()

    def labels(self) -> Labels:
        return self.told()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            {"given": lambda: torch.zeros(1, 1, 3, dtype=torch.uint8)},
            "is uint8 of shape (1, 1, 3); it must be uint8, or",
        ),
        ({"given": lambda: torch.zeros(3, 1, 1, dtype=torch.float64)}, "'a' of Wrong is float64 of shape (3, 1, 1)"),
        ({"given": lambda: torch.zeros(3, 4)}, "is float32 of shape (3, 4)"),
        ({"told": lambda: torch.tensor([0, 2])}, "the label 2 of the sample 'b' is outside the list of 2 class names"),
        ({"told": lambda: torch.tensor([-2, 0])}, "the label -2 of the sample 'a' is outside"),
        ({"told": lambda: torch.tensor([0.0, 1.0])}, "the labels of Wrong are float32 of shape (2,)"),
        ({"told": lambda: torch.tensor([0])}, "of shape (1,); they must be int64, one for each of its 2 samples"),
    ],
)
def test_data_that_break_their_word_are_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(CrossguardError) as caught:
        next(Wrong(("a", "b"), (0, 1), **wrong).batches(2))
    assert words in str(caught.value)


# --- rivals


def test_rivals_share_what_all_classes_have() -> None:
    prompts = Prompts.of(("red cat", "blue cat", "dog"), ("a {}", "{}!"), {"dog": ("hound",)})
    rivals = prompts.rivals()
    expected = [{"blue", "dog", "hound"}, {"red", "dog", "hound"}, {"red", "blue", "cat"}]
    assert [set(one) for one in rivals] == [words for words in expected for _ in range(2)]
    assert [len(one) for one in rivals] == [3] * 6 and rivals[0] == frozenset(expected[0]) != rivals[2]
    assert "blue" in rivals[0] and "red" not in rivals[0] and "a" not in rivals[0]
    assert rivals[0] | frozenset({"x"}) == expected[0] | {"x"}
    assert all_rivals(rivals) == {"red", "blue", "cat", "dog", "hound"}
    assert all_rivals(rivals[:2]) == expected[0] and all_rivals(rivals[:4]) == expected[0] | expected[1]
    assert all_rivals([frozenset({"a"}), *rivals[:2], frozenset()]) == expected[0] | {"a"} and all_rivals([]) == set()


def test_rivals_of_many_classes_take_no_more_than_their_names() -> None:
    prompts = Prompts.of(tuple(f"color{number} shape{number}" for number in range(20_000)), ("a {}",))
    tracemalloc.start()
    rivals = prompts.rivals()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 40_000_000  # 400 million words otherwise
    assert all(isinstance(one, Rivals) and one.everything is rivals[0].everything for one in rivals)
    assert len(all_rivals(rivals)) == 40_000 and len(rivals[7]) == 39_998


def test_attacks_on_images_have_no_rivals_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prompts, "rivals", None)
    task = crossguard.ZeroShot(Scenes("color", count=4))
    assert task.prepare(crossguard.Tiny(), crossguard.PGD(), crossguard.Linf(0.1), None).prompts is not None
    with pytest.raises(TypeError):
        task.prepare(crossguard.Tiny(), crossguard.Substitute(), crossguard.Words(1), None)


# --- words over datasets


def png(seed: int, size: int = 6) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


def images(root: Path) -> Dataset:
    for number in range(6):
        file = root / "images" / ("a cat", "a dog", "a hen")[number % 3] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"no image" if number == 5 else png(number))
    return Images(str(root / "images"), templates=("seen: {}", "{}"), skip_broken=True)


def parquet(root: Path) -> Dataset:
    columns: dict[str, Any] = {
        "image": [png(n) for n in (0, 1, 2, 3, 4, 4)],
        "label": [0, 1, 2, 1, 0, 0],
        "key": list("uvwxyz"),
    }
    columns["name"] = [("cat", "dog", "hen")[label] for label in columns["label"]]
    columns["captions"] = [[f"number {n}", f"no {n}"] for n in range(6)]
    pq.write_table(pa.table(columns), root / "x.parquet")
    return Parquet(str(root / "x.parquet"), templates=("my {}",))


def shards(root: Path) -> Dataset:
    (root / "shards" / "test").mkdir(parents=True)
    with tarfile.open(root / "shards" / "test" / "0.tar", "w") as tar:
        for number in range(4):
            for ending, data in (("png", png(number)), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"s{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (root / "shards" / "classnames.txt").write_text("cat\ndog\n")
    (root / "shards" / "zeroshot_classification_templates.txt").write_text("a {c} here\n")
    return Shards(str(root / "shards"))


def captions(root: Path) -> Dataset:
    (root / "pictures").mkdir()
    for number in range(4):
        (root / "pictures" / f"{number}.png").write_bytes(png(number))
    listed = [{"image": f"{number}.png", "caption": [f"number {number}", "a thing"]} for number in range(4)]
    (root / "captions.json").write_text(json.dumps(listed))
    return Captions(str(root / "pictures"), str(root / "captions.json"))


def adversarial(root: Path) -> Dataset:
    """Images between the levels of 8 bits, and prompts that no template makes."""
    folder = root / "kept"
    pixels = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before = Prompts.of(("cat", "dog"), ("a photo of a {}",))
    after = before.rewritten(["a photo of a cab", "a photo of a dug"])
    with keeping(folder, {"seed": "0"}, "safetensors", False, ALONE) as kept:
        kept.begin()
        places = kept.add(range(5), pixels)
        kept.finish([{"id": f"s{n}", "label": n % 2} | place for n, place in enumerate(places)], (before, after))
    return Kept(str(folder))


def cifar(root: Path) -> Dataset:
    path = root / "cifar10_test.parquet"
    pq.write_table(pa.table({"image": [png(n, 32) for n in range(4)], "label": [0, 9, 3, 3]}), path)
    return CIFAR10(str(path))


EXAMPLES: dict[type[Dataset], Callable[[Path], Dataset]] = {
    Scenes: lambda _: Scenes("color", "val", count=12, size=16),
    Images: images,
    Parquet: parquet,
    Shards: shards,
    Captions: captions,
    Kept: adversarial,
    CIFAR10: cifar,
    Digits: lambda _: Digits(),
}
VIEWS: dict[type[Dataset], Callable[[Dataset], Dataset]] = {
    Subset: lambda data: Subset(data, 999),
    Rest: lambda data: Rest(data, 0),
    Prompted: lambda data: Prompted(data, data.templates),
    Concat: lambda data: Concat((data,)),
    Domains: lambda data: Domains(data, data),
}

# How each method is called to be compared; a new one must be named here.
CALLS: dict[str, Callable[[Dataset], object]] = {
    "id": lambda data: [data.id(index) for index in range(len(data))],
    "image": lambda data: [data.image(index) for index in range(len(data))],
    "stored": lambda data: [data.stored(index) for index in range(len(data))],
    "captions": lambda data: [data.captions(index) for index in range(len(data))],
    "labels": lambda data: data.labels(),
    "prompts": lambda data: data.names and [told(data.prompts(given)) for given in (None, ("a {}", "b {}"))],
    "chosen": lambda data: data.chosen(2),
    "missing": lambda data: data.missing([0]),
    "load": lambda data: data.load([1, 0]),
    "stream": lambda data: list(data.stream([1, 0], 2)),
    "batches": lambda data: [(batch.ids, batch.images, batch.labels) for batch in data.batches(3)],
}
PUBLIC = [name for name in dir(Dataset) if not name.startswith("_")]


def told(prompts: Prompts) -> object:
    return prompts.names, prompts.texts, dict(prompts.aliases)


def value(data: Dataset, name: str) -> object:
    if isinstance(getattr(Dataset, name), property):
        return getattr(data, name)
    assert name in CALLS, f"say in CALLS how {name} is to be called"
    return CALLS[name](data)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_every_dataset_of_the_vocabulary_has_an_example() -> None:
    words = {getattr(crossguard, name) for name in crossguard.VOCABULARY}
    datasets = {word for word in words if isinstance(word, type) and issubclass(word, Dataset) and is_word(word)}
    known = {word for word in datasets if issubclass(word, Known) and word is not CIFAR10}
    assert datasets - known == EXAMPLES.keys() | VIEWS.keys() | {Unlabelled}


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_a_word_over_a_dataset_forgets_nothing(kind: type[Dataset], view: type[Dataset], tmp_path: Path) -> None:
    data = EXAMPLES[kind](tmp_path)
    seen = VIEWS[view](data)
    if view is Domains and not data.names:
        with pytest.raises(CrossguardError, match="need classes"):
            len(seen)
        return
    assert len(seen) == len(data)
    for name in PUBLIC:
        mine, own = value(seen, name), value(data, name)
        if view is Concat and name in ("id", "chosen", "batches"):  # ids begin with the number of the part
            assert seen.id(1) == f"0/{data.id(1)}"
            mine, own = (value(seen, "stored"), value(data, "stored"))
        if view is Concat and name == "captions" and not data.captions(0):
            own = [tuple(one.replace("{}", data.names[label]) for one in data.templates) for label in data.labels()]
        if view is Prompted and kind is Kept and name == "prompts":  # templates that are asked for come first
            own = [told(data.prompts(given)) for given in (data.templates, ("a {}", "b {}"))]
        assert same(mine, own), name
    assert contents(seen) == contents(data) == (f"{kind.__name__}:{data.fingerprint}" if data.fingerprint else "")


def test_a_part_of_kept_images_keeps_their_pixels_and_prompts(tmp_path: Path) -> None:
    data = adversarial(tmp_path)
    part = Subset(Concat((data,)), 2)
    assert part.prompts().flat == ["a photo of a cab", "a photo of a dug"]
    (batch,) = part.batches(8)
    for row, one in enumerate(batch.ids):
        stored = data.stored(int(one.removeprefix("0/s")))
        assert stored.dtype == torch.float32 and torch.equal(batch.images[row], stored)
        assert not torch.equal((stored * 255).round() / 255, stored)
    both = Concat((data, Scenes("color", count=3, size=16)))
    assert both.prompts().flat[:3] == ["a photo of a cab", "a photo of a dug", "a photo of a red"]
    assert both.prompts(("my {}",)).flat[:2] == ["my cat", "my dog"]
    several = Concat((data, Prompted(data, ("a {}", "b {}")), listed([1, 1])))
    assert several.prompts().flat[:3] == ["a photo of a cab", "a photo of a dug", "a photo of a name 0"]
    with pytest.raises(CrossguardError, match="1 prompts of their own and others 2"):
        Concat((Prompted(Scenes("color", count=3), ("a {}", "b {}")), data)).prompts()


def other(content: bytes) -> bytes:
    """A file of the same size and form that holds something else."""
    for old, new in ((b"cat", b"cow"), (b"here", b"hers"), (b"number", b"numbed")):
        if old in content:
            return content.replace(old, new)
    at = content.rfind(b"IEND")  # the sum that ends the last picture, which Pillow lets pass
    at = at + 4 if at >= 0 else len(content) - 1
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("kind", [Images, Parquet, Shards, Captions, CIFAR10], ids=lambda kind: kind.__name__)
def test_a_new_word_sees_every_file_that_was_replaced(kind: type[Dataset], tmp_path: Path) -> None:
    data = EXAMPLES[kind](tmp_path)
    known = [data.fingerprint]
    assert known[0] and contents(replace(data)) == contents(Concat((data,))) == f"{kind.__name__}:{known[0]}"
    for file in sorted(file for file in tmp_path.rglob("*.*") if file.is_file()):
        noted = file.stat()
        file.write_bytes(file.read_bytes())
        os.utime(file, ns=(noted.st_atime_ns, noted.st_mtime_ns + 1))
        assert replace(data).fingerprint == known[-1], "small files are known by what they hold, whenever written"
        file.write_bytes(other(file.read_bytes()))
        os.utime(file, ns=(noted.st_atime_ns, noted.st_mtime_ns + 1))  # of the same size and date
        told = replace(data).fingerprint
        assert told not in known, file
        known.append(told)
    assert data.fingerprint == known[0]  # a word keeps what it has opened


@pytest.mark.parametrize("kind", [Images, Parquet, Shards, Captions], ids=lambda kind: kind.__name__)
def test_large_files_are_known_by_size_and_date(
    kind: type[Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = EXAMPLES[kind](tmp_path)
    small = data.fingerprint
    monkeypatch.setattr(reading, "BYTES_HASHED", 100)
    known = [replace(data).fingerprint]
    assert known[0] != small
    for file in sorted(file for file in tmp_path.rglob("*.*") if file.suffix not in (".txt", ".json")):
        if file.is_file():
            noted = file.stat()
            os.utime(file, ns=(noted.st_atime_ns, noted.st_mtime_ns + 1))
            told = replace(data).fingerprint
            assert told not in known, file
            known.append(told)


def test_images_of_several_sizes_are_said(tmp_path: Path) -> None:
    data = images(tmp_path)
    (tmp_path / "images" / "a cat" / "0.png").write_bytes(png(0, 9))
    for task, noted in ((data, True), (replace(data, size=8), False)):  # type: ignore[type-var]
        report = crossguard.evaluate(crossguard.ZeroShot(task), crossguard.Tiny())
        assert noted == any(note.startswith("the images have 2 sizes: ") for note in report.notes)


def test_over_is_what_it_is_over() -> None:
    data = listed([4, 4])

    @dataclass(frozen=True)
    class Backwards(Over):
        data: Dataset

        def place(self, index: int) -> int:
            return len(self) - 1 - index

        def labels(self) -> Labels:
            return self.data.labels().flip(0)

    seen = Backwards(data)
    assert [seen.id(index) for index in range(8)] == list("76543210")
    assert [int(image[0, 0, 0]) for image in seen.load(range(8))] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert names(seen, 4) == names(data, 4) and Counter(seen.labels().tolist()) == Counter(data.classes)


def test_kept_images_have_a_fingerprint(tmp_path: Path) -> None:
    data = adversarial(tmp_path)
    first = data.fingerprint
    assert first and Kept(data.path).fingerprint == first and contents(Subset(data, 2)) == f"Kept:{first}"
    index = tmp_path / "kept" / kept.INDEX
    index.write_text(index.read_text().replace("cab", "cow"))
    assert data.fingerprint == first != (second := Kept(data.path).fingerprint)  # a word keeps what it has opened
    assert second
    file = tmp_path / "kept" / "images-000000.safetensors"
    noted = file.stat()
    file.write_bytes(other(file.read_bytes()))
    os.utime(file, ns=(noted.st_atime_ns, noted.st_mtime_ns))
    with pytest.raises(CrossguardError, match="is not the file that was kept there"):
        _ = Kept(data.path).fingerprint
