"""Minimum-norm attacks: the distance to a hyperplane is known exactly, and so is what the reference finds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from crossguard import (
    FAB,
    L1,
    L2,
    CarliniWagner,
    CrossguardError,
    DeepFool,
    ImageVictim,
    Linf,
    PixelBudget,
    Targeted,
    Towards,
    Untargeted,
)
from crossguard.attacks.base import Queries
from crossguard.attacks.boundary import BoundaryAttack
from crossguard.goals import margin
from crossguard.seeds import by_position, normal, uniform
from crossguard.testing import LinearVictim, check_attack
from toys import convnet, middle, templates

NORMS = [(Linf(0.03), 1), (L2(0.3), 2), (L1(2.0), float("inf"))]
QUICK = CarliniWagner(steps=100, searches=6, constant=0.01)
HASTY = CarliniWagner(steps=20, searches=3, constant=0.1)
ZEROTH = Untargeted(torch.tensor([0]))


def per_image(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def distances_to(victim: LinearVictim, images: torch.Tensor, labels: torch.Tensor, dual: float) -> torch.Tensor:
    """The exact distance to each class, away from the box; infinite for the label's own."""
    logits = victim(images).detach()
    gaps = logits.gather(1, labels[:, None]) - logits
    weight = victim.weight.detach()
    slopes = (weight[labels][:, None] - weight[None]).norm(p=dual, dim=2)
    return torch.where(slopes > 0, gaps / slopes, torch.inf)


# The contract, beyond the defaults


@pytest.mark.parametrize(
    "attack",
    [FAB(steps=4, restarts=2), FAB(steps=4, targets=None), FAB(steps=5, targets=1), DeepFool(candidates=2), HASTY],
    ids=str,
)
def test_contract_of_the_settings(attack: BoundaryAttack) -> None:
    check_attack(attack)


def test_fab_spends_an_l1_budget() -> None:
    victim, images = LinearVictim(4), middle(6)
    labels = victim(images).argmax(1).detach()
    for eps in (0.2, 3.0):
        made = FAB(steps=20)(victim, images, Untargeted(labels), L1(eps))
        L1(eps).check(made, images)
        assert bool((margin(victim(made), labels) < margin(victim(images), labels)).all())


# The distance to a hyperplane


@pytest.mark.parametrize(("budget", "dual"), NORMS, ids=str)
@pytest.mark.parametrize(
    ("attack", "most"),
    [(FAB(), 1.01), (FAB(targets=None), 1.01), (DeepFool(), 1.021), (QUICK, 1.05)],
    ids=lambda value: type(value).__name__,
)
def test_the_distance_to_one_hyperplane(attack: BoundaryAttack, most: float, budget: PixelBudget, dual: float) -> None:
    if not isinstance(budget, attack.norms):
        pytest.skip("not an attack for this norm")
    victim, images = LinearVictim(2), middle(16)
    labels = victim(images).argmax(1).detach()
    exact = distances_to(victim, images, labels, dual).gather(1, (1 - labels)[:, None])[:, 0]
    near, found = attack.nearest(victim, images, Untargeted(labels), budget)
    assert bool((victim(near).argmax(1) != labels).all()), "every sample flips"
    assert torch.allclose(budget.size(near - images), found, rtol=1e-4)
    assert float(near.min()) >= 0 and float(near.max()) <= 1
    ratio = found / exact
    assert float(ratio.min()) > 0.9999, "nothing is nearer than the boundary"
    assert float(ratio.max()) < (1.05 if isinstance(budget, L1) else most)


def uneven(classes: int, images: torch.Tensor) -> LinearVictim:
    """A linear victim whose classes are all near the images, some of them steep: the second best is not the nearest."""
    victim = LinearVictim(classes)
    with torch.no_grad():
        victim.weight *= torch.linspace(0.3, 3.0, classes)[:, None]
        victim.bias -= victim(images).mean(0)
    return victim


@pytest.mark.parametrize("budget", [budget for budget, _ in NORMS], ids=str)
def test_the_nearest_of_several_boundaries(budget: PixelBudget) -> None:
    images = middle(64)
    victim = uneven(6, images)
    logits = victim(images).detach()
    labels = logits.argmax(1)
    exact = torch.full((64, 6), torch.inf)
    for other in range(6):
        way = (victim.weight[other] - victim.weight[labels]).detach().view_as(images)
        exact[:, other] = budget.size(budget.reach(images, way, logits.amax(1) - logits[:, other]))
    exact[torch.arange(64), labels] = torch.inf
    second = logits.scatter(1, labels[:, None], -torch.inf).argmax(1)
    assert int((exact.argmin(1) != second).sum()) > 2, "the oracle needs nearest classes that are not the second best"
    goal = Untargeted(labels)
    for attack in (FAB(steps=50), FAB(steps=50, targets=None)):
        found = attack.nearest(victim, images, goal, budget)[1]
        assert bool((found < 1.05 * exact.amin(1)).all()) and bool((found > 0.9999 * exact.amin(1)).all())
    only = FAB(steps=50, targets=1).nearest(victim, images, goal, budget)[1]
    assert bool((only > 1.05 * exact.amin(1)).any()), "one target is not all of them"
    if isinstance(budget, DeepFool.norms):
        assert bool((DeepFool().nearest(victim, images, goal, budget)[1] < 1.05 * exact.amin(1)).all())
        fewer = DeepFool(candidates=2).nearest(victim, images, goal, budget)[1]
        assert bool((fewer > 1.05 * exact.amin(1)).any()), "two candidates are not all of them"
    if isinstance(budget, L2):
        # Nearer than a step of Adam is stepped over; and who starts towards the second best class may stay with it.
        far = exact.amin(1) > 0.05
        ratio = (QUICK.nearest(victim, images[far], goal.at(far), budget)[1] / exact.amin(1)[far]).sort().values
        assert len(ratio) > 5 and float(ratio[0]) > 0.9999 and float(ratio[-2]) < 1.25


@pytest.mark.parametrize("attack", [FAB(steps=30), FAB(steps=30, targets=None), DeepFool(), QUICK], ids=str)
def test_a_class_of_ones_own_choice(attack: BoundaryAttack) -> None:
    victim, images, budget = LinearVictim(4), middle(12), L2(0.3)
    logits = victim(images).detach()
    labels, targets = logits.argmax(1), logits.argmin(1)
    near, found = attack.nearest(victim, images, Targeted(targets), budget)
    assert torch.equal(victim(near).argmax(1), targets)
    towards = distances_to(victim, images, labels, 2).gather(1, targets[:, None])[:, 0]
    assert bool((found > 0.999 * towards).all()), "the target is at least as far as the boundary of the two"
    by_way, short = attack.nearest(victim, images, Towards(labels, targets), budget)
    assert bool((victim(by_way).argmax(1) != labels).all())
    assert bool((short < 1.25 * towards).all()) and bool((short < found + 1e-4).all())


def test_what_is_beaten_is_at_distance_zero_and_what_cannot_be_is_infinitely_far() -> None:
    victim, images = LinearVictim(3), middle(6)
    labels = victim(images).argmax(1).detach()
    wrong = (labels + 1) % 3

    def fixed(images: torch.Tensor) -> torch.Tensor:
        return victim(images) * 1e-3 + torch.tensor([100.0, 0.0, -100.0])

    for attack in (FAB(steps=5), FAB(steps=5, targets=None), DeepFool(steps=5), CarliniWagner(steps=5, searches=2)):
        near, found = attack.nearest(victim, images, Untargeted(wrong), L2(0.5))
        assert torch.equal(near, images) and bool((found == 0).all())
        assert torch.equal(attack(victim, images, Untargeted(wrong), L2(0.5)), images)
        near, found = attack.nearest(fixed, images, Untargeted(torch.zeros(6, dtype=torch.int64)), L2(0.5))
        assert torch.equal(near, images) and bool(found.isinf().all())


# The step onto a hyperplane within the box


@pytest.mark.parametrize("budget", [Linf(0.1), L2(0.5), L1(1.0)], ids=str)
def test_the_smallest_step_in_the_box(budget: PixelBudget) -> None:
    count = 40
    images = (1.6 * uniform(by_position(count), (3, 5, 5)) - 0.3).clamp(0, 1)  # many pixels sit on the border
    gradient = normal(by_position(count) + 100, (3, 5, 5))
    gradient[:10] *= (uniform(by_position(10), (3, 5, 5)) < 0.3).float()
    gradient = gradient * per_image(torch.logspace(-12, 6, count))  # the scale of logits does not matter
    most = torch.where(gradient > 0, (1 - images) * gradient, -images * gradient).flatten(1).sum(1)
    rise = most * torch.linspace(0.01, 1.2, count)
    step = budget.reach(images, gradient, rise)
    assert float((images + step).min()) >= 0 and float((images + step).max()) <= 1 + 1e-6
    climbed = (gradient * step).flatten(1).sum(1)
    assert torch.allclose(climbed, torch.minimum(rise, most), rtol=1e-4), "it arrives, or does all it can"

    within = rise < most
    slopes = gradient.double().abs().flatten(1)
    room = torch.where(gradient > 0, 1 - images, images).double().flatten(1) * (slopes > 0)
    if isinstance(budget, L1):
        moves = step.abs().double().flatten(1)
        started, full = moves > 0, moves > room - 1e-6
        last = torch.where(started, slopes, torch.inf).amin(1)
        first = torch.where(full, 0.0, slopes).amax(1)
        assert bool((last >= first)[within].all()), "no pixel moves before all steeper ones have gone their way"
    else:
        slopes = slopes / slopes.amax(1, keepdim=True)
        wanted = (rise / gradient.abs().flatten(1).amax(1))[:, None].double()
        weight = torch.ones_like(slopes) if isinstance(budget, Linf) else slopes
        low, high = torch.zeros(count, 1, dtype=torch.float64), torch.full((count, 1), 1e6, dtype=torch.float64)
        for _ in range(100):
            level = (low + high) / 2
            enough = (slopes * (level * weight).minimum(room)).sum(1, keepdim=True) >= wanted
            low, high = torch.where(enough, low, level), torch.where(enough, level, high)
        exact = budget.size((high * weight).minimum(room).float().view_as(images))
        assert torch.allclose(budget.size(step)[within], exact[within], rtol=1e-4)

    assert torch.equal(budget.reach(images, -gradient, -rise), step), "a fall is a rise of the negative"
    assert not bool(budget.reach(images, gradient, 0 * rise).any())
    assert not bool(budget.reach(images, 0 * gradient, rise).any())
    alone = torch.cat([budget.reach(images[i : i + 1], gradient[i : i + 1], rise[i : i + 1]) for i in range(count)])
    assert torch.allclose(alone, step, atol=1e-6)


@pytest.mark.parametrize(("budget", "dual"), NORMS, ids=str)
def test_the_dual_norm(budget: PixelBudget, dual: float) -> None:
    gradient = normal(by_position(8), (3, 4, 4))
    assert torch.allclose(budget.dual(gradient), gradient.flatten(1).norm(p=dual, dim=1))


def test_boundaries_beyond_the_box_are_found_along_its_walls() -> None:
    """Half the pixels can't move: what projects first and clamps afterwards falls short of the boundary."""
    victim, count = LinearVictim(2), 16
    towards = (victim.weight[1] - victim.weight[0]).detach().view(1, 3, 6, 6)
    images = middle(count)
    blocked = uniform(by_position(count) + 50, (3, 6, 6)) < 0.5
    labels = victim(images).argmax(1).detach()
    way = towards * per_image(1.0 - 2.0 * labels)
    images = torch.where(blocked, (way > 0).float(), images)
    labels = victim(images).argmax(1).detach()
    way = towards * per_image(1.0 - 2.0 * labels)
    gap = margin(victim(images), labels).detach()
    room = torch.where(way > 0, 1 - images, images)
    for budget in (Linf(0.1), L2(0.5), L1(3.0)):
        exact = budget.size(budget.reach(images, way.expand_as(images), gap))
        reachable = (room * way.abs()).flatten(1).sum(1) > 1.2 * gap
        assert int(reachable.sum()) > 4
        found = FAB().nearest(victim, images, Untargeted(labels), budget)[1]
        assert bool((found[reachable] < 1.05 * exact[reachable]).all())


# Against the reference


@pytest.mark.parametrize("budget", [Linf(0.05), pytest.param(L2(0.8), marks=pytest.mark.slow), L1(6.0)], ids=str)
def test_fab_t_finds_what_autoattack_finds(budget: PixelBudget) -> None:
    fab = pytest.importorskip("pyautoattack.fab_pt")
    net, (images, labels), targets, steps = convnet(), templates(14), 3, 40
    standing = net(images).argmax(1) == labels
    assert int(standing.sum()) >= 12
    reference = fab.FABAttack_PT(
        net, norm=type(budget).__name__, n_iter=steps, eps=budget.eps, targeted=True, device="cpu",
        n_target_classes=targets,
    )  # fmt: skip
    nearest = torch.full((14,), torch.inf)
    for rank in range(2, targets + 2):
        reference.target_class = rank
        with torch.no_grad():
            made = reference.attack_single_run(images, labels, is_targeted=True)
        beaten = net(made).argmax(1) != labels
        nearest = torch.where(beaten, nearest.minimum(budget.size(made - images)), nearest)
    attack, goal = FAB(steps=steps, targets=targets), Untargeted(labels)
    near, found = attack.nearest(net, images, goal, budget)
    assert bool((net(near).argmax(1) != labels).all())
    # Both walk the same way to the sixth digit, until a rounding error takes one of them round another corner of the
    # piecewise linear network.
    close = (found / nearest - 1).abs() < 1e-3
    assert int(close[standing].sum()) >= int(standing.sum()) - 2
    assert bool(((found / nearest)[standing] - 1).abs().max() < 0.25)

    eps = float(nearest[standing].quantile(0.5)) * 1.01
    bounded = dataclasses.replace(budget, eps=eps)
    reference.eps = eps
    theirs = net(reference.perturb(images, labels)).argmax(1) != labels
    made = attack(net, images, goal, bounded)
    bounded.check(made, images)
    ours = net(made).argmax(1) != labels
    clear = (nearest / eps - 1).abs() > 0.02
    assert 4 < int(ours.sum()) < 12, "the oracle needs both kinds"
    assert int((ours != theirs)[clear].sum()) <= 1
    assert torch.equal(ours[clear & close], theirs[clear & close])


def test_the_original_fab_finds_what_autoattack_finds() -> None:
    fab = pytest.importorskip("pyautoattack.fab_pt")
    net, (images, labels), budget = convnet(4), templates(12, 4), L2(0.8)
    reference = fab.FABAttack_PT(net, norm="L2", n_iter=40, eps=0.8, device="cpu")
    with torch.no_grad():
        theirs = budget.size(reference.attack_single_run(images, labels) - images)
    queries = Queries.none(12)
    ours = FAB(steps=40, targets=None).nearest(ImageVictim(net, queries), images, Untargeted(labels), budget)[1]
    assert int(((ours - theirs).abs() < 1e-3 * theirs).sum()) >= 11
    assert bool((queries.gradients[ours > 0] == 3 * 40).all()), "a gradient per other class and step"


def test_deepfool_finds_what_foolbox_finds() -> None:
    foolbox = pytest.importorskip("foolbox")
    net, (images, labels) = convnet(), templates(16)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    kinds = [(L2(0.5), foolbox.attacks.L2DeepFoolAttack), (Linf(0.03), foolbox.attacks.LinfDeepFoolAttack)]
    for budget, kind in kinds:
        theirs = kind(steps=50, candidates=10, overshoot=0.02)(model, images, labels, epsilons=None)[0]
        ours = DeepFool().nearest(net, images, Untargeted(labels), budget)[0]
        # foolbox makes every step 1e-4 longer than the paper does
        assert torch.allclose(budget.size(ours - images), budget.size(theirs - images), rtol=0.01, atol=4e-4)
        assert float((ours - theirs).abs().max()) < 4e-4


def test_carlini_and_wagner_find_what_foolbox_finds() -> None:
    foolbox = pytest.importorskip("foolbox")
    net, (images, labels) = convnet(), templates(12)
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    kind = foolbox.attacks.L2CarliniWagnerAttack
    theirs = kind(steps=100, binary_search_steps=6, initial_const=0.01, stepsize=0.01)(
        model, images, labels, epsilons=None
    )[0]
    ours = QUICK.nearest(net, images, Untargeted(labels), L2(0.5))[1]
    assert torch.allclose(ours, L2(0.5).size(theirs - images), rtol=0.03)


def test_on_a_network_the_thorough_are_nearer_than_the_quick() -> None:
    net, (images, labels), budget = convnet(), templates(16), L2(0.5)
    goal = Untargeted(labels)
    quick = DeepFool().nearest(net, images, goal, budget)[1]
    fab = FAB(steps=50, targets=4).nearest(net, images, goal, budget)[1]
    assert bool((fab < 1.05 * quick).all()) and float((fab / quick).median()) < 0.99
    thorough = QUICK.nearest(net, images, goal, budget)[1]
    assert abs(float((thorough / fab).median()) - 1) < 0.03


# Within a budget


@pytest.mark.parametrize(
    ("attack", "slack"), [(FAB(steps=40), 1.01), (DeepFool(), 1.021), (QUICK, 1.05)], ids=lambda value: str(value)[:8]
)
def test_beats_exactly_the_images_within_reach(attack: BoundaryAttack, slack: float) -> None:
    victim, images, budget = LinearVictim(2), middle(48), L2(0.2)
    labels = victim(images).argmax(1).detach()
    exact = distances_to(victim, images, labels, 2).gather(1, (1 - labels)[:, None])[:, 0]
    queries = Queries.none(48)
    made = attack(ImageVictim(victim, queries), images, Untargeted(labels), budget)
    beaten = victim(made).argmax(1) != labels
    assert 5 < int(beaten.sum()) < 43, "the oracle needs both kinds"
    assert bool(beaten[exact * slack < budget.eps].all()) and not bool(beaten[exact > budget.eps].any())
    sizes = budget.check(made, images)
    assert bool((sizes[~beaten] > 0.999 * budget.eps).all()), "who stands has spent the budget"
    if not isinstance(attack, DeepFool):
        assert int(queries.gradients[beaten].max()) < int(queries.gradients[~beaten].min()), "who is beaten leaves"


def test_a_budget_never_beats_less_than_distances_say() -> None:
    net, (images, labels) = convnet(), templates(20)
    goal = Untargeted(labels)
    attack = FAB(steps=30, targets=3)
    distances = attack.nearest(net, images, goal, Linf(0.05))[1]
    budget = Linf(float(distances.median()))
    made = attack(net, images, goal, budget)
    beaten = net(made).argmax(1) != labels
    assert torch.equal(beaten, distances <= budget.eps)
    budget.check(made, images)


def test_without_an_end_nobody_leaves_and_nobody_stays_at_the_boundary() -> None:
    victim, images, budget = LinearVictim(3), middle(12), L2(0.4)
    labels = victim(images).argmax(1).detach()
    for attack, gradients in ((FAB(steps=6), 1 + 2 * 6), (DeepFool(), None), (QUICK, None)):
        queries = Queries.none(12)
        made = attack(ImageVictim(victim, queries), images, Untargeted(labels).lasting(), budget)
        ends = attack(victim, images, Untargeted(labels), budget)
        assert bool((budget.check(made, images) > 0.999 * budget.eps).all())
        won = victim(ends).argmax(1) != labels
        assert bool(won.any())
        assert bool((margin(victim(made), labels) < margin(victim(ends), labels) + 1e-5).all())
        assert bool((margin(victim(made), labels)[won] < margin(victim(ends), labels)[won] - 0.1).any())
        if gradients is not None:
            assert bool((queries.gradients == gradients).all())
        # what is beaten here may stand elsewhere
        wrong = (labels + 1) % 3
        beyond = attack(victim, images, Untargeted(wrong).lasting(), budget)
        assert bool((margin(victim(beyond), wrong) < margin(victim(images), wrong)).all())


# Classes


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes(classes: int) -> None:
    victim, images = LinearVictim(classes), middle(10)
    labels = victim(images).argmax(1).detach()
    queries = Queries.none(10)
    found = FAB(steps=10).nearest(ImageVictim(victim, queries), images, Untargeted(labels), L2(0.5))[1]
    exact = distances_to(victim, images, labels, 2).scatter(1, labels[:, None], torch.inf).amin(1)
    assert bool((found < 1.06 * exact).all())
    assert bool((queries.gradients == 10 * (classes - 1)).all()), "each other class once"


@pytest.mark.parametrize("targets", [9, None, 2], ids=str)
def test_the_same_class_twice_changes_nothing(targets: int | None) -> None:
    victim, images = LinearVictim(3), middle(10)

    def twice(images: torch.Tensor) -> torch.Tensor:
        return victim(images)[:, [0, 1, 2, 0, 1, 2]]

    labels = victim(images).argmax(1).detach()
    for attack in (FAB(steps=15, targets=targets), DeepFool(candidates=3 if targets == 2 else 10)):
        once, both = Queries.none(10), Queries.none(10)
        near, found = attack.nearest(ImageVictim(victim, once), images, Untargeted(labels), Linf(0.1))
        again, far = attack.nearest(ImageVictim(twice, both), images, Untargeted(labels), Linf(0.1))
        assert torch.allclose(near, again, atol=1e-5) and torch.allclose(found, far, atol=1e-5)
        assert torch.equal(once.gradients, both.gradients), "no gradient is wasted on a duplicate"


def test_a_victim_without_slopes_costs_little_and_breaks_nothing() -> None:
    def flat(images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([2.0, 1.0, 0.0]) + 0.0 * images.flatten(1)[:, :3]

    images, labels = middle(4), torch.zeros(4, dtype=torch.int64)
    for attack in (FAB(), FAB(targets=None), DeepFool(), CarliniWagner(steps=5, searches=2)):
        queries = Queries.none(4)
        made = attack(ImageVictim(flat, queries), images, Untargeted(labels), L2(0.5))
        assert torch.allclose(made, images, atol=1e-5)
        assert int(queries.gradients.max()) <= 10, "a flat spot stays flat"
    equal = FAB()(lambda images: 0.0 * images.flatten(1)[:, :3], images, Untargeted(labels), L2(0.5))
    assert torch.equal(equal, images)


# Mistakes that make attacks weak by accident


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4])
def test_the_scale_of_the_logits_does_not_matter(scale: float) -> None:
    net, (images, labels) = convnet(), templates(8)
    for attack in (FAB(steps=10, targets=3), DeepFool()):
        for budget in (Linf(0.05), L2(0.8)):
            plain = attack.nearest(net, images, Untargeted(labels), budget)[1]
            scaled = attack.nearest(lambda images: scale * net(images), images, Untargeted(labels), budget)[1]
            assert torch.allclose(plain, scaled, rtol=0.01)


def test_distances_do_not_depend_on_the_batch() -> None:
    net, (images, labels) = convnet(), templates(9)
    seeds = by_position(9) + 40
    for attack in (FAB(steps=12, targets=2, restarts=2), DeepFool(), CarliniWagner(steps=30, searches=3, constant=0.1)):
        near, found = attack.nearest(net, images, Untargeted(labels), L2(0.8), seeds)
        turned = torch.arange(8, -1, -1)
        other, far = attack.nearest(net, images[turned], Untargeted(labels[turned]), L2(0.8), seeds[turned])
        assert torch.allclose(near[turned], other, atol=1e-4) and torch.allclose(found[turned], far, rtol=1e-3)
        one, alone = attack.nearest(net, images[4:5], Untargeted(labels[4:5]), L2(0.8), seeds[4:5])
        assert torch.allclose(near[4:5], one, atol=1e-4) and torch.allclose(found[4:5], alone, rtol=1e-3)


def test_restarts_start_elsewhere_and_never_weaken() -> None:
    net, (images, labels) = convnet(), templates(12)
    goal, budget = Untargeted(labels), L2(0.8)
    once = FAB(steps=10, targets=2).nearest(net, images, goal, budget)[1]
    queries = Queries.none(12)
    thrice = FAB(steps=10, targets=2, restarts=3).nearest(ImageVictim(net, queries), images, goal, budget)[1]
    assert bool((thrice <= once).all()) and bool((thrice < once - 1e-5).any())
    assert bool((queries.gradients[once > 0] == 60).all())
    other = FAB(steps=10, targets=2, restarts=3).nearest(net, images, goal, budget, by_position(12) + 99)[1]
    assert not torch.equal(thrice, other), "the starts follow the seeds"
    plain = FAB(steps=10, targets=2).nearest(net, images, goal, budget, by_position(12) + 99)[1]
    assert torch.equal(once, plain), "the first start is the clean image"


def test_confidence_goes_beyond_the_boundary() -> None:
    net, (images, labels) = convnet(), templates(8)
    goal, budget = Untargeted(labels), L2(0.5)
    standing = net(images).argmax(1) == labels
    near, found = QUICK.nearest(net, images, goal, budget)
    sure, far = dataclasses.replace(QUICK, confidence=2.0).nearest(net, images, goal, budget)
    assert bool((-margin(net(sure), labels)[standing] > 1.9999).all())
    assert bool((-margin(net(near), labels)[standing] < 1.0).all())
    assert bool((far > found)[standing].all())


def test_pixels_at_the_border_do_not_break_the_change_of_variables() -> None:
    victim = LinearVictim(3)
    images = middle(8).round()
    labels = victim(images).argmax(1).detach()
    near, found = CarliniWagner(steps=150, searches=7, rate=0.05).nearest(victim, images, Untargeted(labels), L2(0.5))
    assert bool(torch.isfinite(near).all()) and float(near.min()) >= 0 and float(near.max()) <= 1
    assert bool(found.isfinite().any())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FAB(steps=0), "does nothing"),
        (lambda: FAB(targets=0), "None for all at once"),
        (lambda: FAB(restarts=0), "give 1 or more"),
        (lambda: FAB(alpha_max=1.5), "is no weight"),
        (lambda: FAB(eta=0.9), "stops short"),
        (lambda: FAB(beta=1.0), "no step back"),
        (lambda: DeepFool(steps=0), "does nothing"),
        (lambda: DeepFool(overshoot=0.0), "not beyond"),
        (lambda: DeepFool(candidates=1), "no class to go to"),
        (lambda: CarliniWagner(steps=0), "does nothing"),
        (lambda: CarliniWagner(searches=0), "tries no constant"),
        (lambda: CarliniWagner(rate=0.0), "does not move"),
        (lambda: CarliniWagner(confidence=-1.0), "stops short"),
        (lambda: CarliniWagner(constant=0.0), "does not attack"),
        (lambda: CarliniWagner()(LinearVictim(), middle(1), ZEROTH, Linf(0.1)), "is an attack for L2"),
        (lambda: CarliniWagner().nearest(LinearVictim(), middle(1), ZEROTH, L1(3.0)), "cannot spend"),
        (lambda: DeepFool()(LinearVictim(), middle(1), ZEROTH, L1(3.0)), "for Linf or L2"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    with pytest.raises(CrossguardError, match=message):
        make()


def test_a_goal_without_classes_is_refused() -> None:
    from crossguard import Drift

    images = middle(2)
    for attack in (FAB(), DeepFool(), CarliniWagner()):
        with pytest.raises(CrossguardError, match="try PGD instead"):
            attack(LinearVictim(), images, Drift(torch.ones(2, 2)), L2(0.5))
