"""The shipped models are what their cards say: they know colors, shapes and objects, also unseen ones, and are not
robust, but each is to some degree against what was crafted on another."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from crossguard import PGD, Linf, MaskedLM, Scenes, Substitute, Tiny, TinyCNN, TinyViT, Words, ZeroShot, evaluate
from crossguard.cli import app
from crossguard.models.embedded import WEIGHTS, Shipped
from crossguard.testing import check_model

SHIPPED: tuple[Shipped, ...] = (Tiny(), TinyViT(), TinyCNN())
each = pytest.mark.parametrize("model", SHIPPED, ids=lambda model: type(model).__name__)


@pytest.mark.parametrize(
    ("model", "classes", "split", "bar"),
    [
        (Tiny(), "color", "test", 0.95), (Tiny(), "shape", "test", 0.90),
        (Tiny(), "object", "test", 0.95), (Tiny(), "object", "heldout", 0.85),
        (TinyViT(), "color", "test", 0.95), (TinyViT(), "shape", "test", 0.80),
        (TinyViT(), "object", "test", 0.83), (TinyViT(), "object", "heldout", 0.65),
        (TinyCNN(), "color", "test", 0.95), (TinyCNN(), "shape", "test", 0.90),
        (TinyCNN(), "object", "test", 0.90), (TinyCNN(), "object", "heldout", 0.80),
    ],
)  # fmt: skip
def test_zero_shot_accuracy(model: Shipped, classes: str, split: str, bar: float) -> None:
    assert evaluate(ZeroShot(Scenes(classes, split)), model, limit=240).clean_accuracy >= bar


@pytest.mark.parametrize(
    ("model", "eps"),
    [(Tiny(), 5), (TinyViT(), 5), (TinyCNN(), 8)],
    ids=lambda given: type(given).__name__ if isinstance(given, Shipped) else str(given),
)
def test_pgd_takes_it_apart(model: Shipped, eps: int) -> None:
    report = evaluate(ZeroShot(Scenes("object")), model, PGD(steps=40, step=0.1), Linf(eps / 255), limit=80)
    assert report.clean_accuracy > 0.85
    assert report.robust_accuracy < 0.1


def test_a_word_costs_it_more_than_nothing() -> None:
    report = evaluate(
        ZeroShot(Scenes("object")), Tiny(), Substitute(MaskedLM(), collisions="forbid"), Words(1), limit=256
    )
    assert report.robust_accuracy < report.clean_accuracy - 0.05


@each
def test_it_meets_the_contract(model: Shipped) -> None:
    check_model(model)


def test_they_are_small_and_of_different_architectures() -> None:
    sizes = [sum(file.stat().st_size for file in model.folder().iterdir()) for model in SHIPPED]
    assert SHIPPED[0].folder() == WEIGHTS and max(sizes) < 3_500_000 and sum(sizes[1:]) < 6_000_000
    towers = {model.network.model.config.vision_config.model_type for model in SHIPPED}
    assert towers == {"convnext", "vit", "efficientnet"}
    assert len({model.content() for model in SHIPPED}) == len(SHIPPED)


def test_the_matrix_of_what_was_crafted_on_whom(tmp_path: Path) -> None:
    """The command prints what `evaluate` finds for each ordered pair; who was not crafted on is right more often."""
    task, attack, budget = ZeroShot(Scenes("object")), PGD(steps=5), Linf(3 / 255)
    names = [type(model).__name__ for model in SHIPPED]
    arguments = [part for name in names for part in ("--model", f"{name}={name}()")]
    answer = CliRunner().invoke(
        app, ["transfer", "--task", "ZeroShot(Scenes('object'))", "--attack", "PGD(steps=5)", "--budget", "Linf(3/255)",
              "--limit", "24", "--out", str(tmp_path), *arguments],
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in answer.stdout.splitlines() if "|" in line]
    assert lines[0] == ["crafted on", *names] and [line[0] for line in lines[2:]] == ["nobody", *names]
    rates = {
        (line[0], name): float(cell.split(" %")[0]) / 100
        for line in lines[2:] for name, cell in zip(names, line[1:], strict=True)
    }  # fmt: skip
    found = evaluate(task, SHIPPED[0], attack, budget, surrogate=SHIPPED[1], limit=24)
    assert rates[names[1], names[0]] == pytest.approx(found.robust_accuracy, abs=5e-4)
    assert rates["nobody", names[0]] == pytest.approx(found.clean_accuracy, abs=5e-4)
    for one in names:
        for other in names:
            if one != other:
                assert rates["nobody", other] >= rates[one, other] > rates[other, other] + 0.2
