"""Image attacks against closed forms: what a linear victim allows is known exactly, so is what an attack must reach."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

import crossguard
from crossguard import L1, L2, PGD, AutoAttack, CrossguardError, Drift, Linf, Margin, Targeted, Untargeted, Worst
from crossguard.attacks.base import ImageAttack, ImageVictim, Made, PairVictim, Queries
from crossguard.attacks.joint import Independent, Joint
from crossguard.budgets import Both, PixelBudget, Words
from crossguard.goals import Goal, Mismatch, Towards, margin
from crossguard.seeds import by_position, derive, drawn, keys, normal, uniform
from crossguard.testing import LinearVictim, check_attack
from crossguard.words import is_word, names
from toys import middle

STRONG = PGD(steps=40, step=0.1)


def image_attacks() -> list[ImageAttack]:
    """Every image attack that the vocabulary offers, with its defaults: a new one is tested the day it is exported."""
    kinds = [getattr(crossguard, name) for name in names()]
    kinds = [kind for kind in kinds if is_word(kind) and issubclass(kind, ImageAttack)]
    kinds.remove(crossguard.AtGate)  # needs a defense with a gate; test_wrappers.py has one
    return [quick(kind()) for kind in kinds]


def quick(attack: ImageAttack) -> ImageAttack:
    """The same attack, or the attacks that it stands for, with as few steps as the contract allows."""
    if isinstance(attack, AutoAttack):
        return Worst(tuple(quick(part) for part in attack.parts(Linf(8 / 255)) if PixelBudget in part.norms))
    few = {"steps": 12, "queries": 100, "samples": 2, "searches": 3, "count": 2, "targets": 2}
    changes = {}
    for field in dataclasses.fields(attack):
        value = getattr(attack, field.name)
        if field.name in few:
            changes[field.name] = min(value, few[field.name])
        elif isinstance(value, ImageAttack):
            changes[field.name] = quick(value)
    return dataclasses.replace(attack, **changes)


# The contract


@pytest.mark.parametrize("attack", image_attacks(), ids=str)
def test_contract(attack: ImageAttack) -> None:
    check_attack(attack)


@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=1, step=1.0, random_start=False),
        PGD(random_start=False),
        PGD(momentum=1.0),
        PGD(restarts=3),
        PGD(best=False, stop=False),
        PGD(stop=False),
        PGD(loss=Margin()),
    ],
    ids=str,
)
def test_contract_of_the_settings_of_pgd(attack: PGD) -> None:
    check_attack(attack)


@dataclasses.dataclass(frozen=True)
class Lazy(ImageAttack):
    def search(self, victim, clean, goal, budget, seeds):
        victim(clean)
        return Made(clean)


@dataclasses.dataclass(frozen=True)
class Greedy(ImageAttack):
    def search(self, victim, clean, goal, budget, seeds):
        gradient, _, _ = victim.ascend(clean, goal)
        return Made((clean + 2 * budget.eps * budget.ascent(gradient)).clamp(0, 1))


@dataclasses.dataclass(frozen=True)
class Averaging(ImageAttack):
    """Its noise belongs to the batch, not to the sample."""

    def search(self, victim, clean, goal, budget, seeds):
        noise = torch.rand(clean.shape, generator=torch.Generator().manual_seed(len(clean)))
        gradient, _, _ = victim.ascend(clean, goal)
        return Made(budget.project(clean + budget.eps * (budget.ascent(gradient) + 0.1 * noise), clean))


@pytest.mark.parametrize(
    ("attack", "broken"),
    [(Lazy(), "did not lower"), (Greedy(), "broke its budget"), (Averaging(), "its batch")],
    ids=str,
)
def test_the_contract_catches(attack: ImageAttack, broken: str) -> None:
    with pytest.raises((AssertionError, CrossguardError), match=broken):
        check_attack(attack)


WRONG = torch.tensor([0, 1, 0])
RIGHT = torch.tensor([0, 1, 0, 1, 0])


def uneven() -> Towards:
    """Labels for all and targets for some, past the checks of shapes that only tests have."""
    goal = Towards(RIGHT, 1 - RIGHT)
    object.__setattr__(goal, "targets", WRONG)
    return goal


@pytest.mark.parametrize("attack", image_attacks(), ids=str)
def test_a_wrong_number_of_labels_is_one_sentence(attack: ImageAttack) -> None:
    budget = next(one for one in (Linf(0.1), L2(0.5), L1(2.0)) if isinstance(one, attack.norms))
    for labels in (WRONG, torch.zeros(9, dtype=torch.int64)):
        said = f"^Untargeted has {len(labels)} entries for 5 images; give it one for each$"
        with pytest.raises(CrossguardError, match=said):
            attack(LinearVictim(2), middle(5), Untargeted(labels), budget)


@pytest.mark.parametrize(
    "goal",
    [
        Targeted(WRONG),
        Towards(WRONG, WRONG),
        uneven(),
        Drift(torch.ones(3, 2)),
        Mismatch.of(torch.eye(2)[RIGHT], RIGHT, torch.eye(2)).at(WRONG),
        Untargeted(WRONG).lasting(),
        Drift(torch.ones(3, 2)).lasting().lasting(),
    ],
    ids=lambda goal: type(goal).__name__,
)
def test_every_goal_says_how_many_samples_it_is_for(goal: Goal) -> None:
    said = f"^{type(goal).__name__} has 3 entries for 5 images; give it one for each$"
    with pytest.raises(CrossguardError, match=said):
        PGD()(LinearVictim(2), middle(5), goal, Linf(0.1))
    keep = torch.tensor([True, False, True, False, False])
    assert set(Untargeted(RIGHT).lasting().at(keep).counts()) == {2}


def test_a_goal_for_another_number_of_texts_is_one_sentence() -> None:
    def victim(texts: Sequence[str]) -> torch.Tensor:
        return torch.ones(len(texts), 2)

    with pytest.raises(CrossguardError, match="Drift has 3 entries for 2 texts; give it one for each"):
        crossguard.Substitute()(victim, ["a photo of a cat", "a photo of a dog"], Drift(torch.ones(3, 2)))


# Oracles on linear victims


@pytest.mark.parametrize(("budget", "dual"), [(Linf(0.03), 1), (L2(0.3), 2)], ids=str)
def test_pgd_reaches_the_best_loss_of_a_linear_victim_and_never_passes_it(budget: Linf | L2, dual: int) -> None:
    victim = LinearVictim(2)
    images = middle(16)
    labels = victim(images).argmax(1).detach()
    towards = (victim.weight[1] - victim.weight[0]).detach()
    best = margin(victim(images), labels).detach() - budget.eps * towards.norm(p=dual)
    made = PGD(steps=40, step=0.1, stop=False, loss=Margin())(victim, images, Untargeted(labels), budget)
    left = margin(victim(made), labels).detach()
    clean = margin(victim(images), labels).detach()
    assert bool((left >= best - 1e-4).all())
    assert bool(((clean - left) >= 0.98 * (clean - best)).all())


def test_pgd_beats_exactly_the_images_within_reach_of_the_boundary() -> None:
    victim, budget = LinearVictim(2), Linf(0.02)
    images = middle(64)
    labels = victim(images).argmax(1).detach()
    distance = margin(victim(images), labels) / (victim.weight[1] - victim.weight[0]).abs().sum()
    made = STRONG(victim, images, Untargeted(labels), budget)
    beaten = victim(made).argmax(1) != labels
    assert 5 < int(beaten.sum()) < 59, "the oracle needs both kinds"
    assert bool(beaten[distance < 0.98 * budget.eps].all())
    assert not bool(beaten[distance > budget.eps].any())


def test_a_targeted_goal_reaches_its_target() -> None:
    victim = LinearVictim(4)
    images = middle(8)
    targets = (victim(images).argmax(1) + 2) % 4
    made = STRONG(victim, images, Targeted(targets), Linf(0.2))
    assert torch.equal(victim(made).argmax(1), targets)


def test_a_goal_without_labels_drifts() -> None:
    def embed(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :16] - 0.5

    images = middle(6)
    clean = embed(images)
    random = (images + Linf(0.1).sample(by_position(6), images)).clamp(0, 1)
    made = STRONG(embed, images, Drift(clean), Linf(0.1))
    drift = Drift(clean).loss(embed(made))
    assert bool((drift > 1.5 * Drift(clean).loss(embed(random))).all())


def test_fgsm_and_momentum_against_their_formulas() -> None:
    victim = LinearVictim(3)
    images, budget = middle(4), Linf(0.01)
    labels = victim(images).argmax(1).detach()
    pixels = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(victim(pixels), labels, reduction="sum"), pixels)
    fgsm = PGD(steps=1, step=1.0, random_start=False, best=False, stop=False)
    assert torch.equal(fgsm(victim, images, Untargeted(labels), budget), (images + 0.01 * gradient.sign()).clamp(0, 1))

    current, velocity = images.clone(), torch.zeros_like(images)
    for _ in range(5):
        pixels = current.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(victim(pixels), labels, reduction="sum"), pixels)
        velocity = 0.9 * velocity + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
        current = (images + (current + 0.25 * 0.01 * velocity.sign() - images).clamp(-0.01, 0.01)).clamp(0, 1)
    mi_fgsm = PGD(steps=5, momentum=0.9, random_start=False, best=False, stop=False)
    assert torch.allclose(mi_fgsm(victim, images, Untargeted(labels), budget), current, atol=1e-7)


def test_restarts_never_weaken_and_best_never_loses_to_last() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 32), torch.nn.Tanh(), torch.nn.Linear(32, 5))
    images = middle(32)
    labels = net(images).argmax(1).detach()
    goal, budget = Untargeted(labels), Linf(0.05)

    def merit(attack: PGD) -> torch.Tensor:
        return goal.merit(net(attack(net, images, goal, budget))).detach()

    plain = PGD(steps=8, step=0.5, stop=False)
    assert bool((merit(dataclasses.replace(plain, restarts=4)) >= merit(plain) - 1e-6).all())
    assert bool((merit(plain) >= merit(dataclasses.replace(plain, best=False)) - 1e-6).all())
    fooled = net(PGD(steps=8, step=0.5)(net, images, goal, budget)).argmax(1) != labels
    assert bool(fooled[net(plain(net, images, goal, budget)).argmax(1) != labels].all()), "stopping early lost an image"


@pytest.mark.parametrize("steps", [2, 3, 8, 9])
@pytest.mark.parametrize("step", [1.0, 0.4])
def test_who_goes_to_and_fro_leaves_and_ends_where_it_would(steps: int, step: float) -> None:
    """With each image asked about alone, nothing is rounded differently. On a linear victim all images stay in their
    corner; on the other one some pixels go to and fro, and some images still wander."""
    torch.manual_seed(0)
    bent = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    images, budget = middle(12), Linf(0.2)
    asked = dict[torch.nn.Module, list[int]]()
    for net in (LinearVictim(2), bent):
        labels = net(images).argmax(1).detach()
        for row in range(len(images)):
            goal, image, seeds = Untargeted(labels[row : row + 1]), images[row : row + 1], torch.tensor([row])
            queries = Queries.none(1)
            last = PGD(steps=steps, step=step, best=False, stop=False)(net, image, goal, budget, seeds)
            left = PGD(steps=steps, step=step, best=False)(ImageVictim(net, queries), image, goal, budget, seeds)
            assert torch.equal(last, left)
            asked.setdefault(net, []).append(int(queries.gradients))
    straight, curved = asked.values()
    if steps > 4 and step == 1.0:  # there after two steps at the latest, and that is seen two steps later
        assert straight == 12 * [4] and max(curved) > 4
    if steps == 2:
        assert straight == curved == 12 * [2]


def test_beaten_images_leave_the_batch_and_the_count_says_so() -> None:
    victim = LinearVictim(2)
    images = middle(64)
    labels = victim(images).argmax(1).detach()
    queries = Queries.none(64)
    made = PGD(steps=8)(ImageVictim(victim, queries), images, Untargeted(labels), Linf(0.02))
    beaten = victim(made).argmax(1) != labels
    assert bool((queries.gradients[~beaten] == 8).all()), "a standing image gets every step"
    assert int(queries.gradients[beaten].min()) < 8
    assert bool((queries.forwards[~beaten] == 1).all())
    stubborn = Queries.none(64)
    PGD(steps=8, stop=False)(ImageVictim(victim, stubborn), images, Untargeted(labels), Linf(0.02))
    assert bool((stubborn.gradients == 8).all())


def test_an_endless_goal_never_stops() -> None:
    victim, images = LinearVictim(2), middle(8)
    labels = victim(images).argmax(1).detach()
    queries = Queries.none(8)
    PGD(steps=7)(ImageVictim(victim, queries), images, Untargeted(labels).lasting(), Linf(0.2))
    assert bool((queries.gradients == 7).all())


# Joint attacks


def test_joint_is_never_weaker_than_independent_and_sometimes_stronger() -> None:
    before, after = LinearVictim(3, seed=1), LinearVictim(3, seed=2)
    images = middle(64)
    labels = after(images).argmax(1).detach()
    parts = (PGD(steps=10), crossguard.Substitute())
    budget = Both(Linf(0.06), Words(1))
    pair = PairVictim(ImageVictim(before), ImageVictim(after), ImageVictim(before))
    seeds = by_position(64)
    beaten = {
        kind: after(kind(*parts).perturb(pair, images, Untargeted(labels), budget, seeds)).argmax(1) != labels
        for kind in (Independent, Joint)
    }
    assert bool(beaten[Joint][beaten[Independent]].all())
    assert int(beaten[Joint].sum()) > int(beaten[Independent].sum())


# Mistakes that make attacks weak by accident


def test_tiny_losses_do_not_vanish_in_a_large_batch() -> None:
    """A mean over the batch would scale the gradient by 1/n; the sum leaves each image its own, whatever the batch."""
    victim = LinearVictim(3)
    images = middle(8)
    labels = victim(images).argmax(1).detach()
    alone, _, _ = ImageVictim(victim).ascend(images[:1], Untargeted(labels[:1]))
    many, _, _ = ImageVictim(victim).ascend(images, Untargeted(labels))
    assert torch.allclose(alone[0], many[0], rtol=1e-4, atol=1e-6)


def test_a_victim_that_answers_nan_is_refused() -> None:
    with pytest.raises(CrossguardError, match="not finite"):
        PGD()(
            lambda images: images.flatten(1)[:, :3] * float("nan"),
            middle(2),
            Untargeted(torch.tensor([0, 1])),
            Linf(0.1),
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linf(-1 / 255), "is not a budget"),
        (lambda: Linf(8.0), "8/255 is usual"),
        (lambda: L2(-0.5), "is not a budget"),
        (lambda: Words(-1), "is not a budget"),
        (lambda: PGD(steps=0), "does nothing"),
        (lambda: PGD(step=0.0), "does not climb"),
        (lambda: PGD(restarts=0), "give 1 or more"),
        (lambda: PGD().spends(Words(1)), "allows no change of pixels"),
        (lambda: Joint().spends(Linf(0.1)), "allows no change of texts"),
        (
            lambda: Untargeted(torch.tensor([0])).climbing(Margin()) and Drift(torch.ones(1, 2)).climbing(Margin()),
            "its own",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    with pytest.raises(CrossguardError, match=message):
        make()


# Budgets and noise


@pytest.mark.parametrize("budget", [Linf(8 / 255), L2(0.5)], ids=str)
def test_budgets(budget: Linf | L2) -> None:
    images = middle(32)
    noise = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    assert bool((budget.size(budget.shrink(noise)) <= budget.eps * (1 + 1e-5)).all())
    inside = 0.5 * budget.eps * noise / budget.size(noise).view(-1, 1, 1, 1)
    assert torch.allclose(budget.shrink(inside), inside, atol=1e-7), "a point of the ball is its own nearest point"
    assert torch.allclose(budget.size(budget.ascent(noise)), torch.ones(32), atol=1e-5)
    drawn = budget.sample(by_position(32), images)
    assert bool((budget.size(drawn) <= budget.eps * (1 + 1e-5)).all()) and float(budget.size(drawn).min()) > 0
    projected = budget.project(images + noise, images)
    budget.check(projected, images)
    with pytest.raises(CrossguardError, match="broke its budget"):
        budget.check(images + 1.01 * budget.eps * budget.ascent(noise), images)
    with pytest.raises(CrossguardError, match="outside"):
        budget.check(images - 1.0, images)
    with pytest.raises(CrossguardError, match="not finite"):
        budget.check(images * float("nan"), images)


def test_characters_count_as_levenshtein() -> None:
    budget = crossguard.Characters(3)
    assert [budget.size(a, b) for a, b in [("kitten", "sitting"), ("", "abc"), ("cat", "cat"), ("cats", "cat")]] == [
        3,
        3,
        0,
        1,
    ]


def test_noise_belongs_to_the_sample() -> None:
    seeds = keys(["a", "b", "c"], 7)
    noise = uniform(seeds, (3, 8, 8))
    assert torch.equal(uniform(seeds[1:2], (3, 8, 8)), noise[1:2])
    assert torch.equal(uniform(keys(["c", "a"], 7), (3, 8, 8)), noise[[2, 0]])
    assert not torch.equal(uniform(keys(["a"], 8), (3, 8, 8)), noise[:1])
    assert derive("a", 1) == derive("a", 1) != derive("a", 2)


def test_noise_has_the_distribution_it_claims() -> None:
    many = uniform(by_position(200), (500,))
    assert float(many.min()) >= 0 and float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.003 and abs(float(many.var()) - 1 / 12) < 0.002
    counts = torch.histc(many, 20, 0, 1) / many.numel()
    assert float((counts - 0.05).abs().max()) < 0.004
    assert abs(float(torch.corrcoef(many[:2])[0, 1])) < 0.15
    bell = normal(by_position(200), (500,))
    assert abs(float(bell.mean())) < 0.01 and abs(float(bell.std()) - 1) < 0.01
    assert abs(float((bell.abs() < 1).float().mean()) - math.erf(1 / math.sqrt(2))) < 0.01


def test_images_that_go_in_circles_leave_and_nothing_is_lost() -> None:
    """Steps of a fixed length end in circles on a smooth network that stands. Who left has seen all that comes."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    net = net.double().requires_grad_(False)

    def asked(images: torch.Tensor) -> torch.Tensor:
        return net(images.double())

    images, budget = middle(32), Linf(0.02)
    goal = Untargeted(asked(images).argmax(1)).lasting()
    few, many = Queries.none(32), Queries.none(32)
    attack = PGD(steps=60)
    made = attack(ImageVictim(asked, few), images, goal, budget)
    whole = dataclasses.replace(attack, stop=False)(ImageVictim(asked, many), images, goal, budget)
    assert torch.equal(made, whole)
    assert bool((many.gradients == 60).all()) and float(few.gradients.float().mean()) < 50


def test_a_random_model_is_not_taken_for_one_that_goes_in_circles() -> None:
    victim, images = LinearVictim(3), middle(8)
    labels = victim(images).argmax(1).detach()

    def noisy(images: torch.Tensor) -> torch.Tensor:
        return victim(images) + 1e-9 * normal(drawn(len(images)), (3,))

    queries = Queries.none(8)
    PGD(steps=30)(ImageVictim(noisy, queries), images, Untargeted(labels).lasting(), Linf(0.01))
    assert bool((queries.gradients == 30).all())
