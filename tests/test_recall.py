"""Teachers are asked about a clean image once, where that changes no number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crossguard import DANN, FARE, Domains, TeCoA, Towers
from crossguard.attacks.gradient import PGD
from crossguard.budgets import Linf
from crossguard.defenses import recall
from crossguard.defenses.optimizers import SGD
from crossguard.defenses.plan import Augment
from crossguard.defenses.recall import Recall
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.terms import START, Need
from crossguard.models.fresh import Fresh
from crossguard.seeds import drawn, normal
from fixtures import Blots
from formulas import started

INNER = PGD(steps=2, step=0.5, best=False, stop=False)
CLEAN_OF_START = Need("image", "clean", START)
# 24 images in batches of 5: four are left out of the first epoch and are met later.
SETTINGS: dict[str, Any] = {
    "epochs": 3.0, "batch": 5, "warmup": 0, "optimizer": SGD(lr=0.05), "image_attack": INNER, "budget": Linf(8 / 255),
}  # fmt: skip


def trained(recipe: Recipe, base: Fresh, folder: Path) -> tuple[dict[str, Tensor], int]:
    """The weights after a training, and about how many images its teacher was asked."""
    learner, asked = started(recipe, base, folder).learner, list[int]()
    teacher: Any = learner.teachers[START]
    encode: Callable[[Tensor], Tensor] = teacher.encode_image

    def counted(images: Tensor) -> Tensor:
        asked.append(len(images))
        return encode(images)

    teacher.encode_image = counted
    for step in range(learner.total):
        learner.take(step)
    learner.feeds[""].close()
    assert set(asked) == {5}, "a batch of another size is rounded differently"
    return {name: one.detach().clone() for name, one in learner.trained.items()}, sum(asked)


def test_a_teacher_is_asked_once_and_the_weights_are_the_same(
    base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = FARE(**SETTINGS)
    once, few = trained(recipe, base, tmp_path)
    assert few == 20 + 5 + 5, "an epoch, its first batch turned round, and the batch of those that were left out"
    assert trained(replace(recipe, augment=Augment(shift=1)), base, tmp_path)[1] == 60
    assert trained(replace(recipe, epochs=1.0), base, tmp_path)[1] == 20
    monkeypatch.setattr(recall, "ROOM", 24 * 4 * base.dimensions - 1)
    anew, all_ = trained(recipe, base, tmp_path)
    assert all_ == 60 + 5, "there was no room for one of the images, which is known when the first batch has been asked"
    assert once.keys() == anew.keys() and all(torch.equal(once[name], anew[name]) for name in once)


def lengths(base: Fresh, folder: Path, said: Callable[[Tensor], Tensor]) -> list[int]:
    """About how many images somebody who says this is asked in each step of three epochs."""
    run, asked = started(TeCoA(**SETTINGS), base, folder), list[int]()
    kept = Recall(run.feed, 2**20)

    def ask(images: Tensor) -> dict[Need, Tensor]:
        asked[-1] += len(images)
        return {CLEAN_OF_START: said(images)}

    for step in range(12):
        asked.append(0)
        batch = run.feed.batch(step)
        assert len(kept(batch, ask)[CLEAN_OF_START]) == len(batch.images)
    run.feed.close()
    return asked


def means(images: Tensor) -> Tensor:
    return images.mean((2, 3))


def test_what_depends_on_the_batch_or_on_noise_is_asked_anew(base: Fresh, tmp_path: Path) -> None:
    assert lengths(base, tmp_path, means) == [10, 5, 5, 5, 5, 0, 0, 0, 0, 0, 0, 0]
    anew = [10] + 11 * [5]
    assert lengths(base, tmp_path, lambda images: means(images) + torch.arange(len(images))[:, None]) == anew
    assert lengths(base, tmp_path, lambda images: means(images) + normal(drawn(len(images), "own"), (3,))) == anew
    beside = lengths(base, tmp_path, lambda images: means(images) + images.double().sum().float())
    assert beside == anew, "what hangs on the other images, wherever they are"
    shared = lengths(base, tmp_path, lambda images: means(images) + normal(drawn(len(images), "all"), (3,))[:1])
    assert shared == anew, "noise that is the same for all images of a step"


def test_what_is_recalled_is_what_was_said(base: Fresh, tmp_path: Path) -> None:
    run = started(TeCoA(**SETTINGS), base, tmp_path)
    kept = Recall(run.feed, 2**20)
    for step in range(12):
        batch = run.feed.batch(step)
        found = kept(batch, lambda images: {CLEAN_OF_START: means(images)})[CLEAN_OF_START]
        assert torch.equal(found, means(batch.images))
    run.feed.close()
    assert kept.size == 24 * 3 * 4


def test_a_training_reads_no_text_to_learn_a_width_that_nobody_asks_for(
    base: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, read = type(base.load()), list[int]()
    encode: Any = network.encode_text

    def counted(self: Any, texts: Any) -> Tensor:
        read.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(network, "encode_text", counted)
    monkeypatch.setattr("crossguard.defenses.run.Run._doubts", lambda self: [])
    started(TeCoA(steps=1, batch=4, warmup=0), base, tmp_path)
    assert not read
    started(DANN(steps=1, batch=4), base, tmp_path, Domains(Blots(), Blots()))
    assert read == [1]


def test_a_tower_that_no_loss_sees_is_said(base: Fresh, tmp_path: Path) -> None:
    whole = replace(FARE(**SETTINGS), trains=Towers())
    (note,) = started(whole, base, tmp_path).notes
    numbers = sum(one.numel() for one in base.load().towers()["text"].values())
    assert "no loss of FARE sees texts as the trained model embeds them, so its text tower stays as it is" in note
    assert f"names {numbers:,} numbers of it" in note
    assert started(FARE(**SETTINGS), base, tmp_path).notes == []
    assert started(replace(TeCoA(**SETTINGS), trains=Towers()), base, tmp_path).notes == []
