"""Domain adaptation against restated formulas: value and gradient of every loss, and no label of the target is read."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.attacks.gradient import PGD
from crossguard.budgets import Linf
from crossguard.data import Dataset
from crossguard.datasets.domains import Domains
from crossguard.defenses.adaptation import (
    ARTUDA,
    DANN,
    Confident,
    DisentangledDistillation,
    Matched,
    PseudoLabelled,
    SelfTraining,
    SourceFinetuning,
    reversed_gradient,
)
from crossguard.defenses.finetuning import TeCoA
from crossguard.defenses.optimizers import SGD
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.run import Run
from crossguard.defenses.terms import IMAGE, KL, START, TEXT, InBatch, Need, OverClasses, Seen
from crossguard.errors import CrossguardError
from crossguard.goals import Untargeted
from crossguard.models.fresh import Fresh
from crossguard.models.huggingface import HuggingFace
from crossguard.processes import ALONE
from crossguard.shapes import Labels
from crossguard.testing import check_recipe
from fixtures import Blots

ATTACK = PGD(steps=2, step=0.5, best=False, stop=False)
BUDGET = Linf(16 / 255)


@dataclass(frozen=True)
class Secret(Blots):
    """The target: other images, whose labels and captions nobody may read."""

    def id(self, index: int) -> str:
        return f"secret/{index}"

    def image(self, index: int) -> Tensor:
        return 255 - super().image(index)

    def labels(self) -> Labels:
        raise AssertionError("a label of the target was read")

    def captions(self, index: int) -> tuple[str, ...]:
        raise AssertionError("a caption of the target was read")


DATA = Domains(Blots(), Secret())
EIGHT = Domains(Blots(count=8), Secret(count=8))
COMMON: dict[str, Any] = {"steps": 2, "batch": 8, "optimizer": SGD(lr=0.1)}
ATTACKED: dict[str, Any] = COMMON | {"image_attack": ATTACK, "budget": BUDGET}
RECIPES: tuple[Recipe, ...] = (
    SourceFinetuning(**COMMON),
    SelfTraining(**COMMON, threshold=0.43),
    DANN(**COMMON, hidden=8),
    DANN(**ATTACKED, hidden=8, strength=0.5),
    ARTUDA(**ATTACKED, hidden=8, consistency=2.0),
    DisentangledDistillation(**ATTACKED),
    DisentangledDistillation(**ATTACKED, batch_confidence=True, unit=True, weight=0.7),
)


def refused(attempt: Callable[[], object]) -> str:
    with pytest.raises(CrossguardError) as raised:
        attempt()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def started(recipe: Recipe, base: Fresh, folder: Path, data: Dataset = DATA) -> Run:
    """A run that has not taken a step."""
    return Run(recipe, base, data, folder, {"recipe": "", "model": "", "data": ""}, ALONE)


def restated(recipe: Recipe, run: Run, student: Any, teacher: Any, domain: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The published loss of a step by hand, with one network call for each view, and the views that were made."""
    inputs = run.learner.views(0)
    views = inputs.images
    clean, texts = views["clean"], inputs.batch.texts["classes"].texts
    read = student.encode_text(texts).detach()
    ask = lambda images: student.logits(student.encode_image(images), read)  # noqa: E731
    if isinstance(recipe, SelfTraining):
        told = teacher.logits(teacher.encode_image(clean), read).softmax(1)
        sure, labels = told.max(1)
        kept = sure >= recipe.threshold
        assert 0 < int(kept.sum()) < len(kept)
        return (F.cross_entropy(ask(clean), labels, reduction="none") * kept).sum() / len(kept), views
    if isinstance(recipe, DisentangledDistillation):
        answer = teacher.logits(teacher.encode_image(clean), read).detach()
        spread = answer.softmax(1)
        entropy = -(spread * spread.log()).sum(1)
        sure = 1 - entropy / math.log(3)
        factor = sure.sum() if recipe.batch_confidence else sure
        soft = (answer / recipe.temperature).softmax(1)
        parts = []
        for images in (views["adversarial"], clean):
            mine = (ask(images) / recipe.temperature).softmax(1)
            parts.append(((soft * (soft.log() - mine.log())).sum(1) * factor).mean())
        mine, theirs = student.encode_image(clean), teacher.encode_image(clean).detach()
        if recipe.unit:
            mine, theirs = mine / mine.norm(dim=1, keepdim=True), theirs / theirs.norm(dim=1, keepdim=True)
        return recipe.weight * sum(parts) + F.mse_loss(mine, theirs), views
    labels = inputs.batch.texts["classes"].place
    if isinstance(recipe, SourceFinetuning):
        return F.cross_entropy(ask(clean), labels), views

    def told_apart(source: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy of the discriminator over both, each half of the batch."""
        embeddings = [reversed_gradient(student.encode_image(images), recipe.strength) for images in (source, target)]
        logits = [domain(F.normalize(one, dim=1) * math.sqrt(12))[:, 0] for one in embeddings]
        truth = torch.tensor([0.0] * len(source) + [1.0] * len(target))
        return F.binary_cross_entropy_with_logits(torch.cat(logits), truth)

    target = views["target:clean"]
    if isinstance(recipe, DANN):
        source = clean if recipe.image_attack is None else views["adversarial"]
        return F.cross_entropy(ask(source), labels) + told_apart(source, target), views
    assert isinstance(recipe, ARTUDA)
    bad = views["target:adversarial"]
    first, second = ask(target).softmax(1), ask(bad).softmax(1)
    divergence = (first * (first.log() - second.log())).sum(1).mean()
    loss = F.cross_entropy(ask(clean), labels) + recipe.consistency * divergence
    return loss + told_apart(clean, bad) + told_apart(clean, target), views


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_a_step_is_the_published_loss(recipe: Recipe, base: Fresh, tmp_path: Path) -> None:
    run = started(recipe, base, tmp_path)
    learner = run.learner
    student, teacher, modules = (copy.deepcopy(one) for one in (learner.network, learner.network, learner.modules))
    with torch.no_grad():  # a student that is no longer its teacher, in place of the many steps until then
        generator = torch.Generator().manual_seed(0)
        for one, other in zip(learner.network.parameters(), student.parameters(), strict=True):
            if one.requires_grad:
                one += 0.1 * torch.randn(one.shape, generator=generator)
                other.copy_(one)
    domain = modules["domain"].layers if "domain" in modules else None
    loss, _ = restated(recipe, run, student, teacher.requires_grad_(False), domain)
    values = learner.take(0)
    assert values["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    loss.backward()
    for mine, other in ((learner.network, student), (learner.modules, modules)):
        for (name, found), (_, expected) in zip(mine.named_parameters(), other.named_parameters(), strict=True):
            assert (found.grad is None) == (expected.grad is None), name
            if found.grad is not None and expected.grad is not None:
                torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5)
    trained = {name for name, one in learner.network.named_parameters() if one.grad is not None}
    assert trained and all(name in learner.trained or f"network.{name}" in learner.trained for name in trained)


def test_the_target_is_attacked_by_its_pseudo_labels(base: Fresh, tmp_path: Path) -> None:
    run = started(RECIPES[5], base, tmp_path)
    network: Any = copy.deepcopy(run.learner.network)
    inputs = run.learner.views(0)
    read = network.encode_text(inputs.batch.texts["classes"].texts).detach()
    ask = lambda images: network.logits(network.encode_image(images), read)  # noqa: E731
    clean = inputs.batch.images
    expected = ATTACK(ask, clean, Untargeted(ask(clean).argmax(1)), BUDGET, inputs.batch.seeds)
    assert torch.equal(inputs.images["adversarial"], expected)
    assert not torch.equal(expected, clean)


def test_the_divergence_of_artuda_is_climbed(base: Fresh, tmp_path: Path) -> None:
    run = started(RECIPES[4], base, tmp_path)
    network: Any = run.learner.network
    inputs = run.learner.views(0)
    read = network.encode_text(inputs.batch.texts["classes"].texts).detach()

    def divergence(images: Tensor) -> float:
        clean, other = (
            network.logits(network.encode_image(one), read).log_softmax(1).detach()
            for one in (inputs.images["target:clean"], images)
        )
        return float((clean.exp() * (clean - other)).sum(1).mean())

    made = inputs.images["target:adversarial"]
    noise = (inputs.images["target:clean"] + (torch.rand(made.shape) * 2 - 1) * 16 / 255).clamp(0, 1)
    assert float((made - inputs.images["target:clean"]).abs().max()) <= 16 / 255 + 1e-6
    assert divergence(made) > 2 * divergence(noise)


def test_the_reversed_gradient() -> None:
    embeddings = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    turned = reversed_gradient(embeddings, 0.5)
    torch.testing.assert_close(turned, embeddings)
    (gradient,) = torch.autograd.grad((turned * torch.arange(4)).sum(), embeddings)
    torch.testing.assert_close(gradient, -0.5 * torch.arange(4.0).expand(3, 4))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_training_reads_no_label_of_the_target_and_moves_the_image_tower_alone(
    recipe: Recipe, base: Fresh, tmp_path: Path
) -> None:
    model = recipe.fit(base, DATA, tmp_path / "out")
    assert isinstance(model, HuggingFace)
    before, after = base.load(), model.load()
    for tower, named in before.towers().items():
        same = all(torch.equal(one, after.towers()[tower][name]) for name, one in named.items())
        assert same == (tower != "image"), tower
    assert not [name for name in after.state_dict() if "domain" in name]  # the discriminator is thrown away


def test_a_teacher_of_ones_own_is_the_one_that_is_copied(base: Fresh, tmp_path: Path) -> None:
    other = replace(base, seed=5)
    recipe = DisentangledDistillation(**ATTACKED, teacher=other)
    run = started(recipe, base, tmp_path)
    loss, _ = restated(recipe, run, copy.deepcopy(run.learner.network), _with_texts(other, run), None)
    assert run.learner.take(0)["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


def _with_texts(model: Fresh, run: Run) -> Any:
    """A teacher who reads class prompts by its own text tower, whatever embeddings it is handed."""
    network: Any = model.load()
    texts = network.encode_text([one[0] for one in DATA.prompts().texts]).detach()
    logits = network.logits
    network.logits = lambda images, _: logits(images, texts)
    return network


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_the_contract(recipe: Recipe, base: Fresh) -> None:
    check_recipe(recipe, base, EIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: type(recipe).__name__)
def test_two_processes_take_the_steps_of_one(recipe: Recipe, base: Fresh) -> None:
    check_recipe(recipe, base, EIGHT, processes=True)


def test_a_weight_hands_on_what_it_weights() -> None:
    for term in (OverClasses(), InBatch(), KL("clean"), Matched()):
        weighted = Confident(term)
        assert (weighted.labelled, weighted.coupled) == (term.labelled, term.coupled)
        assert weighted.compares == term.compares
    assert Confident(KL("clean"), whole=True).coupled
    strict = Confident(PseudoLabelled(threshold=0.7))
    assert strict.sieve() and not Confident(PseudoLabelled()).sieve() and not Confident(KL("clean")).sieve()


def test_the_source_and_the_target_are_shuffled_apart(base: Fresh, tmp_path: Path) -> None:
    feeds = started(DANN(**COMMON), base, tmp_path, Domains(Blots(), Blots(size=8))).feeds
    source, target = (feeds[name].chosen(0) + feeds[name].chosen(1) + feeds[name].chosen(2) for name in ("", "target"))
    assert sorted(source) == sorted(target) == list(range(24)) and sum(map(int.__eq__, source, target)) < 6


def test_of_one_class_everybody_is_certain() -> None:
    generator = torch.Generator().manual_seed(0)
    needs = (Need(IMAGE), Need(TEXT), Need(IMAGE, who=START), Need(TEXT, who=START))
    for classes in (1, 3):
        found = {need: torch.randn(classes if need.tower == TEXT else 5, 4, generator=generator) for need in needs}
        seen = Seen(found, dict.fromkeys(("student", START), lambda images, texts: images @ texts.T))
        plain = Matched()
        weights = Confident(plain).each(seen) / plain.each(seen)
        answer = (found[needs[2]] @ found[needs[3]].T).softmax(1)
        expected = 1 + (answer * answer.log()).sum(1) / math.log(3) if classes == 3 else torch.ones(5)
        torch.testing.assert_close(weights, expected)


def test_a_threshold_that_leaves_no_image_is_said_before_the_first_step(base: Fresh, tmp_path: Path) -> None:
    recipe = SelfTraining(**COMMON, threshold=1.0)
    message = refused(lambda: recipe.fit(base, DATA, tmp_path / "none"))
    assert "SelfTraining would learn nothing" in message and "none of the images" in message
    assert "lower the threshold" in message and not (tmp_path / "none").exists()
    answers = base.load()
    texts = answers.encode_text([one[0] for one in DATA.prompts().texts])
    pixels = torch.stack([DATA.unlabelled.image(index) for index in range(len(DATA.unlabelled))]) / 255
    with torch.no_grad():
        sure = answers.logits(answers.encode_image(pixels), texts).softmax(1).amax(1).sort(descending=True).values
    one = replace(recipe, threshold=float(sure[:2].mean()), epochs=1.0, steps=None, batch=len(sure))
    one.fit(base, DATA, tmp_path / "one")
    assert f"images counted {1 / len(sure):.4g}" in (tmp_path / "one" / "log.txt").read_text()
    values = started(replace(recipe, threshold=0.0), base, tmp_path / "all").learner.take(0)
    assert "images counted" not in values


def test_who_needs_labels_says_who_does_not(base: Fresh, tmp_path: Path) -> None:
    recipe = TeCoA(**ATTACKED, warmup=0)
    message = refused(lambda: recipe.fit(base, DATA.unlabelled, tmp_path / "out"))
    assert "TeCoA learns from labels" in message and "such as FARE, SelfTraining or" in message
    recipe.fit(base, DATA, tmp_path / "out")  # the source has labels


def test_bad_input(base: Fresh, tmp_path: Path) -> None:
    for recipe in (DANN(**COMMON), ARTUDA(**COMMON)):
        message = refused(lambda recipe=recipe: recipe.fit(base, Blots(), tmp_path / "one"))
        assert "is one set of images; give Domains(source, target)" in message
    message = refused(lambda: SelfTraining(**COMMON, shots=1).fit(base, DATA, tmp_path / "shots"))
    assert "nobody can ask for the labels" in message and "leave shots out" in message
    assert not (tmp_path / "one" / "crossguard.json").exists()
    assert "no probability" in refused(lambda: PseudoLabelled(threshold=1.5))
    assert "no probability" in refused(lambda: SelfTraining(threshold=-0.1).stages())
    assert "positive number" in refused(lambda: DisentangledDistillation(temperature=0.0))
    assert "1 or more units" in refused(lambda: DANN(hidden=0))
    assert "give 0 or more" in refused(lambda: ARTUDA(strength=-1.0))
