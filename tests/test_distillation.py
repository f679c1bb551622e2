"""Trainings towards a teacher: their losses and gradients against the formulas of their papers, their stages, and the
contract of every recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard import SCC, BitDepth, Context, Fit, GaussianNoise, Scenes, Smoothed, Tiny
from crossguard.budgets import Both, Words
from crossguard.defenses.distillation import FARE, HPTGPD, PMGAFT
from crossguard.defenses.finetuning import Contrastive, FTStandard, MMCoA, TeCoA
from crossguard.defenses.optimizers import SGD
from crossguard.defenses.parts import Towers
from crossguard.defenses.plan import EMA, Adversary, Augment, Stage
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.terms import Need, Seen, Term
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.models.fresh import Fresh
from crossguard.models.huggingface import HuggingFace
from crossguard.testing import check_recipe
from fixtures import Blots, save_clip, save_tokenizer
from formulas import BUDGET, INNER, check_formula, kl, logits, refused, started


@pytest.fixture(scope="module")
def proxy(base: Fresh) -> Fresh:
    """Another architecture, with embeddings of another length, that reads the same words."""
    return replace(base, widths=(8, 8, 16), depths=(1, 1, 1), dimensions=20, seed=5)


def fare(student: Any, start: Any, proxy: Any, clean: Tensor, bad: Tensor, labels: Tensor) -> Tensor:
    difference = student.encode_image(bad) - start.encode_image(clean).detach()
    return (difference**2).sum(1).mean()


def pmg(student: Any, start: Any, proxy: Any, clean: Tensor, bad: Tensor, labels: Tensor) -> Tensor:
    mine = logits(student, bad)
    near = kl(logits(start, bad).detach(), mine) + 2.0 * kl(logits(student, clean), mine)
    return F.cross_entropy(mine, labels) + near.mean()


def pmg_released(student: Any, start: Any, proxy: Any, clean: Tensor, bad: Tensor, labels: Tensor) -> Tensor:
    mine = logits(student, bad, 1.0)
    near = kl(logits(start, bad, 1.0).detach(), mine) + kl(logits(student, clean, 1.0), mine)
    return F.cross_entropy(mine, labels) + near.sum()


def anchored(student: Any, start: Any, proxy: Any, clean: Tensor, bad: Tensor, labels: Tensor) -> Tensor:
    return kl(logits(student, bad), logits(proxy, clean).detach()).mean()


def anchored_released(student: Any, start: Any, proxy: Any, clean: Tensor, bad: Tensor, labels: Tensor) -> Tensor:
    return kl(logits(start, clean).detach(), logits(student, bad)).sum()


CASES: dict[str, tuple[Callable[[Fresh], Recipe], Callable[..., Tensor]]] = {
    "FARE": (lambda proxy: FARE(), fare),
    "PMG-AFT": (lambda proxy: PMGAFT(clean=2.0), pmg),
    "PMG-AFT released": (lambda proxy: PMGAFT(reduce="sum", unscaled=True), pmg_released),
    "HPT-GPD": (lambda proxy: HPTGPD(proxy=proxy), anchored),
    "HPT-GPD released": (lambda proxy: HPTGPD(proxy=proxy, anchor="start", forward=True, reduce="sum"),
                         anchored_released),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_formula_of_its_paper(base: Fresh, proxy: Fresh, tmp_path: Path, name: str) -> None:
    make, formula = CASES[name]
    check_formula(make(proxy), formula, base, proxy, tmp_path)


def test_the_second_stage_of_hpt_asks_the_proxy_about_the_same_image(base: Fresh, proxy: Fresh, tmp_path: Path) -> None:
    recipe = HPTGPD(proxy=proxy, steps=1, batch=8, warmup=0, image_attack=INNER, budget=BUDGET)
    run = started(recipe, base, tmp_path)
    run.learner.take(0)
    run.learner.begin(1)
    student: Any = run.learner.network
    inputs = run.learner.views(1)
    bad = inputs.images["adversarial"]
    with torch.no_grad():
        found = run.learner.loss(1, inputs)[0]
        expected = kl(logits(student, bad), logits(proxy.load(), bad)).mean()
        other = kl(logits(student, bad), logits(proxy.load(), inputs.images["clean"])).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-4) and abs(float(found - other)) > 1e-5


def test_the_adversary_of_fare_climbs_what_the_student_descends(base: Fresh, tmp_path: Path) -> None:
    recipe = FARE(steps=2, batch=8, image_attack=INNER, budget=BUDGET)
    run = started(recipe, base, tmp_path)
    inputs = run.learner.views(0)
    clean, bad = inputs.images["clean"], inputs.images["adversarial"]
    images = BUDGET.project(clean + BUDGET.sample(inputs.batch.seeds, clean), clean)
    network = base.load()
    with torch.no_grad():
        there = network.encode_image(clean)
    for _ in range(INNER.steps):
        images.requires_grad_(True)
        distance = ((network.encode_image(images) - there) ** 2).sum()
        (gradient,) = torch.autograd.grad(distance, images)
        images = BUDGET.project(images.detach() + 0.5 * BUDGET.eps * gradient.sign(), clean)
    assert (images != bad).float().mean() < 0.01, "but for gradients that are zero up to rounding"


def test_fare_needs_neither_labels_nor_texts(base: Fresh, tmp_path: Path) -> None:
    class Bare(Blots):
        @property
        def names(self) -> tuple[str, ...]:
            return ()

        def labels(self) -> Tensor:
            raise CrossguardError("nobody may look")

        def captions(self, index: int) -> tuple[str, ...]:
            raise CrossguardError("there are none")

    run = started(FARE(steps=1, batch=8, image_attack=INNER), base, tmp_path, Bare())
    assert run.learner.take(0).keys() == {"loss", "learning rate"}
    assert refused(lambda: started(TeCoA(steps=1, batch=8), base, tmp_path, Bare())) == "nobody may look"


def test_a_teacher_is_asked_once_about_a_clean_image(base: Fresh, tmp_path: Path, monkeypatch: Any) -> None:
    """The adversary and the loss share the answer; no step of the attack asks again."""
    run = started(FARE(steps=2, batch=8, image_attack=INNER), base, tmp_path)
    start, asked = run.learner.teachers["start"], list[int]()
    encode = start.encode_image
    monkeypatch.setattr(start, "encode_image", lambda images: (asked.append(len(images)), encode(images))[1])
    run.learner.take(0)
    assert asked == [8]


def test_the_stages_of_hpt_start_where_the_paper_says(base: Fresh, proxy: Fresh, tmp_path: Path) -> None:
    """Two epochs of three steps each stage: the average follows the epochs, stage 2 begins with the model as it was,
    and its second epoch half of the way to the average."""
    recipe = HPTGPD(
        proxy=proxy, epochs=2.0, batch=8, warmup=0, optimizer=SGD(lr=0.5), anchoring=SGD(lr=0.1), budget=BUDGET
    )  # fmt: skip
    learner = started(recipe, base, tmp_path).learner
    assert learner.ends == [6, 12] and [learner.rate(step) for step in (0, 6)] == [0.1, 0.5]

    def weights() -> Tensor:
        return torch.cat([one.detach().flatten() for one in learner.trained.values()])

    def kept(one: dict[str, Tensor] | None) -> Tensor:
        assert one is not None
        return torch.cat([tensor.flatten() for tensor in one.values()])

    vanilla, average = weights(), weights()
    for step in range(6):
        learner.take(step)
        if step in (2, 5):
            average = 0.9 * average + 0.1 * weights()
    assert torch.allclose(kept(learner.handed), average, atol=1e-6)
    assert float((average - weights()).abs().max()) > 1e-4, "the mistake would show"
    learner.begin(1)
    assert torch.equal(weights(), vanilla)
    for step in range(6, 9):
        learner.take(step)
    before, views = weights(), learner.views
    seen: list[Tensor] = []
    learner.views = lambda step: (seen.append(weights()), views(step))[1]  # type: ignore[method-assign]
    learner.take(9)
    assert torch.allclose(seen[0], 0.5 * before + 0.5 * average, atol=1e-6)
    learner.take(10)
    assert torch.allclose(kept(learner.handed), average, atol=1e-6), "what is pulled to stays"
    previous = started(replace(recipe, starts="previous"), base, tmp_path / "x").learner
    for step in range(6):
        previous.take(step)
    previous.begin(1)
    assert torch.allclose(kept(dict(previous.trained)).detach(), average, atol=1e-6)


def test_an_average_is_the_result(base: Fresh, tmp_path: Path) -> None:
    recipe = FTStandard(steps=4, batch=8, optimizer=SGD(lr=0.3), average=EMA(0.5))
    plain = started(replace(recipe, average=None), base, tmp_path / "x").learner
    expected = {name: one.detach().clone() for name, one in plain.trained.items()}
    for step in range(4):
        plain.take(step)
        expected = {name: 0.5 * expected[name] + 0.5 * one.detach() for name, one in plain.trained.items()}
    network: Any = recipe.fit(base, Blots(), tmp_path / "out").load()
    found = dict(network.named_parameters())
    assert all(torch.allclose(found[name.removeprefix("network.")], one, atol=1e-5) for name, one in expected.items())
    assert "EMA(decay=2.0)" in refused(lambda: EMA(2.0)) and "per='day'" in refused(lambda: EMA(per="day"))


def test_a_teacher_that_does_not_read_is_refused(base: Fresh, tmp_path: Path) -> None:
    blind = replace(base, tokenizer=str(_other_words(tmp_path / "words")))
    said = refused(lambda: HPTGPD(proxy=blind, steps=1, batch=8).fit(base, Blots(), tmp_path / "x"))
    assert said.startswith("the teacher 'proxy', Fresh(") and "does not read them" in said


def test_a_defended_teacher_that_answers_by_more_than_embeddings_is_noted(base: Fresh, tmp_path: Path) -> None:
    def notes(proxy: VisionLanguageModel) -> list[str]:
        return started(HPTGPD(proxy=proxy, steps=1, batch=8, warmup=0), base, tmp_path).notes

    assert notes(BitDepth(base, 3)) == notes(GaussianNoise(base)) == []
    (note,) = notes(Smoothed(base, 0.1, 3))
    assert "'proxy', Smoothed(" in note and "answers by more than its embeddings, as by a vote" in note
    said = refused(lambda: notes(SCC(base)))
    assert said.startswith("the teacher 'proxy', SCC(") and "is asked for embeddings without classes: SCC" in said


def test_what_a_teacher_was_taught_by_need_not_know_these_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSGUARD_FITS", str(tmp_path / "fits"))
    shapes, few = Scenes("shape", count=4), {"steps": 1, "batch": 2, "warmup": 0}
    part = Context(tokens=1, specific=True)
    shaped = FTStandard(trains=part, steps=1, batch=2).fit(Tiny(), shapes, tmp_path / "shaped")
    taught = Fit(HPTGPD(proxy=shaped, **few), Tiny(), shapes)
    assert started(HPTGPD(proxy=taught, **few), Tiny(), tmp_path / "x", Scenes("color", count=4)).notes == []


def _other_words(folder: Path) -> Path:
    import json

    save_tokenizer(folder)
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    vocabulary = told["model"]["vocab"]
    told["model"]["vocab"] = {
        word if word.startswith("[") else f"zz{number}": number for word, number in vocabulary.items()
    }
    path.write_text(json.dumps(told))
    return folder


SWITCHES = {"anchor": "mine", "starts": "now", "reduce": "max"}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_say_what_there_is(base: Fresh, name: str) -> None:
    assert f"{name}={SWITCHES[name]!r}" in refused(lambda: HPTGPD(proxy=base, **{name: SWITCHES[name]}))


# --- Patch tokens ---


@dataclass(frozen=True)
class Moved(Term):
    """How far patch tokens have moved from those of the model as it was."""

    def needs(self) -> tuple[Need, ...]:
        return (Need("patches", "adversarial"), Need("patches", "clean", "start"), Need("image", "adversarial"))

    def each(self, seen: Seen) -> Tensor:
        far = (seen.patches("adversarial") - seen.patches("clean", "start")).square().sum((1, 2))
        return far + seen.image("adversarial").square().sum(1)


@dataclass(frozen=True, kw_only=True)
class Patched(Recipe):
    def stages(self) -> tuple[Stage, ...]:
        return (self.stage(Moved(), adversaries=(Adversary(INNER, BUDGET, Moved()),)),)


def test_patch_tokens_come_with_the_embedding_and_may_be_climbed(base: Fresh, tmp_path: Path) -> None:
    clip = HuggingFace(str(save_clip(tmp_path / "clip")))
    run = started(Patched(steps=1, batch=8), base, tmp_path)
    assert "has no patch tokens" in refused(lambda: run.learner.take(0))
    run = started(Patched(steps=1, batch=8, trains=Towers(("image",))), clip, tmp_path)
    inputs, network = run.learner.views(0), clip.load()
    clean, bad = inputs.images["clean"], inputs.images["adversarial"]
    stock: Any = network.stock
    with torch.no_grad():
        embeddings, tokens = network.patches(clean)
        assert torch.allclose(embeddings, network.encode_image(clean), atol=1e-6)
        pixels = network.preprocess(clean)  # type: ignore[operator]
        layers = stock.vision_model(pixel_values=pixels).last_hidden_state
        every = stock.visual_projection(stock.vision_model.post_layernorm(layers))
        assert torch.allclose(every[:, 0], embeddings, atol=1e-6) and torch.allclose(every[:, 1:], tokens, atol=1e-6)
        moved = network.patches(bad)
        expected = ((moved[1] - tokens) ** 2).sum((1, 2)) + (moved[0] ** 2).sum(1)
        assert float(run.learner.loss(0, inputs)[0]) == pytest.approx(float(expected.mean()), rel=1e-4)
        noise = BUDGET.project(clean + BUDGET.sample(inputs.batch.seeds, clean), clean)
        there = network.patches(noise)
        assert bool((((there[1] - tokens) ** 2).sum((1, 2)) + (there[0] ** 2).sum(1) < expected).all())


# --- The contract ---


def recipes(proxy: Fresh) -> dict[str, Recipe]:
    sgd, words = SGD(lr=0.05), Both(BUDGET, Words(1))
    return {
        "Contrastive": Contrastive(optimizer=sgd),
        "FTStandard": FTStandard(optimizer=sgd, augment=Augment(shift=2), average=EMA(0.5)),
        "TeCoA": TeCoA(optimizer=sgd, image_attack=INNER, budget=BUDGET),
        "MMCoA": MMCoA(optimizer=sgd, image_attack=INNER, budget=words),
        "FARE": FARE(image_attack=INNER, budget=BUDGET),
        "PMGAFT": PMGAFT(optimizer=sgd, image_attack=INNER, budget=BUDGET),
        "HPTGPD": HPTGPD(proxy=proxy, image_attack=INNER, budget=BUDGET, trains=Towers(("image",), last=2)),
    }


NAMES = ("Contrastive", "FTStandard", "TeCoA", "MMCoA", "FARE", "PMGAFT", "HPTGPD")


@pytest.mark.parametrize("name", NAMES)
def test_the_contract(base: Fresh, proxy: Fresh, name: str) -> None:
    check_recipe(recipes(proxy)[name], base, Blots(count=8))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_take_the_steps_of_one(base: Fresh, proxy: Fresh, name: str) -> None:
    check_recipe(recipes(proxy)[name], base, Blots(count=8), processes=True)
