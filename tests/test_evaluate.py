"""Evaluation: what is asked, what is stored, and that nothing but the question changes the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from crossguard import (
    EOT,
    PGD,
    Both,
    CrossguardError,
    Fresh,
    HuggingFace,
    Joint,
    Linf,
    MaskedLM,
    RayS,
    Restarts,
    Scenes,
    Square,
    Subset,
    Substitute,
    TextFooler,
    Tiny,
    Words,
    Worst,
    ZeroShot,
    build,
    evaluate,
    own,
)
from crossguard.attacks.base import ImageAttack, Made, TextAttack
from crossguard.attacks.candidates import CandidateSource
from crossguard.attacks.joint import Independent
from crossguard.data import Prompts
from crossguard.evaluate import craft_key, question
from crossguard.models.base import VisionLanguageModel, cosine
from crossguard.models.noise import GaussianNoise
from crossguard.models.purification import BitDepth
from crossguard.seeds import derive, normal
from crossguard.shapes import Embeddings, Images, Logits
from crossguard.tasks.base import twins
from crossguard.words import Reads

TASK = ZeroShot(Scenes("color", count=60))


@dataclasses.dataclass(frozen=True)
class Mean(VisionLanguageModel):
    """Embeds an image by its mean color and a text by fixed directions of its words; colors it can name."""

    scale: float = 20.0

    def encode_image(self, images: Images) -> Embeddings:
        return images.mean((2, 3)) @ _matrix()

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        return torch.stack([_word_sum(text) for text in texts])

    def logits(self, images: Embeddings, texts: Embeddings) -> Logits:
        return cosine(images, texts) * self.scale

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


@lru_cache
def _matrix() -> torch.Tensor:
    return normal(torch.tensor([1]), (3, 8))[0]


@lru_cache
def _word_sum(text: str) -> torch.Tensor:
    return torch.stack([normal(torch.tensor([derive(word)]), (8,))[0] for word in text.split()]).sum(0)


@dataclasses.dataclass(frozen=True)
class Still(ImageAttack):
    """Does nothing."""

    def search(self, victim, clean, goal, budget, seeds):
        return Made(clean)


@dataclasses.dataclass(frozen=True)
class Cheat(ImageAttack):
    """Ignores its budget."""

    def search(self, victim, clean, goal, budget, seeds):
        return Made(1.0 - clean)


@dataclasses.dataclass(frozen=True)
class Rewrite(TextAttack):
    """Replaces the last word by a given one."""

    word: str = "thing"

    def search(self, victim, clean, goal, budget, rivals):
        return [" ".join([*text.split(" ")[:-1], self.word]) for text in clean]


def test_a_clean_report_is_the_argmax_of_the_logits() -> None:
    report = evaluate(TASK, Mean())
    batch = next(TASK.batches(60, range(60)))
    logits = Mean().classifier(TASK.data.prompts())(batch.images)
    assert np.array_equal(report.outcomes.clean, logits.argmax(1).numpy())
    assert np.array_equal(report.outcomes.adversarial, report.outcomes.clean)
    assert report.question["attack"] == "None" and report.question["knowledge"] == "no attack"
    assert report.n == 60 and not np.any(report.outcomes.gradients)


@pytest.mark.parametrize(
    "attack",
    [PGD(steps=5), Substitute(), Independent(PGD(steps=5)), Joint(PGD(steps=5))],
    ids=lambda a: type(a).__name__,
)
def test_results_do_not_depend_on_the_batch_size(attack) -> None:
    budget = Both(Linf(8 / 255), Words(1))
    reports = [evaluate(TASK, Mean(), attack, budget, batch=size) for size in (60, 7)]
    for name in ("id", "label", "clean", "adversarial", "gradients", "forwards"):
        assert np.array_equal(*(getattr(report.outcomes, name) for report in reports)), name
    assert np.allclose(*(report.outcomes.adversarial_margin for report in reports), atol=1e-3)
    assert reports[0].question == reports[1].question


def test_an_attack_hurts_and_its_noise_follows_the_seed() -> None:
    clean = evaluate(TASK, Mean())
    reports = [evaluate(TASK, Mean(), PGD(steps=3, stop=False), Linf(2 / 255), seed=seed) for seed in (0, 0, 1)]
    far = evaluate(TASK, Mean(), PGD(steps=10), Linf(64 / 255))
    assert far.adversarial.successes < clean.clean.successes
    margins = [report.outcomes.adversarial_margin for report in reports]
    assert np.mean(margins[0]) < np.mean(clean.outcomes.clean_margin)
    assert np.array_equal(margins[0], margins[1]) and not np.array_equal(margins[0], margins[2])
    assert float(np.max(reports[0].outcomes.size)) <= 2 / 255 + 1e-6
    assert np.all(np.asarray(reports[0].outcomes.gradients) == 3)


def test_doing_nothing_is_seen_and_ignoring_the_budget_is_refused() -> None:
    still = evaluate(TASK, Mean(), Still(), Linf(8 / 255))
    assert not np.any(still.outcomes.size)
    assert still.robust_accuracy == still.clean_accuracy
    with pytest.raises(CrossguardError, match="broke its budget"):
        evaluate(TASK, Mean(), Cheat(), Linf(8 / 255))


def test_text_attacks_rewrite_every_class_once() -> None:
    report = evaluate(TASK, Mean(), Rewrite(), Words(1))
    prompts = TASK.data.prompts()
    rewritten = prompts.rewritten(Rewrite().search(None, prompts.flat, None, Words(1), []))
    batch = next(TASK.batches(60, range(60)))
    assert np.array_equal(report.outcomes.adversarial, Mean().classifier(rewritten)(batch.images).argmax(1).numpy())
    assert np.array_equal(report.outcomes.size, np.ones(60))
    with pytest.raises(CrossguardError, match="broke its budget"):
        evaluate(TASK, Mean(), Rewrite(), Words(0))


def test_prompts_that_name_another_class_are_counted() -> None:
    shapes = ZeroShot(Scenes("shape", count=24))
    report = evaluate(shapes, Mean(), Rewrite("circle"), Words(1))
    assert any("11 of 12 adversarial prompts name another class" in note for note in report.notes)
    forbidden = evaluate(shapes, Mean(), Substitute(collisions="forbid"), Words(1))
    assert not any("name another class" in note for note in forbidden.notes)


def test_joint_is_not_weaker_than_independent() -> None:
    budget = Both(Linf(1 / 255), Words(1))
    attacks = [kind(PGD(steps=5), Substitute(collisions="forbid")) for kind in (Independent, Joint)]
    apart, together = (evaluate(TASK, Mean(), attack, budget).standing for attack in attacks)
    assert not np.any(together & ~apart)


def test_the_surrogate_says_what_the_adversary_knows() -> None:
    base, budget = Mean(), Linf(4 / 255)
    defended = BitDepth(base, bits=3)
    kinds = {
        surrogate: question(TASK, defended, PGD(), budget, surrogate)["knowledge"]
        for surrogate in (None, base, Mean(5.0))
    }
    assert list(kinds.values()) == ["white box, BPDA", "gray box", "transfer"]
    inside = question(TASK, GaussianNoise(defended), PGD(), budget)
    assert inside["knowledge"] == "white box, BPDA", "gradients pass a purifier inside"
    assert question(TASK, base, PGD(), budget)["knowledge"] == "white box"
    white = evaluate(TASK, base, PGD(steps=5), budget)
    gray = evaluate(TASK, defended, PGD(steps=5), budget, surrogate=base)
    assert np.all(np.asarray(gray.outcomes.gradients) == 5), "crafting elsewhere must not stop at the other's boundary"
    assert int(np.min(white.outcomes.gradients)) < 5


def test_the_question_holds_what_matters_and_nothing_else() -> None:
    both = Both(Linf(8 / 255), Words(1))
    assert question(TASK, Mean(), PGD(), both) == question(TASK, Mean(), PGD(), Linf(8 / 255))
    assert (
        question(TASK, Mean(), PGD(), both)["attack"]
        == "PGD(steps=10, step=0.25, momentum=0.0, random_start=True, restarts=1, best=True, stop=True, loss=None, "
        "nonnegative_start=False)"
    )
    assert question(TASK, Mean(), PGD(), both, seed=1) != question(TASK, Mean(), PGD(), both)
    for name in ("task", "attack", "budget"):
        text = question(TASK, Mean(), Joint(), both)[name]
        assert build(text) is not None


def test_a_limit_draws_evenly() -> None:
    report = evaluate(TASK, Mean(), limit=20)
    assert report.n == 20
    assert report.outcomes.id == tuple(TASK.id(index) for index in TASK.chosen(20))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attack": PGD()}, "needs a budget"),
        ({"attack": PGD(), "budget": Words(1)}, "allows no change of pixels"),
        ({"attack": Substitute(), "budget": Linf(0.1)}, "allows no change of texts"),
        ({"limit": 0}, "at least 1, not 0"),
        ({"batch": 0}, "at least 1, not 0"),
    ],
)
def test_bad_questions(arguments, message: str) -> None:
    with pytest.raises(CrossguardError, match=message):
        evaluate(TASK, Mean(), **arguments)


@dataclasses.dataclass(frozen=True)
class Broken(Mean):
    def encode_image(self, images: Images) -> Embeddings:
        return super().encode_image(images) * float("nan")


def test_a_model_that_answers_nan_is_refused() -> None:
    with pytest.raises(CrossguardError, match="not finite"):
        evaluate(TASK, Broken())


def test_prompts_are_checked() -> None:
    with pytest.raises(CrossguardError, match="the class list is empty"):
        Prompts.of((), ("a {}",))
    with pytest.raises(CrossguardError, match="one class only"):
        Prompts.of(("cat",), ("a {}",))
    with pytest.raises(CrossguardError, match="label 1 is empty"):
        Prompts.of(("cat", " "), ("a {}",))
    with pytest.raises(CrossguardError, match="exactly once"):
        Prompts.of(("cat", "dog"), ("a photo",))
    twice = Prompts.of(("cat", "Cat", "dog"), ("a {}", "the {}"))
    assert twice.duplicates == ("cat",)
    assert twice.flat == ["a cat", "the cat", "a Cat", "the Cat", "a dog", "the dog"]
    assert twice.rewritten(twice.flat) == twice


def test_rivals_are_the_words_of_other_classes() -> None:
    prompts = Prompts.of(("red circle", "blue circle"), ("a {}",), {"red": ("crimson",), "blue": ("azure",)})
    red, blue = prompts.rivals()
    assert red == {"blue", "azure"} and blue == {"red", "crimson"}


def test_ensembles_average_unit_embeddings_over_templates() -> None:
    model, prompts = Mean(), Prompts.of(("red", "blue"), ("a {}", "one {} thing"))
    unit = torch.nn.functional.normalize(model.encode_text(prompts.flat), dim=1)
    expected = torch.stack([unit[:2].mean(0), unit[2:].mean(0)])
    assert torch.allclose(model.class_embeddings(prompts), expected, atol=1e-6)


def test_candidate_sources_are_words() -> None:
    assert isinstance(build("MaskedLM('embedded')"), CandidateSource)


def test_other_weights_in_the_same_folder_are_another_question(tmp_path: Path) -> None:
    for seed in (0, 1):
        Fresh(seed=seed, widths=(8,), depths=(1,), text_width=32, text_layers=1).load().save(tmp_path / str(seed))
    word = HuggingFace(str(tmp_path / "0"))
    first = question(TASK, BitDepth(word), None, None)
    assert len(first["weights"]) == len("HuggingFace:") + 12
    assert question(TASK, Mean(), None, None)["weights"] == f"Mean.code:{own.code(Mean)}", "it has none, but code"
    (tmp_path / "1" / "model.safetensors").replace(tmp_path / "0" / "model.safetensors")
    assert question(TASK, BitDepth(word), None, None)["weights"] != first["weights"]
    both = question(TASK, Mean(), PGD(), Linf(0.1), word)
    assert craft_key(both) == craft_key(question(TASK, BitDepth(Mean()), PGD(), Linf(0.1), word))
    assert "HuggingFace" not in both["weights"] and both["surrogate weights"] != first["weights"]


@dataclasses.dataclass(frozen=True)
class Lists(TextAttack, Reads):
    """An attack that reads files."""

    held: ClassVar[str] = ""
    fingerprint = property(lambda self: self.held)

    def search(self, victim, clean, goal, budget, rivals):
        return clean


@dataclasses.dataclass(frozen=True)
class Files(Scenes, Reads):
    """Data that reads files."""

    held: ClassVar[str] = ""
    fingerprint = property(lambda self: self.held)


def test_what_the_files_behind_attack_and_data_hold_is_part_of_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> dict[str, str]:
        return question(ZeroShot(Subset(Files("color"), 9)), Mean(), Independent(PGD(), Lists()), both, Mean(2.0))

    both = Both(Linf(8 / 255), Words(1))
    code = {kind: f"{kind.__name__}.code:{own.code(kind)}" for kind in (Lists, Files)}
    assert (asked()["attack files"], asked()["data"]) == (code[Lists], code[Files])
    for kind, name in ((Lists, "attack files"), (Files, "data")):
        monkeypatch.setattr(kind, "held", "0123")
        first = asked()
        monkeypatch.setattr(kind, "held", "4567")
        assert {part for part in asked() if asked()[part] != first[part]} == {name}
        assert first[name] == f"{kind.__name__}:0123 {code[kind]}"
        assert craft_key(first) != craft_key(asked()), "what was crafted with other files is not shared"


@dataclasses.dataclass(frozen=True)
class Deaf(Mean):
    """Reads no colors but two."""

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        known = {"red", "blue"}
        return super().encode_text([" ".join(w for w in text.split() if w in known) or "?" for text in texts])


def test_what_a_model_cannot_tell_apart_and_chance_are_said() -> None:
    notes = evaluate(TASK, Deaf()).notes
    assert any(note.startswith("7 of 10 different prompts have the embedding of another class") for note in notes)
    assert any("('a photo of a yellow object' and 'a photo of a lime object')" in note for note in notes)
    assert any("cannot be told from chance, which is 10 % for 10 classes" in note for note in notes)
    assert not evaluate(TASK, Tiny()).notes


def test_equal_rows_are_found_wherever_they_are() -> None:
    rows = normal(torch.tensor([5]), (40, 6))[0]
    rows[7], rows[31], rows[12] = 3.0 * rows[2], rows[2], rows[11] + 1e-9
    assert twins(rows) == [(2, 7), (2, 31), (11, 12)]
    assert twins(rows[:1]) == []


def test_a_random_model_is_always_noted_and_an_attack_that_averages_is_not_blamed() -> None:
    few = ZeroShot(Scenes("color", count=10))
    model = GaussianNoise(Tiny(), 0.01)
    notes = {
        attack: " ".join(evaluate(few, model, attack, None if attack is None else Linf(1 / 255)).notes)
        for attack in (None, PGD(steps=1), EOT(PGD(steps=1), 2))
    }
    assert all("each answer is one draw" in said for said in notes.values())
    assert ["does not average" in said for said in notes.values()] == [False, True, False]


def test_a_budget_that_allows_any_image_is_noted() -> None:
    few = ZeroShot(Scenes("color", count=10))
    said = [" ".join(evaluate(few, Tiny(), PGD(steps=1), Linf(eps)).notes) for eps in (1.0, 8 / 255)]
    assert ["eps is in pixels of [0, 1]" in one for one in said] == [True, False]


def test_who_sees_no_gradient_is_a_black_box() -> None:
    def known(attack, surrogate=None):
        return question(TASK, Mean(), attack, Linf(0.1), surrogate)["knowledge"]

    assert known(Square()) == known(Restarts(Square())) == known(Square(), Mean()) == "black box, scores"
    assert known(RayS()) == "black box, decisions" and known(Worst((RayS(), Square()))) == "black box, scores"
    assert known(Worst((PGD(), Square()))) == "white box" and known(Square(), Mean(2.0)) == "transfer"


def test_advice_names_the_attack_that_ran() -> None:
    shapes = ZeroShot(Scenes("shape", count=24))
    reports = {
        name: " ".join(evaluate(shapes, Tiny(), TextFooler(MaskedLM(), collisions=name), Words(1)).notes)
        for name in ("report", "forbid")
    }
    assert "forbid them with TextFooler(collisions='forbid')" in reports["report"]
    assert "Substitute" not in reports["report"] + reports["forbid"] and "forbid them" not in reports["forbid"]
    kept = evaluate(shapes, Tiny(), TextFooler(MaskedLM()), Words(1)).texts
    assert kept is not None and kept.prompts == 12 and kept.names == shapes.data.names
    assert kept.clean != kept.adversarial
