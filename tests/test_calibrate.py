"""Thresholds found on clean images, and how often a gate opened."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crossguard import (
    CSR,
    DBD,
    DOC,
    PGD,
    RN,
    SCC,
    TTC,
    BitDepth,
    Blind,
    CrossguardError,
    Gated,
    Linf,
    Retrieval,
    Scenes,
    Tiny,
    ZeroShot,
    words,
)
from crossguard.calibrate import calibrate
from crossguard.cli import main
from crossguard.evaluate import evaluate
from crossguard.models.base import VisionLanguageModel
from crossguard.seeds import drawing, fold, keys
from crossguard.tasks.base import CLEAN
from toys import Dots, Toy

TASK = ZeroShot(Dots(40))


def gates(model: VisionLanguageModel, name: str, count: int = 40) -> Tensor:
    """The values of a gate in an evaluation with seed 0."""
    data = Dots(40)
    rows = data.chosen(count)
    images = torch.stack([data.image(row) / 255 for row in rows])
    with torch.no_grad(), drawing(fold(keys([data.id(row) for row in rows], 0), CLEAN)):
        return model.answer(data.prompts(None)).hard(images).gates[name]


def test_words_may_be_given_as_text():
    text = calibrate("CSR(Tiny())", "Scenes('object')", limit=8)
    assert text == calibrate(CSR(Tiny()), ZeroShot(Scenes("object")), limit=8)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    ("model", "gate"),
    [
        (TTC(Toy()), "tau"),
        (DOC(Toy(), steps=1), "score"),
        (CSR(Toy(), radius=0.3), "cosine"),
        (DBD(Toy()), "agreement"),
        (SCC(Toy()), "warm-up"),
        (SCC(Toy(), semantic=False), "tau"),
        (Gated(RN(Toy())), "drift"),
    ],
)
def test_a_calibrated_gate_opens_for_the_share_that_was_asked_for(model: Any, gate: str, share: float) -> None:
    made = calibrate(model, TASK, share, limit=None, batch=7)
    (found,) = made.thresholds
    assert made.model == replace(model, tau=found.after) and found.before == model.tau
    opened = gates(made.model, gate) > 0
    assert int(opened.sum()) == round(share * 40) == found.opened_after.successes
    assert found.opened_before.successes == int((gates(model, gate) > 0).sum())
    assert len(str(found.after)) < 10, "a short number"
    assert f"(tau={model.tau:.6g}) opens for" in str(found) and f"tau={found.after:.6g} for" in str(found)


def test_of_defenses_around_each_other_each_is_calibrated_around_what_is_inside() -> None:
    model = Gated(TTC(BitDepth(CSR(Toy(), radius=0.3))))
    made = calibrate(model, TASK, 0.25, limit=None)
    assert [one.defense for one in made.thresholds] == ["CSR", "TTC", "Gated"]
    for layer in (made.model, made.model.base, made.model.base.base.base):  # type: ignore[attr-defined]
        name = layer.thresholds[0][0]
        assert int((gates(layer, name) > 0).sum()) == 10, layer
    assert calibrate(made.model, TASK, 0.25, limit=None).model == made.model, "nothing is left to do"


def test_a_gate_may_be_calibrated_in_a_retrieval() -> None:
    made = calibrate(CSR(Tiny()), Retrieval(Scenes(count=12)), 0.5, limit=12)
    assert made.thresholds[0].opened_after.successes == 6


def test_what_cannot_be_calibrated_is_said_in_one_sentence() -> None:
    with pytest.raises(CrossguardError, match=r"BitDepth.* has no gate that could be calibrated.* TTC"):
        calibrate(BitDepth(Toy()), TASK)
    with pytest.raises(CrossguardError, match="has no gate"):
        calibrate(TTC(Toy(), steps=0), TASK)
    with pytest.raises(CrossguardError, match=r"cannot open for 1.5 of the images; give a share from 0 to 1"):
        calibrate(TTC(Toy()), TASK, share=1.5)

    @dataclass(frozen=True)
    class Jumpy(Toy):
        def encode_image(self, images: Tensor) -> Tensor:
            return torch.sin(1e4 * images.flatten(1)[:, :16])

    with pytest.raises(CrossguardError, match=r"TTC would need tau=1.* for 100 % of the clean images: TTC\(tau="):
        calibrate(TTC(Jumpy()), TASK, share=1.0)


def test_the_command_prints_the_word_and_says_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "calibrate",
                "--task",
                "ZeroShot(Scenes(count=20))",
                "--model",
                "CSR(Tiny())",
                "--open",
                "0.25",
                "--limit",
                "20",
            ]
        )
    assert stop.value.code in (0, None)
    said = capsys.readouterr()
    made = words.build(said.out.strip())
    assert isinstance(made, CSR) and made.tau != 0.85
    assert "CSR(tau=0.85) opens for" in said.err and "for 25.0 %" in said.err


# --- Reports ---


def test_a_report_says_how_often_each_gate_opened() -> None:
    model = calibrate(TTC(CSR(Toy(), radius=0.3)), TASK, 0.25, limit=None).model
    report = evaluate(TASK, model, Blind(PGD(steps=2)), Linf(8 / 255), seed=0)
    assert set(report.gates) == {"tau", "cosine"}
    assert {rate.n for rates in report.gates.values() for rate in rates} == {40}
    assert report.gates["tau"][0].successes == 10
    assert evaluate(TASK, RN(Toy())).gates == {}


def test_a_report_of_a_retrieval_says_it_too() -> None:
    task = Retrieval(Scenes(count=12))
    model = calibrate(CSR(Tiny()), task, 0.5, limit=12).model
    for attack, budget in ((Blind(PGD(steps=3)), Linf(16 / 255)), (None, None)):
        report = evaluate(task, model, attack, budget)
        clean, attacked = report.gates["cosine"]
        assert (clean.successes, clean.n) == (6, 12)
        assert (attacked == clean) == (attack is None)
