"""APGD against the code of its authors and closed forms, and the L1 budget against brute force."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from crossguard import APGD, DLR, L1, L2, PGD, CrossguardError, Drift, Linf, Margin, Targeted, Untargeted
from crossguard.attacks.apgd import _Dense
from crossguard.attacks.base import ImageVictim, Queries
from crossguard.budgets import PixelBudget
from crossguard.goals import Goal, Loss, Towards, margin
from crossguard.seeds import by_position, fold, normal, uniform
from crossguard.testing import LinearVictim, check_attack

CLEAN = 0.4 + 0.2 * uniform(by_position(16), (3, 6, 6))  # far from the borders of the pixel range


def convnet(seed: int) -> torch.nn.Module:
    """A small network with random weights of natural size; it has no clean accuracy, but all the kinks of a ReLU."""
    torch.manual_seed(seed)
    layers: list[torch.nn.Module] = [
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 16, 3, stride=2, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 9, 10),
    ]
    for layer in layers:
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.weight[0].numel()))
    return torch.nn.Sequential(*layers).eval().requires_grad_(False)


# The authors' code


@dataclasses.dataclass(frozen=True)
class Case:
    budget: Linf | L2 | L1
    loss: str
    large: bool = False

    @property
    def norm(self) -> str:
        return type(self.budget).__name__

    @property
    def ours(self) -> APGD:
        return APGD(loss=None if self.loss == "ce" else DLR(), large_eps=self.large)

    def noise(self, seeds: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """What our start is made of, in the place of the reference's draw."""
        return uniform(seeds, shape[1:]) if self.norm == "Linf" else normal(fold(seeds, 1), shape[1:])

    def reference(self, net: torch.nn.Module) -> Any:
        apgd = pytest.importorskip("pyautoattack.autopgd_base")
        settings = {"n_iter": 100, "norm": self.norm, "eps": self.budget.eps, "use_largereps": self.large}
        if self.loss == "dlr-targeted":
            return apgd.APGDAttack_targeted(net, **settings)
        return apgd.APGDAttack(net, loss=self.loss, **settings)


CASES = [
    *(Case(budget, loss) for budget in (Linf(0.02), L2(0.4), L1(1.5)) for loss in ("ce", "dlr", "dlr-targeted")),
    *(Case(L1(2.0), loss, large=True) for loss in ("ce", "dlr-targeted")),
]


@dataclasses.dataclass(frozen=True)
class Further(Untargeted):
    """What stands is returned at the highest loss, as the authors' code does, and not at the largest margin."""

    def merit(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.loss(outputs)


@dataclasses.dataclass(frozen=True)
class Nearer(Towards):
    def merit(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.loss(outputs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outcomes_equal_those_of_the_authors_code(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    net = convnet(3)
    seeds = by_position(64) + 7
    images = uniform(seeds, (3, 12, 12))  # up to the borders of the pixel range
    logits = net(images)
    labels, targets = logits.argmax(1), logits.argsort(1, descending=True)[:, 2]
    reference = case.reference(net)
    reference.init_hyperparam(images)
    reference.y_target = targets
    noise = case.noise(seeds, images.shape)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda shape: noise.clone())
        patch.setattr(torch, "randn", lambda shape: noise.clone())
        patch.setattr(torch, "randn_like", lambda images: noise.clone())
        if case.large:
            eps = case.budget.eps
            _, right, best, _ = reference.decr_eps_pgd(images, labels, [3 * eps, 2 * eps, eps], [30, 30, 40])
            # The reference counts as changed what only rounding moved; from its own start the outcomes are the same.
            project = pytest.importorskip("pyautoattack.autopgd_base").L1_projection
            start = images + noise
            for _ in range(2):
                start = start + project(images, start - images, 3 * eps)
            patch.setattr(L1, "surface", lambda self, seeds, like: start[seeds - 7] - like)
        else:
            _, right, best, _ = reference.attack_single_run(images, labels)
        goal: Goal = Nearer(labels, targets) if case.loss == "dlr-targeted" else Further(labels)
        made = case.ours(net, images, goal, case.budget, seeds)
    case.budget.check(made, images)
    standing = net(made).argmax(1) == labels
    assert 2 < int(standing.sum()) < 62, "the comparison needs both kinds"
    assert torch.equal(standing, right.bool())
    climbed = goal if case.ours.loss is None else goal.climbing(case.ours.loss)
    reached = climbed.loss(net(made))
    reached = F.softplus(reached) if case.loss == "ce" else reached  # cross-entropy of log-odds
    same = (reached - best.detach()).abs() < 1e-4
    assert float(same[standing].float().mean()) > 0.8, "and so, but for rounding, is the best loss of what stands"


def test_checkpoints_are_those_of_the_paper() -> None:
    rows = torch.arange(1)
    climb = _Dense(rows, CLEAN[:1], CLEAN[:1], Linf(0.1), 0.75)
    assert list(climb.checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert climb.checkpoints(100)[41] == 19
    assert list(climb.checkpoints(10)) == [2, 3, 4, 5, 6, 7, 8, 9]
    assert climb.checkpoints(1) == {}


# Oracles


@pytest.mark.parametrize(
    ("budget", "dual", "share"), [(Linf(0.03), 1.0, 0.999), (L2(0.3), 2.0, 0.999), (L1(0.3), math.inf, 0.95)], ids=str
)
def test_it_reaches_the_best_loss_of_a_linear_victim_and_never_passes_it(
    budget: PixelBudget, dual: float, share: float
) -> None:
    victim = LinearVictim(2)
    labels = victim(CLEAN).argmax(1).detach()
    clean = margin(victim(CLEAN), labels).detach()
    most = budget.eps * float((victim.weight[1] - victim.weight[0]).detach().norm(p=dual))
    for stop in (True, False):
        made = APGD(loss=Margin(), stop=stop)(victim, CLEAN, Untargeted(labels).lasting(), budget)
        fallen = clean - margin(victim(made), labels).detach()
        assert bool((fallen <= most + 1e-4).all())
        assert bool((fallen >= share * most).all())


def test_it_beats_exactly_the_images_within_reach_of_the_boundary() -> None:
    victim, budget = LinearVictim(2), Linf(0.02)
    images = 0.4 + 0.2 * uniform(by_position(64), (3, 6, 6))
    labels = victim(images).argmax(1).detach()
    distance = margin(victim(images), labels) / (victim.weight[1] - victim.weight[0]).abs().sum()
    beaten = victim(APGD(steps=30)(victim, images, Untargeted(labels), budget)).argmax(1) != labels
    assert 5 < int(beaten.sum()) < 59, "the oracle needs both kinds"
    assert torch.equal(beaten, distance < budget.eps)


@pytest.mark.parametrize("budget", [Linf(0.2), L2(3.0), L1(20.0)], ids=str)
def test_a_targeted_goal_reaches_its_target(budget: PixelBudget) -> None:
    victim = LinearVictim(4)
    targets = (victim(CLEAN).argmax(1) + 2) % 4
    for loss in (None, Margin()):
        made = APGD(steps=40, loss=loss)(victim, CLEAN, Targeted(targets), budget)
        assert torch.equal(victim(made).argmax(1), targets)


@pytest.mark.parametrize("budget", [Linf(0.1), L2(1.0), L1(2.0)], ids=str)
def test_a_goal_without_labels_drifts(budget: PixelBudget) -> None:
    def embed(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :16] - 0.5

    goal = Drift(embed(CLEAN))
    start = goal.loss(embed((CLEAN + budget.surface(by_position(16), CLEAN)).clamp(0, 1)))
    drift = goal.loss(embed(APGD(steps=30)(embed, CLEAN, goal, budget)))
    assert bool((drift > start).all()) and float(drift.mean()) > 1.5 * float(start.mean())
    with pytest.raises(CrossguardError, match="its own"):
        APGD(loss=DLR())(embed, CLEAN, goal, budget)


# What makes an attack weak by accident


@pytest.mark.parametrize(
    "attack",
    [
        APGD(steps=1),
        APGD(steps=7, random_start=False),
        APGD(steps=10, restarts=2, loss=DLR()),
        APGD(steps=20, stop=False),
        APGD(steps=30, loss=Margin()),
    ],
    ids=str,
)
def test_contract_of_the_settings(attack: APGD) -> None:
    check_attack(attack)


@pytest.mark.parametrize(
    "case", [Case(Linf(0.02), "ce"), Case(L2(0.2), "dlr"), Case(L1(1.0), "ce", large=True)], ids=str
)
def test_leaving_the_batch_changes_nobody(case: Case) -> None:
    """Images that still stand end where they do when nobody may leave, and so do single images."""
    net = convnet(5)
    seeds = by_position(48) + 7
    images = uniform(seeds, (3, 12, 12))
    labels = net(images).argmax(1)
    goal, attack = Untargeted(labels), dataclasses.replace(case.ours, steps=40)
    made = attack(net, images, goal, case.budget, seeds)
    beaten = net(made).argmax(1) != labels
    stubborn = dataclasses.replace(attack, stop=False)(net, images, goal, case.budget, seeds)
    assert 4 < int(beaten.sum()) < 44
    assert torch.equal(net(stubborn).argmax(1) != labels, beaten)
    assert float((made - stubborn)[~beaten].abs().max()) < 1e-2 * case.budget.eps
    some = (~beaten).nonzero()[:3, 0]
    alone = attack(net, images[some], goal.at(some), case.budget, seeds[some])
    assert torch.allclose(alone, made[some], atol=1e-2 * case.budget.eps)


def test_a_beaten_image_costs_nothing_more_and_a_standing_one_every_step() -> None:
    victim = LinearVictim(2)
    images = 0.4 + 0.2 * uniform(by_position(64), (3, 6, 6))
    labels = victim(images).argmax(1).detach()
    queries = Queries.none(64)
    made = APGD(steps=20, restarts=2)(ImageVictim(victim, queries), images, Untargeted(labels), Linf(0.02))
    beaten = victim(made).argmax(1) != labels
    assert bool((queries.gradients[~beaten] == 40).all()) and bool((queries.forwards[~beaten] == 2).all())
    assert int(queries.gradients[beaten].max()) < 20
    for attack, budget in ((APGD(steps=20), Linf(0.2)), (APGD(steps=20, large_eps=True), L1(5.0))):
        endless = Queries.none(64)
        attack(ImageVictim(victim, endless), images, Untargeted(labels).lasting(), budget)
        assert bool((endless.gradients == 20).all())


def test_a_win_outside_the_budget_is_no_win() -> None:
    """Within three times the budget every image falls, within the budget none can."""
    victim = LinearVictim(2)
    labels = victim(CLEAN).argmax(1).detach()
    distance = margin(victim(CLEAN), labels).detach() / (victim.weight[1] - victim.weight[0]).detach().abs().max()
    near = (distance < 2.0 * distance.min()).nonzero()[:, 0]
    budget = L1(0.9 * float(distance.min()))
    made = APGD(steps=20, large_eps=True)(victim, CLEAN[near], Untargeted(labels[near]), budget)
    budget.check(made, CLEAN[near])
    assert torch.equal(victim(made).argmax(1), labels[near])
    fallen = margin(victim(CLEAN[near]), labels[near]) - margin(victim(made), labels[near])
    assert bool((fallen > 0).all())


def test_more_restarts_and_more_steps_never_weaken() -> None:
    net = convnet(1)
    images = uniform(by_position(32), (3, 12, 12))
    goal, budget = Untargeted(net(images).argmax(1)).lasting(), Linf(0.02)

    def merit(attack: APGD | PGD) -> torch.Tensor:
        return goal.merit(net(attack(net, images, goal, budget)))

    once, thrice = merit(APGD(steps=10)), merit(APGD(steps=10, restarts=3))
    assert bool((thrice >= once - 1e-6).all())
    assert bool((thrice > once + 1e-6).any()), "the restarts start elsewhere"
    assert float((merit(APGD(steps=40)) - merit(PGD(steps=40, step=0.1, stop=False))).mean()) > -1e-3


def test_a_vanishing_gradient_still_takes_whole_steps() -> None:
    """Cross-entropy of a sure model has a gradient of 1e-20; its direction is as good as any."""
    victim = LinearVictim(2)
    labels = victim(CLEAN).argmax(1).detach()

    def sure(images: torch.Tensor) -> torch.Tensor:
        return 1e-20 * victim(images)

    for budget in (Linf(0.03), L2(0.3), L1(0.3)):
        goal = Untargeted(labels).lasting().climbing(Margin())
        faint = APGD(steps=30)(sure, CLEAN, goal, budget)
        plain = APGD(steps=30)(victim, CLEAN, goal, budget)
        assert torch.allclose(margin(victim(faint), labels), margin(victim(plain), labels), atol=1e-3)


def test_steps_shrink_where_the_loss_stops_rising_and_the_search_returns_to_the_best_point() -> None:
    climb = _Dense(torch.arange(2), CLEAN[:2], CLEAN[:2], Linf(0.1), 0.75)
    gradient = torch.ones_like(CLEAN[:2])
    climb.hear(gradient, torch.tensor([0.0, 0.0]))
    first = climb.images
    for loss in (1.0, 2.0, 3.0, 4.0):
        climb.move()
        climb.hear(gradient * loss, torch.tensor([-loss, loss]))
    last = climb.images
    climb.check(4)
    assert climb.length.tolist() == pytest.approx([0.1, 0.2])
    assert torch.equal(climb.images[0], first[0]) and torch.equal(climb.images[1], last[1])
    assert float(climb.gradient[0].max()) == 1.0 and float(climb.gradient[1].max()) == 4.0
    climb.hear(gradient, torch.tensor([-1.0, 4.0]))  # no new best for the second image, which was not halved just now
    climb.rises += 4
    climb.check(4)
    assert climb.length.tolist() == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: APGD(steps=0), "does nothing"),
        (lambda: APGD(restarts=0), "give 1 or more"),
        (lambda: APGD(rho=1.5), "between 0 and 1"),
        (lambda: APGD(steps=4, large_eps=True), "give 5 or more"),
        (
            lambda: APGD(large_eps=True)(LinearVictim(2), CLEAN, Untargeted(torch.zeros(16).long()), L2(1.0)),
            "needs an L1 budget",
        ),
        (lambda: L1(-1.0), "12 is usual"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(CrossguardError, match=message):
        make()


# The L1 budget


def nearest(point: torch.Tensor, low: torch.Tensor, high: torch.Tensor, eps: float) -> torch.Tensor:
    """The nearest point of a box and an L1 ball to one vector, by bisection in double precision."""

    def soft(threshold: float) -> torch.Tensor:
        return torch.minimum(torch.maximum(point.sign() * (point.abs() - threshold).clamp_min(0), low), high)

    if float(soft(0.0).abs().sum()) <= eps:
        return soft(0.0)
    below, above = 0.0, float(point.abs().max())
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if float(soft(middle).abs().sum()) > eps else (below, middle)
    return soft(above)


@pytest.mark.parametrize("eps", [0.001, 0.5, 3.0, 12.0, 60.0])
@pytest.mark.parametrize("scale", [0.01, 0.3, 5.0])
def test_l1_projects_onto_ball_and_box_exactly(eps: float, scale: float) -> None:
    seeds = by_position(24)
    clean = uniform(seeds, (3, 8, 8))
    clean[:, 0] = clean[:, 0].round()  # pixels on the border have no room at all on one side
    moved = clean + scale * normal(seeds + 100, (3, 8, 8))
    budget = L1(eps)
    made, ball = budget.project(moved, clean), budget.shrink(moved - clean)
    budget.check(made, clean)
    for image in range(24):
        point, here = (moved - clean)[image].double(), clean[image].double()
        assert torch.allclose((made - clean)[image].double(), nearest(point, -here, 1 - here, eps), atol=2e-6)
        far = torch.full_like(here, torch.inf)
        assert torch.allclose(ball[image].double(), nearest(point, -far, far, eps), atol=2e-6)
    assert torch.equal(budget.project(clean, clean), clean)
    single = torch.cat([budget.project(moved[i : i + 1], clean[i : i + 1]) for i in range(24)])
    assert torch.equal(single, made), "an image's projection depends on its batch"


def test_no_point_of_ball_and_box_is_nearer_than_the_projection() -> None:
    """The variational inequality of a projection, on points drawn from the set itself."""
    budget, seeds = L1(2.0), by_position(8)
    clean = uniform(seeds, (3, 6, 6))
    moved = clean + 0.4 * normal(seeds + 1, (3, 6, 6))
    made = budget.project(moved, clean)
    for trial in range(200):
        other = budget.project(clean + normal(fold(seeds, trial), (3, 6, 6)), clean)
        assert float(((moved - made) * (other - made)).flatten(1).sum(1).max()) < 1e-4


def test_l1_spends_its_budget_where_a_clamp_after_the_ball_would_not() -> None:
    budget, clean = L1(6.0), torch.full((1, 3, 4, 4), 0.9)
    moved = clean + 2.0
    assert float(budget.size(budget.project(moved, clean) - clean)) == pytest.approx(48 * 0.1, rel=1e-5)
    moved[0, 0] = 0.0
    made = budget.project(moved, clean)
    assert float(budget.size(made - clean)) == pytest.approx(6.0, rel=1e-5)


def test_l1_steps_along_the_largest_coordinates() -> None:
    gradient = normal(by_position(6), (3, 10, 10))
    gradient[5] = 0.0
    for density, count in ((0.01, 3), (0.2, 60), (1.0, 300), (0.0, 1)):
        step = L1(1.0).ascent(gradient, density)
        assert step[:5].ne(0).flatten(1).sum(1).tolist() == [count] * 5
        assert torch.allclose(step[:5].abs().flatten(1).sum(1), torch.ones(5), atol=1e-5)
        assert not step[5].any(), "no gradient, no step"
        taken, left = step[:5].ne(0), gradient[:5].abs()
        assert float(left.masked_fill(~taken, 9.0).amin()) > 0
        for image in range(5):
            rest = left[image][~taken[image]]
            assert not len(rest) or float(left[image][taken[image]].min()) >= float(rest.max())
            assert torch.equal(step[image].sign()[taken[image]], gradient[image].sign()[taken[image]])
    each = torch.tensor([0.01, 0.2, 1.0, 0.5, 0.1, 0.3])
    assert L1(1.0).ascent(gradient, each).ne(0).flatten(1).sum(1).tolist() == [3, 60, 300, 150, 30, 0]
    assert torch.equal(L1(1.0).ascent(gradient), L1(1.0).ascent(gradient, 0.01))
    assert L1(20.0).ascent(gradient)[:5].ne(0).flatten(1).sum(1).tolist() == [40] * 5


def test_l1_noise() -> None:
    seeds = by_position(400)
    like = uniform(seeds, (3, 4, 4))
    drawn = L1(5.0).sample(seeds, like)
    size = L1(5.0).size(drawn)
    assert float(size.max()) <= 5.0 * (1 + 1e-5)
    # Uniform in a ball of dimension 48: (size / eps)^48 is uniform, and every coordinate alike in both directions.
    assert float((size / 5.0).pow(48).mean()) == pytest.approx(0.5, abs=0.05)
    assert float(drawn.mean()) == pytest.approx(0.0, abs=0.005)
    assert float(drawn.abs().flatten(1).mean(0).std() / drawn.abs().mean()) < 0.1
    start = L1(5.0).surface(seeds, like)
    assert torch.allclose(L1(5.0).size(start), torch.full((400,), 5.0), atol=1e-3)
    assert float((like + start).min()) >= -1e-6 and float((like + start).max()) <= 1 + 1e-6
    assert torch.equal(L1(5.0).surface(seeds[3:4], like[3:4]), start[3:4])


@pytest.mark.parametrize("size", [32, 224])
def test_l1_is_checked_within_rounding_and_no_further(size: int) -> None:
    budget, clean = L1(12.0), uniform(by_position(2), (3, size, size))
    for moved in (clean + 0.1 * normal(by_position(2), (3, size, size)), clean + budget.sample(by_position(2), clean)):
        budget.check(budget.project(moved, clean), clean)
    too_far = clean.clone()
    too_far[:, 0, :4, :6] = 1.0 - too_far[:, 0, :4, :6].round()
    far = float(budget.size(too_far - clean).max())
    with pytest.raises(CrossguardError, match="broke its budget"):
        L1(far - 0.02).check(too_far, clean)
    L1(far).check(too_far, clean)


def test_losses_are_words_of_the_attack() -> None:
    loss: Loss = DLR()
    assert APGD(loss=loss) == APGD(loss=DLR()) != APGD()
