"""A source with labels and a target without: nobody reads the target's labels, and both have the same classes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from crossguard import MNIST, PACS, Concat, Digits, Domains, Images, Prompted, Scenes, Subset, Unlabelled, build, show
from crossguard.data import Dataset
from crossguard.datasets.known import DOMAINS
from crossguard.errors import CrossguardError
from crossguard.shapes import Labels
from crossguard.words import contents
from test_datasets import encoded, picture

SHARED = Path(os.environ.get("CROSSGUARD_SHARED") or Path(__file__).parents[2] / "shared" / "data")
real = pytest.mark.skipif(not SHARED.is_dir(), reason="there is no real data beside the project")
PHOTO, SKETCH = Scenes("shape", "train", count=40), Scenes("shape", "train", style="sketch", count=30)


@dataclass(frozen=True)
class Secret(Dataset):
    """Images whose labels nobody may read, not even in passing."""

    classes: tuple[str, ...] = PHOTO.names
    count: int = 30

    def __len__(self) -> int:
        return self.count

    @property
    def names(self) -> tuple[str, ...]:
        return self.classes

    def id(self, index: int) -> str:
        return f"secret/{index}"

    def image(self, index: int) -> Tensor:
        return SKETCH.image(index)

    def labels(self) -> Labels:
        raise AssertionError("the labels of the target were read")

    def captions(self, index: int) -> tuple[str, ...]:
        raise AssertionError("the captions of the target were read")


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(CrossguardError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_source_answers_and_the_target_has_no_labels() -> None:
    data = Domains(PHOTO, SKETCH)
    assert len(data) == 40 and torch.equal(data.labels(), PHOTO.labels()) and torch.equal(data.image(3), PHOTO.image(3))
    target = data.unlabelled
    assert len(target) == 30 and torch.equal(target.image(3), SKETCH.image(3)) and target.id(3) == SKETCH.id(3)
    assert target.prompts().texts == data.prompts().texts
    assert data.labelled and not target.labelled and target.captions(0) == ()
    assert "style='sketch', count=30) were asked for, and Unlabelled says that nobody may look at them" in refused(
        target.labels
    )


@pytest.mark.parametrize(
    "view",
    [lambda data: data, lambda data: Subset(data, 20), lambda data: Prompted(data), lambda data: Concat((data,))],
)
def test_what_is_done_with_a_target_asks_for_no_label(view: Callable[[Dataset], Dataset]) -> None:
    target = view(Domains(PHOTO, Secret()).unlabelled)
    assert not target.labelled and len(target.load([2, 1])) == 2 and target.names
    assert len(target.chosen(7)) == 7 and set(target.chosen(3)) < set(target.chosen(7))
    assert target.prompts().flat and target.id(0)
    for ask in (target.labels, lambda: next(target.batches(4)), lambda: target.missing([0])):
        assert "nobody may look at them" in refused(ask)


def test_domains_that_do_not_fit_are_said() -> None:
    swapped = (PHOTO.names[1], PHOTO.names[0], *PHOTO.names[2:])
    message = refused(lambda: len(Domains(PHOTO, Secret(swapped))))
    assert f"label 0 is {PHOTO.names[0]!r} in the source and {PHOTO.names[1]!r} in the target" in message
    assert "there are 12 and 11" in refused(lambda: Domains(PHOTO, Secret(PHOTO.names[:11])).labels())
    assert "there are 12 and 10" not in refused(lambda: Domains(PHOTO, Scenes("color")).unlabelled)
    assert "label 0 is 'circle' in the source" in refused(lambda: Domains(PHOTO, Scenes("color")).names)
    assert "need classes" in refused(lambda: len(Domains(Scenes("relation"), Scenes("relation"))))
    assert "has no images to adapt to" in refused(lambda: len(Domains(PHOTO, Secret(count=0))))


def test_both_sides_are_known_by_their_files(tmp_path: Path) -> None:
    for side, seed in (("one", 0), ("two", 2)):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / side / name).mkdir(parents=True)
            picture(seed=seed + number).save(tmp_path / side / name / "0.png")
    source, target = Images(str(tmp_path / "one")), Images(str(tmp_path / "two"))
    held = contents(Domains(source, target))
    assert source.fingerprint in held and target.fingerprint in held
    picture(seed=9).save(tmp_path / "two" / "dog" / "0.png")
    assert contents(Domains(Images(str(tmp_path / "one")), Images(str(tmp_path / "two")))) != held


# --- worlds


def test_digits_are_scikit_learn_s(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    held, data = datasets.load_digits(), Digits("all")
    assert len(data) == 1797 and data.labels().tolist() == held.target.tolist()
    image = data.image(5)
    assert image.shape == (3, 8, 8) and torch.equal(image[0], image[2])
    assert (image[0].double() * 16 / 255 - torch.from_numpy(held.images[5])).abs().max() <= 0.5 * 16 / 255
    assert len(Digits("train")) == 1347 and len(Digits()) == 450 and Digits().id(0) == data.id(1347)
    assert torch.equal(Digits().image(0), data.image(1347)) and Digits(size=28).image(0).shape == (3, 28, 28)
    framed = Digits(size=20, margin=4).image(0)
    assert framed.shape == (3, 28, 28) and torch.equal(framed[:, 4:24, 4:24], Digits(size=20).image(0))
    assert int(framed.sum()) == int(Digits(size=20).image(0).sum())
    assert "give 0 or more pixels" in refused(lambda: Digits(margin=-1))
    assert "choose one of all, train, test" in refused(lambda: Digits("val"))
    assert "from 1 to" in refused(lambda: Digits(size=0))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install crossguard[digits]" in refused(lambda: len(Digits("test")))


def test_pacs_has_its_domains_in_any_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, domain in enumerate(DOMAINS):
        for label, name in enumerate(("dog", "elephant")):
            (tmp_path / "folders" / "pacs" / domain / name).mkdir(parents=True)
            picture(seed=10 * number + label).save(tmp_path / "folders" / "pacs" / domain / name / "0.png")
    rows = [(domain, label) for domain in DOMAINS for label in (0, 1)]
    columns = {
        "image": [encoded(picture(seed=10 * DOMAINS.index(domain) + label)) for domain, label in rows],
        "label": [label for _, label in rows],
        "name": [("dog", "elephant")[label] for _, label in rows],
        "domain": [domain for domain, _ in rows],
    }
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "table" / "pacs.parquet")
    for root in ("folders", "table"):
        monkeypatch.setenv("CROSSGUARD_DATA", str(tmp_path / root))
        assert len(PACS()) == 2 and PACS().names == ("dog", "elephant") and PACS().labels().tolist() == [0, 1]
        assert torch.equal(PACS(domain="cartoon").image(1), PACS(domain="cartoon", path=f"{tmp_path}/{root}").image(1))
        assert not torch.equal(PACS(domain="cartoon").image(1), PACS(domain="sketch").image(1))
        assert len(Domains(PACS(), PACS(domain="sketch")).unlabelled) == 2
    assert "choose one of photo, art_painting, cartoon, sketch" in refused(lambda: PACS(domain="oil"))
    (tmp_path / "flat" / "dog").mkdir(parents=True)
    picture().save(tmp_path / "flat" / "dog" / "0.png")
    assert "does not tell the domains of PACS apart" in refused(lambda: len(PACS(str(tmp_path / "flat"))))


@real
def test_real_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSGUARD_DATA", str(SHARED))
    parts = [PACS(domain=domain) for domain in DOMAINS]
    assert sum(map(len, parts)) == 8003 and all("sketch" in PACS(domain="sketch").id(index) for index in range(20))
    assert all(len(Domains(parts[0], part).unlabelled) == len(part) for part in parts[1:])
    digits = Domains(MNIST(split="train"), Digits("train", size=28))
    assert digits.names[3] == "three" and len(digits) == 3000 and len(digits.unlabelled) == 1347
    figure = int(digits.id(0).split("/")[1])  # MNIST's ids name the digit: train/7/123.png
    assert int(digits.labels()[0]) == figure


def test_words_round_trip() -> None:
    word = Domains(PHOTO, Unlabelled(SKETCH))
    assert build(show(word)) == word
