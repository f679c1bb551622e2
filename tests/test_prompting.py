"""Recipes that learn prompts against their published formulas written out, and MMCoA with every part."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard import (
    APT,
    CAVP,
    FAP,
    AdvPT,
    ClassFrames,
    Combined,
    Context,
    Coupled,
    Deep,
    Frame,
    HuggingFace,
    MMCoA,
    VisualPrompt,
)
from crossguard.attacks.base import ImageVictim
from crossguard.attacks.gradient import PGD
from crossguard.budgets import Both, Linf, Words
from crossguard.defenses.optimizers import SGD
from crossguard.defenses.plan import Augment, Stage
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.run import Run
from crossguard.defenses.step import Learner
from crossguard.defenses.terms import ADVERSARIAL, BATCH, CLASSES, CLEAN, Need, OverClasses
from crossguard.errors import CrossguardError
from crossguard.goals import Goal, Untargeted, nobody
from crossguard.models.base import Checkpoint, DualEncoder
from crossguard.processes import ALONE
from crossguard.seeds import keys
from crossguard.testing import check_recipe
from fixtures import Blots, save_clip
from formulas import PARTS

STRONG = PGD(steps=3, step=0.5, best=False, stop=False)
FEW: dict[str, Any] = {
    "steps": 2, "batch": 8, "image_attack": STRONG, "budget": Linf(16 / 255), "optimizer": SGD(lr=0.01, momentum=0.0),
    "cosine": False,
}  # fmt: skip
RECIPES: dict[str, Recipe] = {
    "AdvPT": AdvPT(**FEW, trains=Context(tokens=4)),
    "APT": APT(**FEW, shots=2, trains=Context(tokens=4)),
    "APT of classes": APT(**FEW, shots=None, trains=Context(tokens=4, specific=True)),
    "APT against the base": APT(**FEW, shots=None, constant=True, trains=Context(tokens=4)),
    "VisualPrompt": VisualPrompt(**FEW, warmup=0, trains=Combined((Frame(6, False, True, 1.0), Deep(3, 1, 1.0)))),
    "FAP": FAP(**FEW, shots=None, trains=Coupled(depth=2)),
    "CAVP": CAVP(**FEW, trains=ClassFrames(4)),
}
PERTURBED = APT(**FEW, shots=None, perturbed=5.0, trains=Context(tokens=4))
EVERY: dict[str, Recipe] = {**RECIPES, "APT perturbed": PERTURBED}
MMCOA = MMCoA(
    steps=2, batch=8, optimizer=SGD(lr=0.01, momentum=0.0), image_attack=STRONG, budget=Both(Linf(16 / 255), Words(1))
)
NAMES = Blots().names
PROMPTS = [f"a photo of a {name}" for name in NAMES]


@dataclass(frozen=True)
class Up(Goal):
    """Climbs any function of what the victim says and of its number in the batch."""

    function: Any

    def loss(self, outputs: Tensor) -> Tensor:
        return self.function(outputs)

    def won(self, outputs: Tensor) -> Tensor:
        return nobody(outputs)

    def at(self, keep: Tensor) -> Up:
        assert bool(torch.ones(len(keep), dtype=torch.bool)[keep].all()), "nobody leaves"
        return self


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return HuggingFace(str(save_clip(tmp_path_factory.mktemp("prompting") / "clip")))


def started(recipe: Recipe, base: Checkpoint, folder: Path) -> Run:
    return Run(recipe, base, Blots(), folder, {"recipe": "", "model": "", "data": ""}, ALONE)


def gradients(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys() and left
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=1e-5, rtol=2e-3)
        assert bool(left[name].any()), name


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def restated(name: str, network: Any, plain: Any, images: Tensor, labels: Tensor) -> Any:
    """The loss of a step as published, and what its adversary climbs for each image: functions of attacked images."""
    texts, rows = network.encode_text(PROMPTS), torch.arange(len(labels))

    def logits(found: Tensor, of: Any = network, strings: Tensor = texts) -> Tensor:
        return of.scale * unit(of.encode_image(found)) @ unit(strings).T

    if name == "AdvPT":

        def loss(bad: Tensor) -> Tensor:
            return F.cross_entropy(network.scale * unit(plain.encode_image(bad)) @ unit(texts).T, labels)

        clean = plain.encode_image(images).softmax(1)
        return loss, plain.encode_image, Up(lambda z: F.kl_div(z.log_softmax(1), clean, reduction="none").sum(1))
    if name == "FAP":

        def divergence(bad: Tensor) -> Tensor:
            return F.kl_div(logits(bad).log_softmax(1), logits(images).softmax(1), reduction="none").sum(1)

        def loss(bad: Tensor) -> Tensor:
            near = (unit(network.encode_image(bad)) * unit(network.encode_image(images))).sum(1)
            return F.cross_entropy(logits(images), labels) + 1.5 * (divergence(bad) * (near + 1)).mean()

        return (
            loss,
            logits,
            Up(lambda y: F.kl_div(y.log_softmax(1), logits(images).softmax(1), reduction="none").sum(1)),
        )
    if name == "CAVP":
        inner, frames = network.inner, network.own()["pixels"] * network.factor
        strings = inner.encode_text(PROMPTS)

        def under(found: Tensor) -> Tensor:
            seen = [logits((inner.fitted(found) + one).clamp(0, 1), inner, strings) for one in frames]
            return torch.stack(seen, 1)  # (images, prompts, classes)

        def entropies(found: Tensor) -> Tensor:
            return F.cross_entropy(under(found)[rows, labels], labels, reduction="none")

        def loss(bad: Tensor) -> Tensor:
            total, known = torch.zeros(()), under(images).softmax(2)
            for j in range(3):
                total = total + entropies(images)[labels == j].mean() + entropies(bad)[labels == j].mean()
                others = [k for k in range(3) if k != j]
                own, rest = known[labels == j], known[labels != j]
                first = torch.stack([own[:, k, k] for k in others]).amax(0) - own[:, j, j]
                second = rest[:, j, j] - torch.stack([rest[:, j, k] for k in others]).amax(0)
                third = torch.stack([own[:, k, j] for k in others]).amax(0) - own[:, j, j]
                total = total + 3 * sum(one.clamp(min=-0.1).mean() for one in (first, second, third))
            return total

        diagonal = lambda found: under(found).log_softmax(2).diagonal(dim1=1, dim2=2)  # noqa: E731
        return loss, diagonal, Up(lambda y: -y[rows, labels])
    victim = (lambda x: logits(x, plain, plain.encode_text(PROMPTS))) if "base" in name else logits
    return lambda bad: F.cross_entropy(logits(bad), labels), victim, Untargeted(labels)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_is_the_published_loss(name: str, base: Checkpoint, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    run = started(recipe, base, tmp_path)
    with torch.no_grad():  # away from where frames are zero, and class frames equal
        for number, one in enumerate(run.learner.trained.values()):
            one.add_(0.05 * torch.randn(one.shape, generator=torch.Generator().manual_seed(number)))
    before: Any = copy.deepcopy(run.learner.network)
    plain = base.load().requires_grad_(False)
    inputs = run.learner.views(0)
    images = inputs.images["clean"]
    labels = inputs.batch.texts[CLASSES].place
    assert labels is not None and inputs.batch.texts[CLASSES].texts == PROMPTS
    values = run.learner.take(0)
    with torch.no_grad():
        _, answer, goal = restated(name, before, plain, images, labels)
        seeds = inputs.batch.seeds
        if name == "AdvPT":  # the noise belongs to the image, whatever the step
            seeds = keys((Blots().id(index) for index in inputs.batch.indices), 0, "once")
        bad = STRONG(ImageVictim(answer), images, goal, Linf(16 / 255), seeds)
    if name == "AdvPT":
        assert "adversarial" not in inputs.images
    else:
        made = inputs.images["adversarial"]
        assert float((made - bad).abs().gt(1e-6).float().mean()) < 0.01  # but where a gradient is zero up to rounding
        bad = made
    loss = restated(name, before, plain, images, labels)[0](bad)
    assert values["loss"] == pytest.approx(float(loss.detach()), abs=1e-4)
    loss.backward()
    close(gradients(run.learner.network), gradients(before))
    trained = set(run.learner.trained)
    state = plain.state_dict()
    for key, tensor in run.learner.network.state_dict().items():
        if f"network.{key}" not in trained:
            assert torch.equal(tensor, state[key.replace("inner.", "")]), key


def test_words_climb_beside_the_images_and_are_put_back(base: Checkpoint, tmp_path: Path) -> None:
    """APT, 'perturbed': of each step's cross-entropy the images take the sign of the gradient, and the words a plain
    step up the gradient of the mean; the student then descends with the words as they were."""
    learner = started(PERTURBED, base, tmp_path).learner
    network: Any = copy.deepcopy(learner.network)
    (words,) = (one for one in network.parameters() if one.requires_grad)
    before = words.detach().clone()
    inputs = learner.views(0)
    clean, labels, budget = inputs.images["clean"], inputs.batch.texts[CLASSES].place, Linf(16 / 255)
    assert labels is not None
    bad = budget.project(clean + budget.sample(inputs.batch.seeds, clean), clean)
    for _ in range(3):
        bad = bad.detach().requires_grad_(True)
        logits = network.scale * unit(network.encode_image(bad)) @ unit(network.encode_text(PROMPTS)).T
        up, way = torch.autograd.grad(F.cross_entropy(logits, labels), (bad, words))
        with torch.no_grad():
            bad = budget.project(bad + 0.5 * budget.eps * up.sign(), clean)
            words += 5.0 * way
    made = inputs.images["adversarial"]
    assert float((made - bad).abs().gt(1e-6).float().mean()) < 0.01  # but where a gradient is zero up to rounding
    plain = started(replace(PERTURBED, perturbed=0.0), base, tmp_path / "plain").learner.views(0)
    assert float((made - plain.images["adversarial"]).abs().gt(1e-6).float().mean()) > 0.03
    (kept,) = learner.trained.values()
    assert torch.equal(kept, before) and kept.requires_grad and not torch.equal(kept, words)
    assert all(one.grad is None for one in learner.network.parameters())


def test_what_cannot_climb_beside_the_images_is_refused() -> None:
    with pytest.raises(CrossguardError, match="constant=True"):
        replace(PERTURBED, constant=True)
    for attack in (PGD(), replace(STRONG, restarts=2), replace(STRONG, best=True)):
        with pytest.raises(CrossguardError, match="all images must take each step together"):
            replace(PERTURBED, image_attack=attack)
    with pytest.raises(CrossguardError, match="ascends=-1"):
        replace(PERTURBED, perturbed=-1.0)


QUICK = ("AdvPT", "FAP", "MMCoA: several")
CONTRACTS = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in [*EVERY, "MMCoA: LoRA", "MMCoA: several"]
]


@pytest.mark.parametrize("name", CONTRACTS)
def test_recipes_keep_the_contract(name: str, base: Checkpoint) -> None:
    recipe = EVERY[name] if name in EVERY else replace(MMCOA, trains=PARTS[name.removeprefix("MMCoA: ")])
    check_recipe(recipe, base, Blots(count=8))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_two_processes_take_the_steps_of_one(name: str, base: Checkpoint) -> None:
    check_recipe(EVERY[name], base, Blots(count=8), processes=True)


def test_a_bank_is_made_once_and_is_the_same_after_a_kill(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, asked = replace(RECIPES["AdvPT"], steps=7), list[int]()
    attacked = Learner._attacked_images

    def counted(self: Learner, one: Any, inputs: Any) -> Tensor:
        asked.append(len(inputs.images["clean"]))
        return attacked(self, one, inputs)

    monkeypatch.setattr(Learner, "_attacked_images", counted)
    need = Need("image", "adversarial", "start")
    run, found = started(recipe, base, tmp_path), dict[int, Tensor]()
    for step in range(6):
        inputs = run.learner.views(step)
        for index, row in zip(inputs.batch.indices, inputs.known[need], strict=True):
            assert torch.equal(found.setdefault(index, row), row)
    assert asked == [8, 8, 8] and len(found) == len(Blots()) == 24
    late = started(recipe, base, tmp_path).learner.views(4)
    assert all(torch.equal(found[index], row) for index, row in zip(late.batch.indices, late.known[need], strict=True))


def test_what_cannot_be_made_once_is_refused_in_a_sentence() -> None:
    with pytest.raises(CrossguardError, match="give augment=None"):
        AdvPT(augment=Augment())
    maker = AdvPT().stages()[0].adversaries[0]
    with pytest.raises(CrossguardError, match="a student is asked about it"):
        Stage(terms=(OverClasses(ADVERSARIAL, CLEAN),), adversaries=(maker,))
    with pytest.raises(CrossguardError, match="which are others in each step"):
        replace(maker, climbs=OverClasses(ADVERSARIAL, CLEAN))


def test_recipes_begin_as_published() -> None:
    assert AdvPT().budget == Linf(8 / 255) and AdvPT().batch == 32 and AdvPT().epochs == 100.0
    assert AdvPT().trains == Context(tokens=32) and AdvPT().stages()[0].adversaries[0].once
    assert APT().trains == Context(tokens=16) and APT().shots == 16 and APT().budget == Linf(4 / 255)
    assert APT().image_attack == PGD(steps=3, step=2.67 / 4, best=False, stop=False)
    assert FAP().trains == Coupled("a photo", None, 9) and FAP().consistency == 1.5 and FAP().batch == 4
    assert isinstance(VisualPrompt().optimizer, SGD) and VisualPrompt().optimizer.lr == 40.0
    with pytest.raises(CrossguardError, match="has no prompt for each class"):
        CAVP(trains=Frame())


# --- MMCoA with every part ---


def written_out(network: DualEncoder, inputs: Any) -> Tensor:
    """MMCoA's loss, where every image has its own copy of its text."""
    own = inputs.batch.texts[BATCH].place.tolist()
    total = torch.zeros(())
    for image, text in (("adversarial", "clean"), ("clean", "adversarial")):
        texts = network.encode_text([inputs.texts[text, BATCH][row] for row in own])
        logits = network.logits(network.encode_image(inputs.images[image]), texts)
        target = torch.arange(len(own))
        total = total + 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    return total


@pytest.mark.parametrize("name", PARTS)
def test_mmcoa_trains_every_part(name: str, base: Checkpoint, tmp_path: Path) -> None:
    recipe = replace(MMCOA, trains=PARTS[name])
    run = started(recipe, base, tmp_path)
    before: Any = copy.deepcopy(run.learner.network)
    inputs = run.learner.views(0)
    values = run.learner.take(0)
    loss = written_out(before, inputs)
    assert values["loss"] == pytest.approx(float(loss.detach()), abs=1e-5) and values["texts changed"] == 1.0
    loss.backward()
    found, expected = gradients(run.learner.network), gradients(before)
    assert found.keys() == expected.keys() == {one.removeprefix("network.") for one in run.learner.trained}
    for key in found:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=2e-3)
    assert any(bool(one.any()) for one in found.values())
    run.learner.take(1)
    after = run.learner.network.state_dict()
    moved = {key for key, tensor in before.state_dict().items() if not torch.equal(tensor, after[key])}
    assert moved and moved <= found.keys()
