"""Who has won is the truth, whoever judges: ensembles lose nobody that one of their parts beats, losses never saturate,
and no search waits for its victim in every step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crossguard import (
    APGD,
    BF16,
    DLR,
    EOT,
    FAB,
    L1,
    L2,
    PGD,
    AutoAttack,
    BitDepth,
    CarliniWagner,
    CrossEntropy,
    CrossguardError,
    DeepFool,
    Drift,
    EachTarget,
    Independent,
    Joint,
    Linf,
    Margin,
    PredictedLabel,
    RayS,
    Restarts,
    Square,
    Targeted,
    Towards,
    Untargeted,
    Words,
    Worst,
    ZeroShot,
    budgets,
    device,
    evaluate,
    goals,
)
from crossguard.attacks import apgd, base, boundary, gradient, query
from crossguard.attacks.base import Found, ImageAttack, ImageVictim, Made, PairVictim, Queries, check_images
from crossguard.attacks.boundary import BoundaryAttack
from crossguard.budgets import Both, PixelBudget
from crossguard.goals import Goal, log_odds
from crossguard.seeds import by_position, drawn, normal
from crossguard.words import show
from toys import Dots, Toy, middle, soft, with_fields

BUDGET, ROUND, SPARSE = Linf(0.01), L2(0.1), L1(0.8)
PARTS: tuple[ImageAttack, ...] = (PGD(steps=8), EachTarget(APGD(steps=8, loss=DLR()), 4))


# Ensembles lose nobody, on any kind of victim


def noisy(images: Tensor) -> Tensor:
    return soft()(images) + 0.004 * normal(drawn(len(images)), (50,))


def standing(answer: Callable[[Tensor], Tensor], made: Tensor, labels: Tensor) -> Tensor:
    """Who stands; on a victim that draws noise by most of the draws that the ensemble compares by."""
    victim = ImageVictim(answer).drawing_from(by_position(len(made)))
    return ~victim.judge(made, Untargeted(labels))[0]


MADE: list[tuple[ImageAttack, Tensor, Tensor]] = []  # attacks, the samples they were given, what they made of them


@dataclasses.dataclass(frozen=True)
class Noted(ImageAttack):
    """An attack inside an ensemble, whose images are remembered."""

    attack: ImageAttack

    def search(self, victim: Any, clean: Any, goal: Any, budget: Any, seeds: Any) -> Made:
        made = self.attack.search(victim, clean, goal, budget, seeds)
        MADE.append((self.attack, victim.rows, made.images))
        return made


def steady(images: Tensor) -> Tensor:
    """The answers of `soft`, each image on its own: a batch of another size would round its products otherwise."""
    first, _, last = list(soft().children())[1:]
    hidden = torch.tanh((images.flatten(1)[:, None] * first.weight).sum(2) + first.bias)
    return (hidden[:, None] * last.weight).sum(2) + last.bias


def unsteady(images: Tensor) -> Tensor:
    return steady(images) + 0.01 * normal(drawn(len(images)), (50,))


STARTS = PGD(steps=4, step=0.4)
CONTESTS: dict[PixelBudget, tuple[ImageAttack, ...]] = {
    Linf(0.008): (STARTS, EachTarget(APGD(steps=6, loss=DLR()), 3), Square(queries=30), EOT(PGD(steps=2), 2)),
    L2(0.1): (Worst((APGD(steps=5), Square(queries=30))), STARTS, FAB(steps=4, targets=2, restarts=2)),
    L1(0.8): (Restarts(APGD(steps=5), 2), PGD(steps=6, loss=Margin()), EachTarget(APGD(steps=6, large_eps=True), 2)),
}


@pytest.mark.parametrize("ends", [True, False], ids=["judged here", "judged elsewhere"])
@pytest.mark.parametrize("answer", [steady, unsteady], ids=["fixed", "random"])
@pytest.mark.parametrize("budget", CONTESTS, ids=str)
@pytest.mark.parametrize("order", [1, -1])
def test_no_image_stands_that_a_part_of_the_ensemble_beats_alone(
    budget: PixelBudget, answer: Any, ends: bool, order: int
) -> None:
    """To the last bit: each part makes in the ensemble what it makes alone, also when it is an ensemble itself, and on
    a victim that draws noise. The mistakes would show: noise by the place in the ensemble, or by who asked before."""
    images, seeds = middle(64), by_position(64)
    labels = steady(images).argmax(1)
    goal, parts = Untargeted(labels, ends=ends), CONTESTS[budget][::order]
    MADE.clear()
    left = standing(answer, Worst(tuple(map(Noted, parts)))(answer, images, goal, budget, seeds), labels)
    inside, stood = list(MADE), []
    assert [part for part, _, _ in inside] == list(parts)
    for part, rows, made in inside:
        alone = part(answer, images, goal, budget, seeds)
        assert torch.equal(made, alone[rows])
        stood.append(standing(answer, alone, labels))
        assert not bool((left & ~stood[-1]).any())
    assert 0 < int(left.sum()) < max(int(alone.sum()) for alone in stood), "the test needs both kinds"


@pytest.mark.parametrize("answer", [steady, unsteady], ids=["fixed", "random"])
def test_only_an_attack_that_runs_again_has_other_noise(answer: Any) -> None:
    """Whatever stands between, the second run of an attack is that of `Restarts`, and another attack is none."""
    images, seeds = middle(12), by_position(12)
    goal = Untargeted(steady(images).argmax(1)).lasting()
    runs = {}
    for parts in ((STARTS, STARTS), (STARTS, Square(queries=5), STARTS), (Square(queries=5), STARTS)):
        MADE.clear()
        Worst(tuple(map(Noted, parts)))(answer, images, goal, BUDGET, seeds)
        runs[len(parts), parts[0] == STARTS] = [made for part, _, made in MADE if part == STARTS]
    (first, second), (one, two), (only,) = runs.values()
    assert torch.equal(first, one) and torch.equal(second, two) and torch.equal(first, only)
    assert not torch.equal(first, second)
    MADE.clear()
    Restarts(Noted(STARTS), 2)(answer, images, goal, BUDGET, seeds)
    assert all(torch.equal(made, expected) for (_, _, made), expected in zip(MADE, (first, second), strict=True))
    MADE.clear()
    EachTarget(Noted(STARTS), 3)(answer, images, goal, BUDGET, seeds)
    EachTarget(Noted(STARTS), 2)(answer, images, goal, BUDGET, seeds)
    assert all(torch.equal(few[2], many[2]) for few, many in zip(MADE[3:], MADE[:2], strict=True))


def test_an_attack_that_runs_again_meets_other_noise_of_the_victim() -> None:
    """Its starts would be others anyhow; what a random victim drew is remembered here."""
    drew = list[Tensor]()

    def answer(images: Tensor) -> Tensor:
        drew.append(drawn(len(images)))
        return steady(images) + 0.01 * normal(drew[-1], (50,))

    images = middle(3)
    goal = Untargeted(steady(images).argmax(1)).lasting()
    Worst((PGD(steps=2), Square(queries=3), PGD(steps=2)))(answer, images, goal, BUDGET)
    assert len(drew) == 6 + 3 * (3 + base.DRAWS), "the clean images, and three searches of three"
    first, other, again = drew[6:9], drew[14:17], drew[22:25]
    assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True)), "as if nobody had asked before"
    keys = torch.cat([*first, *again, *drew[9:14]]).flatten().tolist()
    assert len(set(keys)) == len(keys) and all(torch.equal(drew[9 + n], drew[17 + n]) for n in range(base.DRAWS))


@dataclasses.dataclass(frozen=True)
class Blind(Untargeted):
    """The mistake: nobody wins, and the loss alone counts."""

    def won(self, outputs: Tensor) -> Tensor:
        return torch.zeros(len(outputs), dtype=torch.bool)

    def merit(self, outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, self.labels, reduction="none")


def test_an_ensemble_that_did_not_know_who_has_won_would_be_worth_its_first_attack() -> None:
    images, net = middle(96), soft()
    labels = net(images).argmax(1)

    @dataclasses.dataclass(frozen=True)
    class Towed(ImageAttack):
        """The strongest part, made for the true goal."""

        def search(self, victim: Any, clean: Any, goal: Any, budget: Any, seeds: Any) -> Made:
            return Made(PARTS[1](net, clean, Untargeted(goal.labels), budget, seeds))

    counts = {}
    for kind in (Untargeted, Blind):
        goal = kind(labels, ends=False)
        made = Worst((PARTS[0], Towed()))(net, images, goal, BUDGET)
        counts[kind] = int((net(made).argmax(1) == labels).sum())
    assert counts[Blind] > 1.5 * counts[Untargeted] > 0, counts


@pytest.mark.parametrize(
    "attack",
    [
        PGD(steps=6),
        PGD(steps=6, restarts=2, momentum=0.5),
        APGD(steps=10, restarts=2),
        APGD(steps=10, loss=DLR()),
        Square(queries=60, loss=CrossEntropy()),
        Worst((*PARTS, Square(queries=30))),
        Restarts(PGD(steps=4), 2),
        PredictedLabel(PGD(steps=4)),
    ],
    ids=str,
)
def test_the_judge_elsewhere_is_the_judge_here_when_it_is_the_same(attack: ImageAttack) -> None:
    images, net = middle(64), soft()
    labels = net(images).argmax(1)
    here, there = (
        net(attack(net, images, Untargeted(labels, ends=ends), BUDGET)).argmax(1) == labels for ends in (True, False)
    )
    assert torch.equal(here, there)
    assert 0 < int(here.sum()) < 64, "the test needs both kinds"


@pytest.mark.parametrize(
    ("attack", "budget"),
    [(FAB(steps=6, targets=3), BUDGET), (DeepFool(steps=6), BUDGET), (RayS(queries=150), Linf(0.02))],
    ids=str,
)
def test_attacks_that_look_for_the_boundary_lose_nobody_when_they_go_on(
    attack: ImageAttack, budget: PixelBudget
) -> None:
    images, net = middle(64), soft()
    labels = net(images).argmax(1)
    goals = Untargeted(labels), Untargeted(labels).lasting()
    here, there = (attack(net, images, goal, budget) for goal in goals)
    stand = [net(made).argmax(1) == labels for made in (here, there)]
    assert 0 < int(stand[0].sum()) < 64, "the test needs both kinds"
    assert not bool((stand[1] & ~stand[0]).any())
    both = ~stand[0] & ~stand[1]
    deeper = goals[0].merit(net(there)) - goals[0].merit(net(here))
    assert float(deeper[both].mean()) > 0, "an image far beyond the boundary is the better one for another judge"


def test_rays_keeps_a_win_that_the_rim_of_the_budget_has_lost() -> None:
    """Beyond a thin shell the answer is right again."""

    def shell(images: Tensor) -> Tensor:
        way = (images - 0.5).abs().mean((1, 2, 3))
        wrong = ((way > 0.03) & (way < 0.07)) | (way > 0.1)
        return torch.stack([torch.full_like(way, 0.5), wrong.float()], 1)

    images, labels = torch.full((3, 3, 4, 4), 0.5), torch.zeros(3, dtype=torch.int64)
    made = RayS(queries=60)(shell, images, Untargeted(labels).lasting(), Linf(0.08))
    assert bool((shell(made).argmax(1) == 1).all())


FIXED = PGD(steps=8, random_start=False), EachTarget(APGD(steps=8, loss=DLR(), random_start=False), 4)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "surrogate",
    [Toy(), BitDepth(Toy(), 3), BitDepth(Toy(), 4)],
    ids=show,
)
def test_crafted_on_a_surrogate_the_ensemble_loses_nobody_there(surrogate: Any, order: int, tmp_path: Path) -> None:
    """What is crafted for another judge is judged by the surrogate itself: who is beaten there by a part alone is
    beaten there by the ensemble. The other judge may still differ about a single image, but not by many."""
    task, model, budget, parts = ZeroShot(Dots(96)), BitDepth(Toy(), 3), Linf(4 / 255), FIXED[::order]

    def standing(attack: ImageAttack) -> tuple[Any, int]:
        there = evaluate(task, model, attack, budget, surrogate, crafts=tmp_path)
        here = evaluate(task, surrogate, attack, budget, surrogate, crafts=tmp_path)
        return here.standing, int(there.standing.sum())

    (left, count), *alone = map(standing, (Worst(parts), *parts))
    assert len(list(tmp_path.iterdir())) == 3, "both judges saw the same images"
    for stands, _ in alone:
        assert not np.any(left & ~stands)
    stood = [number for _, number in alone]
    assert 0 < count <= min(stood) + 2 and count < max(stood) - 10, "the ensemble is more than one of its parts"


@pytest.mark.parametrize("model", [Toy(), BitDepth(Toy(), 3)], ids=show)
@pytest.mark.parametrize("attack", [PGD(steps=5), Worst((*FIXED, PGD(steps=3), Square(queries=40)))], ids=["PGD", "4"])
def test_a_surrogate_that_is_the_model_gives_the_outcomes_of_a_white_box(attack: ImageAttack, model: Any) -> None:
    task = ZeroShot(Dots(96))
    white, surrogate = (evaluate(task, model, attack, Linf(4 / 255), one) for one in (None, model))
    assert np.array_equal(white.standing, surrogate.standing)
    assert 0 < int(white.standing.sum()) < 96, "the test needs both kinds"


@pytest.mark.parametrize("ends", [True, False], ids=["judged here", "judged elsewhere"])
@pytest.mark.parametrize("draws", [False, True], ids=["fixed", "random"])
def test_a_joint_attack_is_never_weaker_than_an_independent_one(draws: bool, ends: bool) -> None:
    """The texts change the classifier from `before` to `after`, and CE does not order by success on either."""
    images, seeds = middle(96), by_position(96)
    noise = 0.004 if draws else 0.0

    def after(images: Tensor) -> Tensor:
        logits = soft(0)(images) + 0.3 * soft(1)(images)
        return logits + noise * normal(drawn(len(images)), (50,)) if draws else logits

    clean = soft(0)(images) + 0.3 * soft(1)(images)
    labels = clean.argmax(1)
    left = {}
    goal, budget = Untargeted(labels, ends=ends), Both(Linf(0.04), Words(1))
    for kind in (Independent, Joint):
        queries = Queries.none(96)
        pair = PairVictim(*(ImageVictim(answer, queries, seeds) for answer in (soft(0), after, soft(0))))
        made = kind(Worst(PARTS)).perturb(pair, images, goal, budget, seeds)
        left[kind] = standing(after, made, labels)
    assert not bool((left[Joint] & ~left[Independent]).any())
    assert 0 < int(left[Joint].sum()) < int(left[Independent].sum())


def test_a_search_knows_what_it_made_so_that_an_ensemble_asks_once_in_all() -> None:
    images, net = middle(16), soft()
    labels = net(images).argmax(1)
    goal, parts = Untargeted(labels).lasting(), (PGD(steps=3), APGD(steps=5), PGD(steps=2), Square(queries=4))
    queries = Queries.none(16)
    Worst(parts)(ImageVictim(net, queries), images, goal, BUDGET)
    assert queries.forwards.tolist() == [1 + 1 + 1 + 1 + 4] * 16, "the clean image, and the last points of three climbs"
    for attack in (*parts, FAB(steps=3, targets=2)):
        made = attack.craft(net, images, goal, BUDGET)
        assert made.won is not None and made.merit is not None
        assert torch.equal(made.won, goal.won(net(made.images)))
        assert torch.allclose(made.merit, goal.merit(net(made.images)), atol=1e-5)
    for silent in (BF16(parts[0]), EOT(parts[0], 2), PredictedLabel(parts[0]), PGD(best=False, stop=False)):
        made = silent.craft(net, images, goal, BUDGET)
        assert made.won is None and made.merit is None, "what was asked is not what is to be known"


def test_on_a_random_victim_the_luckiest_of_many_draws_is_not_the_strongest() -> None:
    """Two candidates: one that always wins by a little, and one whose search has seen a single lucky answer."""
    sure, lucky = torch.full((8, 3, 2, 2), 0.6), torch.full((8, 3, 2, 2), 0.4)

    def answer(images: Tensor) -> Tensor:
        luck = normal(drawn(len(images)), (1,))[:, 0]
        wrong = torch.where(images.mean((1, 2, 3)) > 0.5, 0.1, luck - 2.0)
        return torch.stack([torch.zeros_like(wrong), wrong], 1)

    @dataclasses.dataclass(frozen=True)
    class Claims(ImageAttack):
        level: float

        def search(self, victim: Any, clean: Any, goal: Any, budget: Any, seeds: Any) -> Made:
            wins = torch.ones(len(clean), dtype=torch.bool)
            return Made(torch.full_like(clean, self.level), wins, torch.full((len(clean),), 9.0 - self.level))

    goal = Untargeted(torch.zeros(8, dtype=torch.int64)).lasting()
    queries = Queries.none(8)
    made = Worst((Claims(0.4), Claims(0.6)))(ImageVictim(answer, queries), torch.full_like(sure, 0.5), goal, Linf(0.1))
    assert torch.equal(made, sure) and not torch.equal(made, lucky)
    assert queries.forwards.tolist() == [1 + 3 * base.DRAWS] * 8, "five common draws for each, and the clean outputs"


def test_found_keeps_who_has_won_and_orders_the_rest_by_merit() -> None:
    clean = torch.zeros(3, 3, 1, 1)
    every, lost, won = torch.arange(3), torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    for ends in (True, False):
        found = Found.nothing(clean, ends)
        found.offer(every, clean + 1, lost, torch.tensor([5.0, -5.0, 0.0]))
        assert found.offer(torch.tensor([1, 2]), clean[1:] + 2, lost[1:], torch.tensor([-6.0, 1.0])).tolist() == [
            False,
            True,
        ]
        assert found.offer(torch.tensor([0]), clean[:1] + 3, won[:1], torch.tensor([-9.0])).tolist() == [True]
        assert found.offer(every, clean + 4, lost, torch.full((3,), 99.0)).tolist() == [False, True, True]
        assert found.offer(torch.tensor([0]), clean[:1] + 5, won[:1], torch.tensor([0.0])).tolist() == [not ends]
        assert found.images[:, 0, 0, 0].tolist() == [3.0 if ends else 5.0, 4.0, 4.0]
        assert found.open().tolist() == ([1, 2] if ends else [0, 1, 2])


def test_merit_does_not_depend_on_the_loss_that_is_climbed() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [4.0, 0.0, 1.0]])
    labels = torch.tensor([0, 0])
    for loss in (CrossEntropy(), Margin(), DLR()):
        assert Untargeted(labels, loss).merit(logits).tolist() == [2.0, -3.0]
        assert Towards(labels, torch.tensor([2, 2]), loss).merit(logits).tolist() == [2.0, -3.0]
        assert Targeted(torch.tensor([1, 1]), loss).merit(logits).tolist() == [1.0, -4.0]
    drift = Drift(torch.tensor([[1.0, 0.0]]))
    assert drift.merit(torch.tensor([[0.0, 1.0]])).tolist() == [1.0] and not drift.wins
    assert drift.lasting().ends is False and drift.lasting().lasting() == drift.lasting()


# Cross-entropy that never saturates


def test_log_odds_are_the_cross_entropy_where_it_can_be_computed() -> None:
    logits = (6 * normal(by_position(40), (7,))).requires_grad_(True)
    labels = torch.arange(40) % 7
    odds = CrossEntropy().away(logits, labels)
    exact = F.cross_entropy(logits.double(), labels, reduction="none")
    assert torch.allclose(F.softplus(odds.double()), exact, atol=1e-6)
    (ours,) = torch.autograd.grad(odds.sum(), logits)
    (theirs,) = torch.autograd.grad(exact.sum(), logits)
    assert torch.allclose(F.normalize(ours, dim=1), F.normalize(theirs.float(), dim=1), atol=1e-5)
    (away,) = torch.autograd.grad(CrossEntropy().towards(logits, labels).sum(), logits)
    assert torch.allclose(away, -ours)


@pytest.mark.parametrize("gap", [5.0, 20.0, 110.0, 1e4, 1e30])
def test_however_sure_the_answer_is_label_and_rival_have_a_whole_gradient(gap: float) -> None:
    logits = torch.tensor([[gap, 0.0, -0.5], [0.0, gap, 0.2]], requires_grad=True)
    (gradient,) = torch.autograd.grad(CrossEntropy().away(logits, torch.tensor([0, 1])).sum(), logits)
    share = torch.tensor([0.0, -0.5]).softmax(0)[0].item()
    assert gradient[0].tolist() == pytest.approx([-1.0, share, 1 - share])
    assert gradient[1, 1] == -1.0


def test_log_odds_of_two_classes_twins_and_classes_that_are_shut_off() -> None:
    two = torch.tensor([[3.0, 1.0]])
    assert (
        CrossEntropy().away(two, torch.tensor([0])).tolist() == [-2.0] == Margin().away(two, torch.tensor([0])).tolist()
    )
    off = -torch.inf
    logits = torch.tensor([[2.0, 0.0, off], [2.0, off, off], [2.0, 2.0, 1.0], [2.0, 2.0, 2.0]], requires_grad=True)
    labels = torch.zeros(4, dtype=torch.int64)
    odds = CrossEntropy().away(logits, labels)
    assert odds.tolist() == [-2.0, 0.0, -1.0, 0.0], "over a twin of the label nobody can win, and over nothing neither"
    (gradient,) = torch.autograd.grad(odds.sum(), logits)
    assert gradient.tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert log_odds(torch.tensor([[off, off]]), torch.tensor([5.0])).tolist() == [0.0]


WIDE = Linf(0.02)
GRADIENT_ATTACKS: list[tuple[ImageAttack, PixelBudget]] = [
    (PGD(steps=5), WIDE),
    (PGD(steps=5, momentum=0.9), L2(0.2)),
    (PGD(steps=5, loss=Margin()), WIDE),
    (APGD(steps=8), WIDE),
    (APGD(steps=8, loss=DLR()), L2(0.2)),
    (EachTarget(APGD(steps=4), 2), WIDE),
    (EachTarget(PGD(steps=3, loss=DLR()), 2), WIDE),
    (EOT(PGD(steps=3), 2), WIDE),
    (FAB(steps=4, targets=2), WIDE),
    (DeepFool(steps=4), L2(0.2)),
    (Worst((PGD(steps=2), APGD(steps=3))), WIDE),
    (PredictedLabel(PGD(steps=4)), WIDE),
]


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize(("attack", "budget"), GRADIENT_ATTACKS, ids=str)
def test_logits_times_300_are_no_defense(attack: ImageAttack, budget: PixelBudget, classes: int) -> None:
    """Times 300 labels lead by hundreds, where float32 knows no probability but 1. With two classes every loss has one
    direction; with more the cross-entropy of a sure model looks at the best class alone, so it may even gain."""
    images, net = middle(48), soft(0, classes)
    labels = net(images).argmax(1)
    goal = Untargeted(labels)
    assert float(-goal.merit(9000 * net(images)).median()) > 104, "cross-entropy has no gradient there"
    plain, sure = (
        goal.won(net(attack(lambda images, by=by: by * net(images), images, goal, budget))) for by in (30.0, 9000.0)
    )
    assert int((plain & ~sure).sum()) <= 1, "but for an image on the very edge"
    assert classes > 2 or torch.equal(plain, sure)
    assert 0 < int(plain.sum()) < 48, "the test needs both kinds"


def test_a_sure_model_is_attacked_though_its_probabilities_are_one() -> None:
    """Two classes by the mean of the pixels, times 100 and more: the closed form says that every image falls."""

    def sure(images: Tensor) -> Tensor:
        return torch.stack([1000 * (images.mean((1, 2, 3)) - 0.3), torch.zeros(len(images))], 1)

    images, goal = torch.full((4, 3, 5, 5), 0.5), Untargeted(torch.zeros(4, dtype=torch.int64))
    for attack in (PGD(steps=20), APGD(steps=20)):
        assert bool(goal.won(sure(attack(sure, images, goal, Linf(0.3)))).all())


# Number formats, pixels and labels at the door


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("attack", [PGD(steps=2), Worst(PARTS), FAB(steps=2), Square(queries=5)], ids=str)
def test_outputs_in_any_format_are_read_in_float32(attack: ImageAttack, dtype: torch.dtype) -> None:
    images, net = middle(4), soft()
    goal = Untargeted(net(images).argmax(1))
    made = attack(lambda images: net(images).to(dtype), images, goal, BUDGET)
    BUDGET.check(made, images)
    assert made.dtype == torch.float32 and not torch.equal(made, images)
    outputs = ImageVictim(lambda images: net(images).to(dtype))(images)
    assert outputs.dtype == torch.float32


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (np.zeros((2, 3, 4, 4), np.float32), "ndarray; torch.from_numpy"),
        (torch.zeros(3, 4, 4), r"shape \(3, 4, 4\); a single image is images\[None\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"uint8; give images.float\(\) / 255"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.float64), r"float64; give images.float\(\)$"),
        (torch.full((1, 3, 4, 4), 200.0), "from 200 to 200; divide images of 0 to 255 by 255"),
        (torch.full((1, 3, 4, 4), -2.0), "leave normalization to the victim"),
        (torch.full((1, 3, 4, 4), float("nan")), "nan"),
    ],
)
def test_what_is_no_batch_of_images_is_one_sentence(images: Any, said: str) -> None:
    with pytest.raises(CrossguardError, match=said):
        check_images(images)


@pytest.mark.parametrize("attack", [PGD(), APGD(), Square(), RayS(), FAB(), DeepFool(), AutoAttack()], ids=str)
def test_every_attack_looks_at_the_pixels_first(attack: ImageAttack) -> None:
    images, labels = 255 * middle(2), torch.tensor([0, 1])
    with pytest.raises(CrossguardError, match="divide images of 0 to 255"):
        attack(soft(), images, Untargeted(labels), BUDGET)
    if isinstance(attack, FAB):
        with pytest.raises(CrossguardError, match="divide images of 0 to 255"):
            attack.nearest(soft(), images, Untargeted(labels), BUDGET)
    check_images(middle(2).clamp(0, 1) + 5e-7)
    empty = attack(soft(), torch.zeros(0, 3, 6, 6), Untargeted(torch.zeros(0, dtype=torch.int64)), BUDGET)
    assert empty.shape == (0, 3, 6, 6)


def test_labels_alone_are_an_untargeted_goal() -> None:
    images, net = middle(6), soft()
    labels = net(images).argmax(1)
    assert torch.equal(PGD()(net, images, labels, BUDGET), PGD()(net, images, Untargeted(labels), BUDGET))


def test_inference_mode_is_refused_and_what_comes_from_it_is_taken() -> None:
    net, task = soft(), ZeroShot(Dots(4))
    with torch.inference_mode():
        images = middle(4)
        labels = net(images).argmax(1)
        for call in (
            lambda: PGD()(net, images, Untargeted(labels), BUDGET),
            lambda: evaluate(task, Toy(), PGD(steps=1), BUDGET),
        ):
            with pytest.raises(CrossguardError, match=r"torch.inference_mode\(\) forbids"):
                call()
    for attack in (PGD(steps=2), FAB(steps=2, targets=2)):
        made = attack(net, images, Untargeted(labels), BUDGET)
        assert torch.equal(made, attack(net, images.clone(), Untargeted(labels.clone()), BUDGET))


def test_a_victim_asked_about_others_than_its_samples_says_so() -> None:
    images, net = middle(6), soft()
    queries = Queries.none(6)
    victim = ImageVictim(net, queries, by_position(6))
    with pytest.raises(CrossguardError, match="of 6 samples was asked about 4 images"):
        victim(images[:4])
    victim(torch.cat([images, images]))
    assert queries.forwards.tolist() == [2] * 6, "two views of each"
    victim.at(torch.tensor([1, 4])).ascend(images[:2], Drift(torch.ones(2, 50)))
    assert queries.gradients.tolist() == [0, 1, 0, 0, 1, 0]


# Attacks without chance


@pytest.mark.parametrize(
    ("attack", "draws"),
    [
        (PGD(), True),
        (PGD(random_start=False), False),
        (PGD(random_start=False, restarts=2), True),
        (APGD(random_start=False), False),
        (FAB(targets=None), False),
        (FAB(restarts=2), True),
        (DeepFool(), False),
        (CarliniWagner(), False),
        (RayS(), False),
        (Square(), True),
        (EachTarget(FAB()), False),
        (EOT(PGD(random_start=False), noise=0.1), True),
        (Worst((FAB(), RayS())), False),
        (AutoAttack(), True),
    ],
    ids=str,
)
def test_restarts_of_an_attack_without_chance_are_refused(attack: ImageAttack, draws: bool) -> None:
    assert attack.draws == draws
    images, net = middle(6), soft()
    if draws:
        assert Restarts(attack, 2).draws
        assert Worst((attack, attack)).draws
        return
    with pytest.raises(CrossguardError, match="draws no noise"):
        Restarts(attack, 2)
    with pytest.raises(CrossguardError, match="twice"):
        Worst((attack, PGD(), attack))
    budget = next(one for one in (BUDGET, ROUND) if isinstance(one, attack.norms))
    if not isinstance(attack, CarliniWagner | Worst | EachTarget):
        goal = Untargeted(net(images).argmax(1))
        few = dataclasses.replace(attack, **{"queries" if isinstance(attack, RayS) else "steps": 4})
        one, other = (few(net, images, goal, budget, by_position(6) + shift) for shift in (0, 99))
        assert torch.equal(one, other), "other keys give another answer, so it draws"


def test_plus_restarts_fab_inside() -> None:
    plus = AutoAttack("plus").parts(BUDGET)
    assert plus[2] == FAB(targets=None, restarts=5)
    images, net = middle(2), soft(classes=4)
    labels = net(images).argmax(1)
    queries = Queries.none(2)
    some = dataclasses.replace(plus[2], steps=2)
    some(ImageVictim(net, queries), images, Untargeted(labels), Linf(1e-5))
    assert queries.gradients.tolist() == [5 * 2 * 3] * 2, "five runs of two steps over three classes"


# Nothing waits in a step


class Waits(TorchDispatchMode):
    """Counts what would make a program wait for an accelerator: numbers read, masks turned into places, copies."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = any(place is not None and place.dtype == torch.bool for place in places)
        if masks or name in ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique_dim"):
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def accelerated(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """From now on the CPU is treated as an accelerator, at which a search looks after each `every`-th step."""
    for module in (gradient, apgd, query, boundary):
        monkeypatch.setattr(module, "looks", lambda step, device: (step + 1) % every == 0)
    for module in (budgets, goals):
        monkeypatch.setattr(module, "waits", lambda device: True)


NEVER = 10**6
SEARCHES: list[tuple[ImageAttack, PixelBudget]] = [
    (PGD(steps=24, step=0.05), BUDGET),
    (PGD(steps=24, step=0.05, momentum=0.9), ROUND),
    (PGD(steps=24, step=0.05), SPARSE),
    (APGD(steps=25), BUDGET),
    (APGD(steps=25, loss=DLR()), ROUND),
    (APGD(steps=25), SPARSE),
    (EOT(PGD(steps=24), 2), BUDGET),
    (FAB(steps=24, targets=2), BUDGET),
    (FAB(steps=24, targets=None), ROUND),
    (FAB(steps=24, targets=1, restarts=2), SPARSE),
    (DeepFool(steps=24, candidates=4), BUDGET),
    (CarliniWagner(steps=24, searches=2, rate=0.001, constant=1.0), ROUND),
    (Square(queries=24), BUDGET),
    (Square(queries=24), ROUND),
    (RayS(queries=24), Linf(0.05)),
]


def waiting(attack: ImageAttack, budget: PixelBudget, ends: bool) -> int:
    """How often the program would wait, at a victim whom nobody beats, so that all go to the end."""
    images, net = middle(4), soft(0, 5)
    labels = net(images).argmax(1)
    far = 20.0 * F.one_hot(labels, 5)
    with Waits() as counted:
        attack(lambda images: net(images) + far[: len(images)], images, Untargeted(labels, ends=ends), budget)
    return sum(counted.seen.values())


@pytest.mark.parametrize(("attack", "budget"), SEARCHES, ids=str)
@pytest.mark.parametrize("ends", [True, False])
def test_a_search_waits_only_where_it_looks(
    attack: ImageAttack, budget: PixelBudget, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, short, more = {}, with_fields(attack, steps=16, queries=16), 24
    if isinstance(attack, CarliniWagner) or (isinstance(attack, APGD) and isinstance(budget, L1)):
        # Of fewer steps the first does not take all, and the other waits at checkpoints: 24 for 25 and for 50 steps.
        short, more = attack, 50
    for every in (1, 6, NEVER):
        accelerated(monkeypatch, every)
        waits[every] = waiting(short, budget, ends)
    assert waits[1] - waits[NEVER] >= 10, "the test would not see a wait in each step"
    assert waits[6] - waits[NEVER] <= (waits[1] - waits[NEVER]) / 4
    longer = with_fields(attack, steps=more, queries=more)
    assert waiting(longer, budget, ends) == waits[NEVER], "before the first step and after the last one"


LATE = CarliniWagner(steps=60, searches=3, constant=0.1)  # images that have won within the budget would come nearer


@pytest.mark.parametrize(("attack", "budget"), [*SEARCHES, (LATE, ROUND)], ids=str)
@pytest.mark.parametrize("ends", [True, False])
def test_when_it_looks_changes_no_image(
    attack: ImageAttack, budget: PixelBudget, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, net = middle(24), soft(0, 10)
    goal = Untargeted(net(images).argmax(1), ends=ends)
    here = attack.craft(net, images, goal, budget)
    assert bool(goal.won(net(here.images)).any())
    for every in (3, NEVER):
        accelerated(monkeypatch, every)
        there = attack.craft(net, images, goal, budget)
        assert torch.allclose(here.images, there.images, atol=1e-6)
        assert torch.equal(goal.won(net(here.images)), goal.won(net(there.images)))
        assert here.won is None or (there.won is not None and torch.equal(here.won, there.won))


@pytest.mark.parametrize("attack", [FAB(steps=20, targets=2), FAB(steps=9, targets=None), DeepFool()], ids=str)
def test_when_it_looks_changes_no_distance(attack: BoundaryAttack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has left keeps the distance that it left with, though it is asked about until somebody looks."""
    images, net = middle(24), soft()
    labels = net(images).argmax(1)
    here, near = attack.nearest(net, images, labels, ROUND)
    accelerated(monkeypatch, 7)
    there, far = attack.nearest(net, images, labels, ROUND)
    assert bool(near.isfinite().all()) and torch.allclose(near, far, atol=1e-6)
    assert torch.allclose(here, there, atol=1e-6)


@pytest.mark.parametrize("boxed", [True, False])
def test_where_nobody_looks_a_projection_is_as_near_and_never_outside(
    boxed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes of all sizes, from some that are inside already to some a thousand times too large."""
    sizes = torch.logspace(-3, 3, 32)[:, None, None, None]
    delta, eps = sizes * normal(by_position(32), (3, 8, 8)), 3.0
    room = 0.02 + delta.abs().sqrt() if boxed else None
    exact = budgets._soften(delta, eps, room)
    monkeypatch.setattr(budgets, "waits", lambda device: True)
    assert torch.allclose(budgets._soften(delta, eps, room), exact, atol=1e-6)
    for rounds in (1, 2, 3):
        monkeypatch.setattr(budgets, "SOFTEN", rounds)
        early = budgets._soften(delta, eps, room)
        assert bool((early.abs().flatten(1).sum(1) <= eps * (1 + 1e-5)).all())
        assert room is None or bool((early.abs() <= room).all())
    assert not torch.allclose(early, exact, atol=1e-2), "three rounds are not enough for all"


def test_where_nobody_looks_a_level_is_that_of_many_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, limits = normal(by_position(64), (500,)).abs(), normal(by_position(64) + 99, (500,)).exp()
    full = weights * limits
    wanted = full.sum(1) * torch.linspace(0.01, 1.1, 64)
    exact = budgets._level(weights, limits, full, wanted)
    reached = (weights * torch.minimum(exact[:, None], limits)).sum(1)
    assert torch.allclose(reached, torch.minimum(wanted, full.sum(1)), rtol=1e-4) and bool(exact.isinf().any())
    monkeypatch.setattr(budgets, "waits", lambda device: True)
    assert torch.allclose(budgets._level(weights, limits, full, wanted), exact)


def test_an_accelerator_is_looked_at_early_and_then_every_eighth_step() -> None:
    steps = [step + 1 for step in range(32) if device.looks(step, torch.device("cuda"))]
    assert steps == [1, 2, 4, 8, 16, 24, 32]
    assert all(device.looks(step, torch.device("cpu")) for step in range(20))


def test_a_number_that_is_not_finite_is_said_though_nobody_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single NaN in the middle of a search, at a step after which nobody looks."""
    accelerated(monkeypatch, NEVER)
    images, net, asked = middle(4), soft(), [0]

    def broken(images: Tensor) -> Tensor:
        asked[0] += 1
        return net(images) * (float("nan") if asked[0] == 3 else 1.0)

    goal: Goal = Untargeted(net(images).argmax(1))
    last = PGD(steps=6, best=False, stop=False)
    some: tuple[ImageAttack, ...] = (PGD(steps=6), APGD(steps=6), Square(queries=6), last, FAB(steps=6), DeepFool(6))
    for attack in (*some, RayS(queries=6), CarliniWagner(steps=6, searches=1)):
        asked[0] = 0
        with pytest.raises(CrossguardError, match="not finite"):
            attack(broken, images, goal, L2(1e-4) if isinstance(attack, CarliniWagner) else Linf(1e-4))


def test_words_of_the_new_names_round_trip() -> None:
    import crossguard

    for text in ("PredictedLabel(attack=PGD(steps=3))", "FAB(targets=None, restarts=5)", "Worst(attacks=(PGD(),))"):
        word = crossguard.build(text)
        assert crossguard.build(crossguard.show(word)) == word
    for gone in ("OwnAnswer", "ByWayOf"):
        assert gone not in crossguard.VOCABULARY
