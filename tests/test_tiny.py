"""The shipped model is what its card says: it knows colors, shapes and objects, also unseen ones, and is not robust."""

from __future__ import annotations

import pytest

from crossguard import PGD, Linf, MaskedLM, Scenes, Substitute, Tiny, Words, ZeroShot, evaluate
from crossguard.models.embedded import WEIGHTS
from crossguard.testing import check_model


@pytest.mark.parametrize(
    ("classes", "split", "bar"),
    [("color", "test", 0.95), ("shape", "test", 0.90), ("object", "test", 0.95), ("object", "heldout", 0.85)],
)
def test_zero_shot_accuracy(classes: str, split: str, bar: float) -> None:
    assert evaluate(ZeroShot(Scenes(classes, split)), Tiny(), limit=240).clean_accuracy >= bar


def test_pgd_takes_it_apart() -> None:
    report = evaluate(ZeroShot(Scenes("object")), Tiny(), PGD(steps=40, step=0.1), Linf(5 / 255), limit=80)
    assert report.clean_accuracy > 0.9
    assert report.robust_accuracy < 0.1


def test_a_word_costs_it_more_than_nothing() -> None:
    report = evaluate(
        ZeroShot(Scenes("object")), Tiny(), Substitute(MaskedLM(), collisions="forbid"), Words(1), limit=256
    )
    assert report.robust_accuracy < report.clean_accuracy - 0.05


def test_it_meets_the_contract() -> None:
    check_model(Tiny())


def test_it_is_small() -> None:
    size = sum(file.stat().st_size for file in WEIGHTS.iterdir())
    assert size < 10_000_000
    assert sum(parameter.numel() for parameter in Tiny().network.parameters()) < 6_000_000
