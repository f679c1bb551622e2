"""What a training measures of itself: the numbers, the best epoch, the record of it, and what a kill leaves of it."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard import Concat, Subset, Unlabelled
from crossguard.attacks.base import TextAttack, TextVictim
from crossguard.attacks.gradient import PGD
from crossguard.budgets import Both, Linf, Words
from crossguard.defenses.finetuning import FTStandard
from crossguard.defenses.optimizers import SGD
from crossguard.defenses.plan import EMA
from crossguard.defenses.run import Run, asked
from crossguard.defenses.validation import Validation
from crossguard.errors import CrossguardError
from crossguard.goals import Untargeted
from crossguard.models.fresh import Fresh
from crossguard.models.huggingface import HuggingFace
from crossguard.processes import ALONE
from crossguard.seeds import keys
from fixtures import Blots, equal, floats, tensors


@dataclass(frozen=True)
class Wrong(TextAttack):
    """Writes a class's prompt as that of the next one."""

    def search(self, victim: TextVictim, clean: list[str], goal: Any, budget: Any, rivals: Any) -> list[str]:
        return [*clean[1:], clean[0]]


@dataclass(frozen=True)
class Captioned(Blots):
    """The same without classes."""

    def labels(self) -> Tensor:
        return torch.full((len(self),), -1)


INNER, BUDGET = PGD(steps=3, step=0.5), Both(Linf(8 / 255), Words(1))
HELD_OUT = Blots(count=40)
LOOK = Validation(HELD_OUT, INNER, BUDGET, Wrong(), batch=16)
RECIPE = FTStandard(epochs=4.0, batch=8, optimizer=SGD(lr=0.2), validate=LOOK)


@pytest.fixture(scope="module")
def whole(base: Fresh, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nobody touched."""
    out = tmp_path_factory.mktemp("whole") / "out"
    RECIPE.fit(base, Blots(), out)
    return out


def history(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "crossguard.json").read_text())["validation"]


def test_the_numbers_are_those_of_the_result(whole: Path) -> None:
    network: Any = HuggingFace(str(whole)).load()
    texts = network.encode_text([f"a photo of a {name}" for name in HELD_OUT.names]).detach()
    images, labels = floats(torch.stack([HELD_OUT.image(index) for index in range(40)])), HELD_OUT.labels()

    def logits(images: torch.Tensor) -> torch.Tensor:
        return network.scale * F.normalize(network.encode_image(images), dim=1) @ F.normalize(texts, dim=1).T

    seeds = keys((HELD_OUT.id(index) for index in range(40)), 0, "validation")
    bad = INNER(logits, images, Untargeted(labels), Linf(8 / 255), seeds)
    with torch.no_grad():
        answers = logits(images).argmax(1)
        expected = {
            "step": 12,
            "clean accuracy": float((answers == labels).float().mean()),
            "robust accuracy": float((logits(bad).argmax(1) == labels).float().mean()),
            "text accuracy": float(((answers + 2) % 3 == labels).float().mean()),  # class c has the prompt of c + 1
        }
    found = history(whole)
    assert [one["step"] for one in found] == [3, 6, 9, 12] and found[-1] == pytest.approx(expected)
    assert found[-1]["robust accuracy"] < found[-1]["clean accuracy"] and len({str(one) for one in found}) > 1


def test_they_are_shown_wherever_one_looks(whole: Path) -> None:
    last = history(whole)[-1]
    card, log = (whole / "README.md").read_text(), (whole / "log.txt").read_text()
    values = [last[name] for name in ("clean accuracy", "robust accuracy", "text accuracy")]
    assert f"| 12 | {' | '.join(f'{value:.1%}' for value in values)} |" in card and "## What it saw" in card
    assert f"validation after step 12/12: clean accuracy {values[0]:.2%}, robust accuracy {values[1]:.2%}" in log
    assert (whole / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_looking_changes_nothing(base: Fresh, whole: Path, tmp_path: Path) -> None:
    replace(RECIPE, validate=None).fit(base, Blots(), tmp_path / "out")
    assert equal(tensors(tmp_path / "out"), tensors(whole)) and not (tmp_path / "out" / "validation.png").exists()


def test_the_best_epoch_is_kept(base: Fresh, whole: Path, tmp_path: Path) -> None:
    robust = [one["robust accuracy"] for one in history(whole)]
    best = robust.index(max(robust))
    assert best < 3, "the mistake would not show"
    replace(RECIPE, best=True).fit(base, Blots(), tmp_path / "best")
    replace(RECIPE, epochs=best + 1.0, validate=None).fit(base, Blots(), tmp_path / "short")
    assert equal(tensors(tmp_path / "best"), tensors(tmp_path / "short"))
    assert history(tmp_path / "best") == history(whole)
    with pytest.raises(CrossguardError, match="give validate=Validation"):
        FTStandard(best=True)


def test_a_kill_loses_nothing_of_it(base: Fresh, tmp_path: Path) -> None:
    recipe = replace(RECIPE, best=True, average=EMA(0.7))
    recipe.fit(base, Blots(), tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    run = Run(recipe, base, Blots(), tmp_path / "killed", asked(recipe, base, Blots()), ALONE)
    for step in range(7):
        run.learner.take(step)
        run._validated(step)
    run.save(7)
    run.feed.close()
    recipe.fit(base, Blots(), tmp_path / "killed")
    assert equal(tensors(tmp_path / "killed"), tensors(tmp_path / "whole"))
    assert history(tmp_path / "killed") == history(tmp_path / "whole")


def test_what_cannot_be_measured_is_said() -> None:
    for wrong, said in (({"limit": 0}, "limit=0"), ({"batch": 0}, "batch=0"), ({"budget": Words(1)}, "pixels")):
        with pytest.raises(CrossguardError, match=said):
            Validation(HELD_OUT, **wrong)  # type: ignore[arg-type]


def test_what_could_not_be_measured_is_said_before_the_first_step(base: Fresh, tmp_path: Path) -> None:
    for data, says in (
        (Unlabelled(HELD_OUT), "nobody may look at them"),
        (Subset(HELD_OUT, 0), "a limit of samples must be a whole number of at least 1, not 0"),
        (Concat((HELD_OUT, Captioned(2))), "2 of the 42 samples of Concat.* label that is none of its 3 classes .*-1"),
    ):
        with pytest.raises(CrossguardError, match=says):
            replace(RECIPE, validate=Validation(data, INNER, BUDGET)).fit(base, Blots(), tmp_path / "out")
        assert not (tmp_path / "out").exists()


PAGE = (Path(__file__).parents[1] / "docs" / "writing_a_recipe.md").read_text()


@pytest.mark.slow
def test_the_page_of_recipes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("\n".join(re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)))
    runpy.run_path("mine.py")
    assert (tmp_path / "runs" / "held" / "validation.png").exists()
