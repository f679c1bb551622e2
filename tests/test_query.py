"""Query attacks against closed forms, against plain loops and, where it is installed, against AutoAttack's own code."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import crossguard
from crossguard import DLR, L2, CrossEntropy, CrossguardError, Drift, Linf, Margin, RayS, Square, Targeted, Untargeted
from crossguard.attacks.base import ImageAttack, ImageVictim, Queries
from crossguard.attacks.query import _bump
from crossguard.goals import margin
from crossguard.seeds import by_position, drawn, normal, uniform
from crossguard.testing import LinearVictim, check_attack
from toys import middle

BUDGETS = [Linf(0.02), L2(0.25)]


def asked(
    attack: ImageAttack, victim, images: torch.Tensor, goal, budget: Linf | L2
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adversarial images and the number of questions about each."""
    queries = Queries.none(len(images))
    made = attack(ImageVictim(victim, queries), images, goal, budget)
    assert not bool(queries.gradients.any()), "a query attack asked for a gradient"
    return made, queries.forwards


class Listener:
    """A victim that remembers every picture it was shown; its answer is the same for all, unless another is given."""

    def __init__(self, answer: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self.heard: list[torch.Tensor] = []
        self.answer = answer or (lambda images: torch.tensor([1.0, 0.0]).repeat(len(images), 1))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled() and not images.requires_grad, "a black box has no gradient"
        self.heard.append(images.clone())
        return self.answer(images).detach()


# The contract


@pytest.mark.parametrize(
    "attack",
    [Square(queries=80), Square(queries=80, p=0.3, rescale=True, loss=DLR()), RayS(queries=200)],
    ids=str,
)
def test_contract(attack: ImageAttack) -> None:
    check_attack(attack)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("attack", [Square(queries=150), RayS(queries=300)], ids=str)
def test_who_leaves_does_not_disturb_who_stays(attack: ImageAttack, budget: Linf | L2) -> None:
    """Images leave at different times; with a random victim, that each keeps its own noise shows as well."""
    if not isinstance(budget, attack.norms):
        return
    victim, images = LinearVictim(3), middle(24)
    labels, seeds = victim(images).argmax(1).detach(), by_position(24) + 7

    def noisy(images: torch.Tensor) -> torch.Tensor:
        return victim(images) + 0.05 * normal(drawn(len(images)), (3,))

    for answer in (victim, noisy):
        made = attack(answer, images, Untargeted(labels), budget, seeds)
        some = torch.tensor([17, 3, 11, 5])
        again = attack(answer, images[some], Untargeted(labels[some]), budget, seeds[some])
        assert torch.allclose(again, made[some], atol=1e-6)
    beaten = victim(attack(victim, images, Untargeted(labels), budget, seeds)).argmax(1) != labels
    assert 0 < int(beaten.sum()) < 24, "the test needs both kinds"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Square(queries=0), "asks nothing"),
        (lambda: RayS(queries=0), "asks nothing"),
        (lambda: Square(p=0.0), "no share"),
        (lambda: Square(p=1.5), "no share"),
        (lambda: RayS()(Listener(), middle(1), Untargeted(torch.tensor([0])), L2(0.5)), "Linf"),
        (lambda: RayS()(Listener(), middle(1), Drift(torch.ones(1, 2)), Linf(0.1)), "never says so"),
        (lambda: RayS()(Listener(), middle(1), Drift(torch.ones(1, 2)).lasting(), Linf(0.1)), "never says so"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(CrossguardError, match=message):
        make()


@pytest.mark.parametrize("attack", [Square(), RayS()], ids=str)
def test_a_victim_that_answers_nan_is_refused(attack: ImageAttack) -> None:
    """NaN is never larger, so that a search would stand still; and its argmax is a class, so that it would look won."""

    def broken(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :2] * float("nan")

    with pytest.raises(CrossguardError, match="not finite"):
        attack(broken, middle(2), Untargeted(torch.tensor([0, 1])), Linf(0.1))


# Square on linear victims


@pytest.mark.parametrize(("budget", "dual", "share"), [(Linf(0.02), 1, 0.9), (L2(0.5), 2, 0.45)], ids=str)
def test_square_beats_what_is_near_the_boundary_and_nothing_beyond_it(
    budget: Linf | L2, dual: int, share: float
) -> None:
    victim, images = LinearVictim(2), middle(64)
    labels = victim(images).argmax(1).detach()
    distance = margin(victim(images), labels).detach() / (victim.weight[1] - victim.weight[0]).norm(p=dual).detach()
    made, questions = asked(Square(queries=1000, rescale=True), victim, images, Untargeted(labels), budget)
    budget.check(made, images)
    beaten = victim(made).argmax(1) != labels
    assert 5 < int((distance < share * budget.eps).sum()) < 59, "the oracle needs both kinds"
    assert bool(beaten[distance < share * budget.eps].all())
    assert not bool(beaten[distance > budget.eps].any())
    assert bool((questions[~beaten] == 1000).all()), "a standing image gets every question, the start included"
    assert int(questions[beaten].min()) < 100, "a beaten image leaves"


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_square_goes_on_where_the_goal_is_endless(budget: Linf | L2) -> None:
    victim, images = LinearVictim(2), middle(8)
    labels = victim(images).argmax(1).detach()
    attack = Square(queries=200)
    ended, few = asked(attack, victim, images, Untargeted(labels), Linf(0.2))
    made, all_of_them = asked(attack, victim, images, Untargeted(labels).lasting(), Linf(0.2))
    assert bool((few < 200).all()) and bool((all_of_them == 200).all())
    assert bool((margin(victim(made), labels) < margin(victim(ended), labels) - 1.0).all())


@pytest.mark.parametrize("budget", [Linf(0.1), L2(0.4)], ids=str)
def test_square_reaches_a_target_and_drifts(budget: Linf | L2) -> None:
    victim, images = LinearVictim(4), middle(8)
    targets = (victim(images).argmax(1) + 2) % 4
    reached = victim(Square(queries=800, rescale=True)(victim, images, Targeted(targets), L2(3.0))).argmax(1)
    assert torch.equal(reached, targets)

    def embed(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :16] - 0.5

    goal = Drift(embed(images))
    for drifting in (goal, goal.lasting()):
        made, questions = asked(Square(queries=200, rescale=True), embed, images, drifting, budget)
        started, _ = asked(Square(queries=1), embed, images, drifting, budget)
        assert bool((questions == 200).all())
        assert bool((goal.loss(embed(made)) > 1.5 * goal.loss(embed(started))).all())


def test_square_climbs_the_margin_unless_told_otherwise() -> None:
    victim, images = LinearVictim(6), middle(16)
    labels = victim(images).argmax(1).detach()

    def left(attack: Square, goal: Untargeted) -> torch.Tensor:
        return attack(victim, images, goal, Linf(0.01))

    plain = left(Square(queries=60), Untargeted(labels))
    assert torch.equal(plain, left(Square(queries=60), Untargeted(labels, CrossEntropy())))
    assert torch.equal(plain, left(Square(queries=60, loss=Margin()), Untargeted(labels, DLR())))
    assert not torch.equal(plain, left(Square(queries=60, loss=CrossEntropy()), Untargeted(labels)))


# What Square shows its victim


def proposals(budget: Linf | L2, height: int, width: int, queries: int = 260) -> tuple[torch.Tensor, torch.Tensor]:
    """The start, and every image shown later to a victim on which nothing is ever better: (queries, n, 3, h, w)."""
    victim, images = Listener(), middle(6, height, width)
    Square(queries=queries)(victim, images, Untargeted(torch.zeros(6, dtype=torch.int64)), budget)
    delta = torch.stack(victim.heard) - images
    return delta[0], delta[1:]


def test_square_starts_with_stripes_and_changes_one_square() -> None:
    start, later = proposals(Linf(0.05), 10, 16)
    assert torch.allclose(start.abs(), torch.tensor(0.05), atol=1e-6)
    assert torch.equal(start.sign(), start[:, :, :1].expand_as(start).sign()), "columns of one sign"
    assert 0.3 < float((start[:, :, 0] > 0).float().mean()) < 0.7
    assert not torch.equal(start[0].sign(), start[1].sign()), "every sample has stripes of its own"
    assert torch.allclose(later.abs(), torch.tensor(0.05), atol=1e-6), "at the corners of the budget, always"
    changed = (later - start).abs() > 0.01
    places = set()
    for question in (0, 10, 11, 60, 120, 250):
        side = min(round(math.sqrt(0.8 / {0: 1, 10: 1, 11: 2, 60: 4, 120: 4, 250: 8}[question] * 160)), 10)
        seen = 0
        for sample in range(6):
            rows, columns = (changed[question, sample].any(0).any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
            if rows:
                places.add((question, rows[0], columns[0]))
                seen = max(seen, rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
                assert len(rows) <= side and columns[-1] - columns[0] < side
        assert seen == side or question == 0
    assert len(places) > 25, "every sample has places of its own"
    # In a square the sign of a channel is one.
    last = (later[250, 0].sign() * changed[250, 0])[1]
    assert last.unique().numel() <= 2


@pytest.mark.parametrize(("height", "width"), [(5, 9), (9, 5), (2, 2), (1, 1), (1, 7)])
@pytest.mark.parametrize("budget", [Linf(0.05), L2(0.4)], ids=str)
def test_square_reaches_every_pixel_of_every_shape(budget: Linf | L2, height: int, width: int) -> None:
    start, later = proposals(budget, height, width)
    assert bool(torch.isfinite(later).all())
    moved = ((later - start).abs() > 1e-4).flatten(0, 1).any(0)
    assert bool(moved.all()), "a pixel is never changed"
    corner = ((later - start).abs() > 1e-4)[:, :, :, -1, -1].any(2).float().mean()
    assert float(corner) > 0.01


def test_square_in_l2_spends_the_whole_budget_and_moves_energy_only_between_two_squares() -> None:
    start, later = proposals(L2(0.5), 12, 12)
    assert torch.allclose(start.flatten(1).norm(dim=1), torch.tensor(0.5), atol=1e-5)
    assert torch.allclose(later.flatten(2).norm(dim=2), torch.tensor(0.5), atol=1e-4)
    signs = start.unfold(2, 2, 2).unfold(3, 2, 2)[:, :, 1, 1]  # in a bump of 2 x 2, half is up and half is down
    assert float(signs.sum((2, 3)).abs().max()) < 1e-6
    assert float(signs.std((2, 3)).min()) > 0.01
    side = 5  # round(sqrt(0.8 / 8 * 144)) = 4, made odd
    differs = ((later[220:] - start).abs() > 1e-6).any(2)
    assert float(differs.flatten(2).sum(2).max()) <= 2 * side**2
    assert float(differs.flatten(2).sum(2).float().mean()) > side**2
    assert len({tuple(mask.nonzero()[0].tolist()) for mask in differs[0]}) > 1, "every sample has places of its own"


def test_square_keeps_what_is_better_and_nothing_else() -> None:
    """Each picture shown differs in one square from the best one so far."""
    linear = LinearVictim(2)
    victim, images = Listener(linear), middle(1)
    labels = linear(images).argmax(1).detach()
    made = Square(queries=100)(victim, images, Untargeted(labels), Linf(0.01))
    margins = torch.cat([margin(linear(shown), labels).detach() for shown in victim.heard])
    assert len(margins) == 100
    assert float(margin(linear(made), labels).detach()) == pytest.approx(float(margins.min()), abs=1e-6)
    best = victim.heard[0]
    for shown, left in zip(victim.heard[1:], margins[1:], strict=True):
        changed = ((shown - best).abs() > 1e-4).any(1)[0]
        rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        assert not len(rows) or (int(rows[-1] - rows[0]) < 5 and int(columns[-1] - columns[0]) < 5)
        best = shown if left < margin(linear(best), labels) else best


# Square beside AutoAttack's code


def test_the_schedule_and_the_bumps_are_those_of_the_reference() -> None:
    square = pytest.importorskip("pyautoattack.square")
    for queries, rescale in ((5000, False), (10000, False), (700, True)):
        reference = square.SquareAttack(None, n_queries=queries, resc_schedule=rescale)
        ours = Square(queries=queries, rescale=rescale)
        assert all(ours._share(i) == pytest.approx(reference.p_selection(i)) for i in range(queries))
    reference = square.SquareAttack(None, norm="L2", eps=1.0)
    reference.init_hyperparam(torch.zeros(1, 3, 8, 8))
    for side in range(1, 20):
        bump, theirs = _bump(side, torch.device("cpu")), reference.eta(side)
        assert torch.allclose(bump, theirs, atol=1e-6) or torch.allclose(bump.T, theirs, atol=1e-6)


def gratings(count: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy gratings of four orientations, 16 x 16."""
    noise = uniform(by_position(count) + first, (2 + 3 * 256,))
    labels, phase = (noise[:, 0] * 4).long(), noise[:, 1] * 2 * math.pi
    rows, columns = torch.meshgrid(*[torch.arange(16.0) * math.pi / 4] * 2, indexing="ij")
    angle = (labels * math.pi / 4)[:, None, None]
    waves = torch.sin(torch.cos(angle) * columns + torch.sin(angle) * rows + phase[:, None, None])
    return (0.5 + 0.12 * waves[:, None] + 0.25 * (noise[:, 2:].view(-1, 3, 16, 16) - 0.5)).clamp(0, 1), labels


@pytest.fixture(scope="module")
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(256, 4)),
        )
    images, labels = gratings(512, 1000)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(12):
        for batch in torch.arange(512).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    return net.requires_grad_(False)


@pytest.mark.parametrize(
    ("budget", "norm"), [(Linf(0.025), "Linf"), pytest.param(L2(0.55), "L2", marks=pytest.mark.slow)], ids=str
)
def test_square_is_as_strong_as_the_reference(budget: Linf | L2, norm: str, network: nn.Module) -> None:
    square = pytest.importorskip("pyautoattack.square")
    images, labels = gratings(96, 5000)
    right = network(images).argmax(1) == labels
    images, labels = images[right], labels[right]
    assert len(images) > 80
    ours, theirs, forwards, their_forwards = 0, 0, 0, 0

    def counted(images: torch.Tensor) -> torch.Tensor:
        nonlocal their_forwards
        their_forwards += len(images)
        return network(images)

    for seed in range(2):
        queries = Queries.none(len(images))
        seeds = by_position(len(images)) + 1000 * seed
        victim = ImageVictim(network, queries)
        made = Square(queries=300)(victim, images, Untargeted(labels), budget, seeds)
        budget.check(made, images)
        ours += int((network(made).argmax(1) == labels).sum())
        forwards += int(queries.forwards.sum())
        with torch.random.fork_rng():
            reference = square.SquareAttack(
                counted, norm=norm, n_queries=300, eps=budget.eps, seed=seed, resc_schedule=False
            )
            made = reference.perturb(images, labels)
        theirs += int((network(made).argmax(1) == labels).sum())
    total = 2 * len(images)
    assert 0.1 * total < theirs < 0.9 * total, "the comparison needs both kinds"
    assert ours <= theirs + 2, f"{ours} of {total} stand, of the reference {theirs}"
    assert forwards < 1.1 * their_forwards


# RayS


def ray_by_ray(answer, image: torch.Tensor, label: int, queries: int) -> tuple[torch.Tensor, float, int]:
    """The search for one image as a plain loop: the ray, its radius, the questions spent."""
    pixels = image.numel()
    signs, radius, spent, size, level = torch.ones(pixels), math.inf, 1, pixels, 0
    tolerance, idle = 1e-3 / math.sqrt(pixels), 0

    def won(signs: torch.Tensor, radius: float) -> bool:
        nonlocal spent
        spent += 1
        return int(answer((image + radius * signs.view_as(image)).clamp(0, 1)[None]).argmax()) != label

    while True:
        size = math.ceil(pixels / 2**level)
        for first in range(0, pixels, size):
            attempt = signs.clone()
            attempt[first : first + size] *= -1
            trial = min(max(radius - tolerance, 0.0), 1.0)
            idle += size == 1
            if spent < queries and won(attempt, trial):
                signs, radius, low, idle = attempt, trial, 0.0, 0
                while radius - low > tolerance and spent < queries:
                    middle = (low + radius) / 2
                    if won(signs, middle):
                        radius = middle
                    else:
                        low = middle
            if spent >= queries or idle == pixels:
                return signs.view_as(image), radius, spent
        level += 1


@pytest.mark.parametrize("queries", [7, 60, 333, 10000])
def test_rays_in_lockstep_is_the_search_of_every_image_alone(queries: int) -> None:
    victim = LinearVictim(3, size=4)
    images, eps = middle(8, 4, 4), 1e-5  # too little to win, so that the whole search is seen
    labels = victim(images).argmax(1).detach()
    made, questions = asked(RayS(queries=queries), victim, images, Untargeted(labels), Linf(eps))
    for i in range(8):
        signs, _, spent = ray_by_ray(victim, images[i], int(labels[i]), queries)
        assert torch.equal(made[i], images[i] + eps * signs)
        assert spent == int(questions[i])


def test_rays_finds_the_distance_to_a_hyperplane() -> None:
    """On a ray of signs s the boundary is at margin / (w . s), and at best at margin / |w|_1."""
    victim, images = LinearVictim(2), middle(64)
    labels = victim(images).argmax(1).detach()
    away = (victim.weight[1] - victim.weight[0]).detach() * torch.where(labels == 0, 1.0, -1.0)[:, None]
    for queries, factor in ((300, 1.6), (1000, 1.05)):
        signs = ((RayS(queries)(victim, images, Untargeted(labels), Linf(1e-4)) - images) * 1e4).round().flatten(1)
        assert torch.equal(signs.abs(), torch.ones_like(signs)), "what stands goes the whole budget along its ray"
        longer = away.abs().sum(1) / (away * signs).sum(1)
        assert bool((longer > 0).all()) and float(longer.max()) < factor


def test_rays_beats_what_is_near_the_boundary_and_nothing_beyond_it() -> None:
    victim, images, budget = LinearVictim(2), middle(64), Linf(0.02)
    labels = victim(images).argmax(1).detach()
    distance = margin(victim(images), labels).detach() / (victim.weight[1] - victim.weight[0]).abs().sum().detach()
    made, questions = asked(RayS(), victim, images, Untargeted(labels), budget)
    size = budget.check(made, images)
    beaten = victim(made).argmax(1) != labels
    assert 5 < int(beaten.sum()) < 59, "the oracle needs both kinds"
    assert bool(beaten[distance < 0.98 * budget.eps].all())
    assert not bool(beaten[distance > budget.eps].any())
    assert bool((size[beaten] >= distance[beaten] - 1e-6).all())
    assert torch.allclose(size[~beaten], torch.tensor(budget.eps), atol=1e-6)
    assert float(questions[beaten].float().mean()) < float(questions[~beaten].float().mean()), "a beaten image leaves"


def test_rays_sees_nothing_but_the_answer() -> None:
    victim, images = LinearVictim(4), middle(12)
    labels = victim(images).argmax(1).detach()
    listener = Listener(lambda images: F.one_hot(victim(images).argmax(1), 4).float())
    for goal in (Untargeted(labels), Targeted((labels + 1) % 4), Untargeted(labels).lasting()):
        assert torch.equal(
            RayS(queries=300)(listener, images, goal, Linf(0.03)), RayS(queries=300)(victim, images, goal, Linf(0.03))
        )


def test_rays_leaves_alone_what_is_beaten_already() -> None:
    victim, images = LinearVictim(2), middle(8)
    labels = victim(images).argmax(1).detach()
    labels[::2] = 1 - labels[::2]
    made, questions = asked(RayS(queries=50), victim, images, Untargeted(labels), Linf(0.02))
    assert torch.equal(made[::2], images[::2]) and bool((questions[::2] == 1).all())
    assert not bool((made[1::2] == images[1::2]).flatten(1).all(1).any())
    assert int(questions.max()) <= 50
    only, once = asked(RayS(queries=1), victim, images, Untargeted(labels), Linf(0.02))
    assert bool((once == 1).all())
    Linf(0.02).check(only, images)


def test_rays_goes_the_whole_budget_where_the_goal_is_endless() -> None:
    victim, images, budget = LinearVictim(2), middle(16), Linf(0.05)
    labels = victim(images).argmax(1).detach()
    goal = Untargeted(labels)
    ended, few = asked(RayS(queries=300), victim, images, goal, budget)
    made, many = asked(RayS(queries=300), victim, images, goal.lasting(), budget)
    beaten = victim(ended).argmax(1) != labels
    assert int(beaten.sum()) > 4
    assert bool((many[beaten] > few[beaten]).all())
    assert torch.allclose(budget.size(made - images), torch.tensor(budget.eps), atol=1e-6)
    assert bool((margin(victim(made), labels) < margin(victim(ended), labels))[beaten].all())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (3, 7)])
def test_rays_takes_every_shape(height: int, width: int) -> None:
    images = middle(4, height, width)

    def bright(images: torch.Tensor) -> torch.Tensor:
        total = images.flatten(1).mean(1)
        return torch.stack([0.55 - total, total - 0.55], dim=1)

    labels = bright(images).argmax(1)
    far = (bright(images)[:, 1]).abs()  # every pixel has to move by as much
    made, _ = asked(RayS(), bright, images, Untargeted(labels), Linf(0.3))
    assert bool((bright(made).argmax(1) != labels).all())
    assert bool((Linf(0.3).size(made - images) >= far - 1e-6).all())


def test_rays_never_finds_what_is_not_there() -> None:
    made, questions = asked(
        RayS(), Listener(), middle(3, 2, 2), Untargeted(torch.zeros(3, dtype=torch.int64)), Linf(1.0)
    )
    assert int(questions.max()) < 100, "a sweep through all pixels in vain is the end"
    Linf(1.0).check(made, middle(3, 2, 2))


def test_both_are_words() -> None:
    for text in ("Square(queries=100, loss=DLR())", "RayS(queries=100)"):
        assert isinstance(crossguard.build(text), ImageAttack)
