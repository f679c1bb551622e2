"""Our attacks beside those of foolbox, torchattacks and AutoAttack, and the mistakes that make attacks weak by
accident: each is made here on purpose, to see that it would be noticed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossguard import (
    APGD,
    DLR,
    FAB,
    L1,
    L2,
    PGD,
    AutoAttack,
    CrossguardError,
    EachTarget,
    ImageAttack,
    ImageVictim,
    Linf,
    Scenes,
    Square,
    Targeted,
    Tiny,
    Untargeted,
    Words,
    Worst,
)
from crossguard.attacks.base import Made
from crossguard.budgets import PixelBudget
from crossguard.goals import CrossEntropy, Loss, Towards
from crossguard.seeds import by_position
from crossguard.testing import LinearVictim, check_attack
from toys import convnet, middle, reach, templates, with_fields

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not (DATA / "cifar10_resnet20.npz").exists(), reason="no CIFAR-10 images and weights in ../shared/data"
)


@functools.cache
def victims() -> ModuleType:
    """The victims of the benchmarks."""
    path = ROOT / "benchmarks" / "victims.py"
    specification = importlib.util.spec_from_file_location("victims", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["victims"] = module
    specification.loader.exec_module(module)
    return module


# The same loops, pixel for pixel


def last_of_pgd(net: nn.Module, images: Tensor, labels: Tensor, budget: PixelBudget) -> Tensor:
    return PGD(steps=10, random_start=False, best=False, stop=False)(net, images, Untargeted(labels), budget)


@pytest.mark.parametrize("budget", [Linf(0.04), L2(0.5)], ids=str)
def test_pgd_is_that_of_foolbox(budget: Linf | L2) -> None:
    foolbox = pytest.importorskip("foolbox")
    net, (images, labels) = convnet(size=10), templates(32, size=10)
    kind = foolbox.attacks.LinfPGD if isinstance(budget, Linf) else foolbox.attacks.L2PGD
    attack = kind(steps=10, random_start=False, abs_stepsize=0.25 * budget.eps)
    same, pixels = precise(net, images, budget)
    victim = foolbox.PyTorchModel(same, bounds=(0, 1), device="cpu")
    _, theirs, _ = attack(victim, pixels, labels, epsilons=budget.eps)
    compare(last_of_pgd(net, images, labels, budget), theirs, images, budget)


@pytest.mark.parametrize("budget", [Linf(0.04), L2(0.5)], ids=str)
def test_pgd_is_that_of_torchattacks(budget: Linf | L2) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    net, (images, labels) = convnet(size=10), templates(32, size=10)
    kind = torchattacks.PGD if isinstance(budget, Linf) else torchattacks.PGDL2
    same, pixels = precise(net, images, budget)
    with torch.enable_grad():
        theirs = kind(same, eps=budget.eps, alpha=0.25 * budget.eps, steps=10, random_start=False)(pixels, labels)
    compare(last_of_pgd(net, images, labels, budget), theirs, images, budget)


def precise(net: nn.Module, images: Tensor, budget: Linf | L2) -> tuple[nn.Module, Tensor]:
    """What the others attack. Where directions count, in double precision: the gradient of a cross-entropy in float32
    is a difference of numbers near 1, so that their float32 pixels are up to 1e-5 away from these."""
    return (net, images) if isinstance(budget, Linf) else (copy.deepcopy(net).double(), images.double())


def compare(ours: Tensor, theirs: Tensor, clean: Tensor, budget: Linf | L2) -> None:
    assert float((ours - clean).abs().max()) > 0.01, "nothing moved, so nothing was compared"
    if isinstance(budget, Linf):
        assert torch.equal(ours, theirs)
    else:
        # They guard the norm with other constants and divide in another order, so rounding differs.
        assert torch.allclose(ours, theirs.float(), atol=1e-6)


# As strong as AutoAttack


@dataclasses.dataclass(frozen=True)
class Size:
    """Both sides do as little as this, so that the comparison is quick."""

    steps: int
    targets: int
    queries: int

    def ours(self, budget: PixelBudget) -> dict[str, ImageAttack]:
        changes = {"steps": self.steps, "targets": self.targets, "queries": self.queries}
        names = ("apgd-ce", "apgd-t", "fab-t", "square")
        return dict(zip(names, (with_fields(part, **changes) for part in AutoAttack().parts(budget)), strict=True))

    def theirs(self, net: nn.Module, budget: PixelBudget, seed: int):
        package = pytest.importorskip("pyautoattack.autoattack")
        base = pytest.importorskip("pyautoattack.autopgd_base")
        same = {"n_iter": self.steps, "norm": type(budget).__name__, "eps": budget.eps, "seed": seed, "device": "cpu"}
        standard = package.AutoAttack(net, norm=same["norm"], eps=budget.eps, seed=seed, version="standard")
        standard.verbose = False
        standard.apgd = base.APGDAttack(net, n_restarts=1, **same)
        standard.apgd_targeted = base.APGDAttack_targeted(net, n_target_classes=self.targets, n_restarts=1, **same)
        standard.fab.n_iter, standard.fab.n_target_classes = self.steps, self.targets
        standard.square.n_queries = self.queries
        return standard


def robust(net: nn.Module, images: Tensor, labels: Tensor) -> int:
    with torch.no_grad():
        return int((net(images).argmax(1) == labels).sum())


def contest(net: nn.Module, images: Tensor, labels: Tensor, budget: PixelBudget, size: Size, seed: int):
    """How many images each side leaves standing: by each attack alone, and by all of them, one after the other."""
    counts: dict[str, tuple[int, int]] = {}
    goal, seeds = Untargeted(labels), by_position(len(images)) + 1000 * seed
    ours = size.ours(budget)
    theirs = size.theirs(net, budget, seed)
    for name, attack in ours.items():
        made = attack(net, images, goal, budget, seeds)
        budget.check(made, images)
        theirs.attacks_to_run = [name]
        crafted, _ = theirs.run_standard_evaluation(images, labels, batch_size=250)
        counts[name] = robust(net, made, labels), robust(net, crafted, labels)
    theirs.attacks_to_run = list(ours)
    crafted, _ = theirs.run_standard_evaluation(images, labels, batch_size=250)
    made = Worst(tuple(ours.values()))(net, images, goal, budget, seeds)
    budget.check(made, images)
    counts["all"] = robust(net, made, labels), robust(net, crafted, labels)
    return counts


def judge(contests: list[dict[str, tuple[int, int]]], images: int) -> None:
    """Over all seeds together no more than one image in 500 above theirs, rounded up: both start at random points of
    their own, so one image that sits on the edge may fall on either side."""
    for name in contests[0]:
        ours, theirs = (sum(counts[name][side] for counts in contests) for side in (0, 1))
        slack = -(-images // 500)
        assert ours <= theirs + slack, f"{name} leaves {ours} images standing and AutoAttack's {theirs}: {contests}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("budget", "seeds"), [(Linf(0.05), 2), pytest.param(L2(0.5), 8, marks=pytest.mark.slow)], ids=str
)
def test_as_strong_as_autoattack_on_a_small_network(budget: PixelBudget, seeds: int) -> None:
    """Within L2 single starts differ by three images of 128 on either side, so more of them are counted."""
    net, (images, labels) = convnet(size=10), templates(128, size=10)
    contests = [contest(net, images, labels, budget, Size(15, 3, 80), seed) for seed in range(seeds)]
    assert 3 <= min(counts["all"][0] for counts in contests) <= 125, "the comparison needs both kinds"
    judge(contests, seeds * len(images))


@pytest.mark.slow
@needs_data
@pytest.mark.filterwarnings("ignore")
def test_as_strong_as_autoattack_on_a_resnet() -> None:
    net = victims().resnet(20)
    images, labels = victims().pictures("test", 60)
    counts = contest(net, images, labels, Linf(0.5 / 255), Size(8, 2, 40), 0)
    assert 0 < counts["all"][0] < robust(net, images, labels), "the comparison needs both kinds"
    judge([counts], len(images))


@needs_data
@pytest.mark.parametrize(("depth", "accuracy"), [(20, 0.917), (56, 0.936)])
def test_the_resnets_are_as_good_as_published(depth: int, accuracy: float) -> None:
    net = victims().resnet(depth)
    images, labels = victims().pictures("test", 300)

    def off(network: nn.Module) -> float:
        return abs(robust(network, images, labels) / 300 - accuracy)

    assert off(net) < 0.025, "two standard errors of the mean of 300 out of 3,000"
    net.deviation = torch.full_like(net.deviation, 0.5)
    assert off(net) > 0.04, "another normalization would show"


# Weak by accident: each mistake is made once, to see that it shows


@dataclasses.dataclass(frozen=True)
class Averaged(Loss):
    """The mistake: a mean over the batch."""

    def away(self, logits: Tensor, labels: Tensor) -> Tensor:
        return CrossEntropy().away(logits, labels) / len(logits)

    def towards(self, logits: Tensor, targets: Tensor) -> Tensor:
        return CrossEntropy().towards(logits, targets) / len(logits)


def test_a_mean_in_half_precision_would_be_no_attack() -> None:
    weight = LinearVictim(3).weight.detach().half() * 5e-5

    def half(images: Tensor) -> Tensor:
        # as a network under autocast: products in half precision, logits of a model that is sure of itself
        return images.flatten(1).half() @ weight.T * 1e-1

    images, budget = middle(2048), Linf(8 / 255)
    labels = half(images).argmax(1)
    once = PGD(steps=1, step=1.0, random_start=False, best=False, stop=False)

    def moved(attack: PGD) -> Tensor:
        return budget.size(attack(half, images, Untargeted(labels), budget) - images) > 0

    assert bool(moved(once).all())
    assert not bool(moved(dataclasses.replace(once, loss=Averaged())).any()), "the mistake would not show"


class Normalizing(nn.Module):
    """Normalization inside, as in every model of ours."""

    def __init__(self, inner: nn.Module, deviation: float) -> None:
        super().__init__()
        self.inner, self.deviation = inner, deviation

    def forward(self, images: Tensor) -> Tensor:
        return self.inner((images - 0.5) / self.deviation)


ATTACKS = [
    PGD(best=False, stop=False),
    APGD(steps=10, stop=False),
    EachTarget(APGD(steps=10, loss=DLR(), stop=False), 2),
    FAB(steps=10),
    Square(queries=400),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_a_budget_in_normalized_space_would_show(attack: ImageAttack) -> None:
    """Behind a division by 0.25 a change is 4 times as long. A budget is spent in pixels, all of it; the same number
    behind the normalization would be a fourth of it."""
    inner, images = LinearVictim(4), middle(64)
    victim = Normalizing(inner, 0.25)
    labels = victim(images).argmax(1).detach()
    needed = 0.25 * reach(inner, (images - 0.5) / 0.25, labels)
    budget = Linf(float(needed.median()))
    made = attack(victim, images, Untargeted(labels), budget)
    budget.check(made, images)
    beaten = victim(made).argmax(1) != labels
    assert not bool(beaten[needed > 1.01 * budget.eps].any()), "it went beyond its budget"
    within = needed < (0.5 if isinstance(attack, Square) else 0.8) * budget.eps
    assert int(within.sum()) > 5
    assert bool(beaten[within].all()), "it didn't spend its budget"
    mistaken = victim(images + 0.25 * (made - images)).argmax(1) != labels
    assert not bool(mistaken[within].all()), "the mistake would not show"


@pytest.mark.parametrize("size", [32, 48])
def test_the_budget_applies_at_the_resolution_of_the_data_and_in_pixels(size: int) -> None:
    model, budget = Tiny(), Linf(8 / 255)
    data = Scenes("object", "test", size=size)
    batch = next(data.batches(8, range(8)))
    assert batch.images.shape[-1] == size
    answer = model.classifier(data.prompts())
    made = last_of_pgd(answer, batch.images, batch.labels, budget)
    assert made.shape == batch.images.shape
    assert torch.allclose(budget.check(made, batch.images), torch.full((8,), budget.eps), rtol=1e-3)
    changed = (made - batch.images).abs() > 0.5 * budget.eps
    assert float(changed.float().mean()) > 0.3, "the budget is spent all over the image"
    seen = model.load().preprocess
    assert float((seen(made) - seen(batch.images)).abs().max()) > 2 * budget.eps, "deviations are 1/4: more inside"

    if size != 32:
        # The mistake: resize first, attack there. At the data's own size its perturbation has no single pixels left.
        def resized(images: Tensor, side: int) -> Tensor:
            return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)

        small = resized(batch.images, 32)
        crafted = last_of_pgd(answer, small, batch.labels, budget)
        with pytest.raises(CrossguardError, match="broke its budget"):
            budget.check(resized(crafted, size), batch.images)


class Batched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.head = nn.Linear(8 * 36, 4)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(images))).flatten(1))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: type(attack).__name__)
def test_batch_statistics_are_refused(attack: ImageAttack) -> None:
    net, images, goal = Batched().requires_grad_(False), middle(6), Untargeted(torch.arange(6) % 4)
    statistics = net.norm.running_mean.clone()
    for victim in (net, ImageVictim(net)):
        with pytest.raises(CrossguardError, match="in training mode"):
            attack(victim, images, goal, Linf(0.02))
    assert torch.equal(net.norm.running_mean, statistics), "a refused network is left as it was"
    net.eval()
    made = attack(net, images, goal, Linf(0.02))
    assert torch.equal(net.norm.running_mean, statistics)
    alone = torch.cat(
        [attack(net, images[i : i + 1], goal.at(torch.tensor([i])), Linf(0.02), torch.tensor([i])) for i in range(6)]
    )
    assert torch.allclose(made, alone, atol=1e-4)


def test_batch_statistics_would_show_where_nobody_refuses_them() -> None:
    """A function hides its network; that answers then depend on the batch is what gives it away."""
    net, images, goal = Batched().requires_grad_(False), middle(6), Untargeted(torch.arange(6) % 4)
    attack, few = PGD(random_start=False, best=False, stop=False), torch.arange(3)
    made = attack(lambda pixels: net(pixels), images, goal, Linf(0.02))
    alone = attack(lambda pixels: net(pixels), images[few], goal.at(few), Linf(0.02))
    assert not torch.allclose(made[few], alone, atol=1e-4), "the mistake would not show"


def test_models_of_words_are_in_evaluation_mode() -> None:
    network = Tiny().load()
    assert not any(part.training for part in network.modules())


@pytest.mark.parametrize(
    "attack", [a for a in ATTACKS if not isinstance(a, EachTarget)], ids=lambda a: type(a).__name__
)
def test_a_wrong_sign_would_show(attack: ImageAttack) -> None:
    """Towards the target, not away from it: with the wrong sign no image ever gets there."""
    victim, images, budget = LinearVictim(4), middle(24), Linf(0.2)
    targets = victim(images).argsort(1)[:, 2]  # the best other class
    made = attack(victim, images, Targeted(targets), budget)
    arrived = victim(made).argmax(1) == targets
    assert float(arrived.float().mean()) > 0.9
    assert not bool((victim(images).argmax(1) == targets).any())

    if hasattr(attack, "loss"):

        @dataclasses.dataclass(frozen=True)
        class Wrong(Loss):
            def away(self, logits: Tensor, labels: Tensor) -> Tensor:
                return -CrossEntropy().away(logits, labels)

            def towards(self, logits: Tensor, targets: Tensor) -> Tensor:
                return -CrossEntropy().towards(logits, targets)

        backwards = dataclasses.replace(attack, loss=Wrong())(victim, images, Targeted(targets), budget)
        wrong = victim(backwards).argmax(1) == targets
        assert float(wrong.float().mean()) < 0.5, "the mistake would not show"


@pytest.mark.parametrize("loss", [CrossEntropy(), DLR()], ids=str)
def test_every_goal_has_the_sign_that_leads_to_it(loss: Loss) -> None:
    """A small step up the loss changes the logits as the goal wants: the label falls, or the target rises."""
    victim, images = LinearVictim(5), middle(16)
    logits = victim(images).detach()
    order = logits.argsort(1, descending=True)
    labels, other = order[:, 0], order[:, 2]

    def after(goal: Untargeted | Targeted | Towards) -> Tensor:
        gradient, _, _ = ImageVictim(victim).ascend(images, goal)
        return victim(images + 1e-4 * gradient.sign()).detach() - logits

    def of(moves: Tensor, classes: Tensor) -> Tensor:
        return moves.gather(1, classes[:, None])[:, 0]

    away = after(Untargeted(labels, loss))
    assert bool((of(away, labels) < of(away, order[:, 1])).all())
    towards = after(Targeted(other, loss))
    assert bool((of(towards, other) > of(towards, labels)).all())
    by_way = after(Towards(labels, other, loss))
    assert bool((of(by_way, other) > of(by_way, labels)).all())


@pytest.mark.parametrize("classes", [3, 4, 10])
def test_dlr_works_with_few_classes(classes: int) -> None:
    """With three classes the published ratio with a target has no fourth logit, and where the target is the third it
    would be constant: a gradient of zero, and an attack that stands still."""
    victim, images = LinearVictim(classes), middle(32)
    logits = victim(images).detach()
    labels = logits.argmax(1)
    third = logits.argsort(1, descending=True)[:, 2]
    for goal in (Untargeted(labels, DLR()), Targeted(third, DLR()), Towards(labels, third, DLR())):
        gradient, losses, _ = ImageVictim(victim).ascend(images, goal)
        assert bool((gradient.flatten(1).norm(dim=1) > 1e-3).all()) and bool(losses.isfinite().all())
    pixels = images.clone().requires_grad_(True)
    ranked = victim(pixels).sort(1, descending=True).values
    if classes == 3:
        constant = (ranked[:, 2] - ranked[:, 0]) / (ranked[:, 0] - ranked[:, 2] + 1e-12)
        assert float(torch.autograd.grad(constant.sum(), pixels)[0].abs().max()) < 1e-3, "the mistake would not show"
    needed = reach(victim, images, labels)
    budget = Linf(float(needed.median()))
    made = EachTarget(APGD(steps=20, loss=DLR()))(victim, images, Untargeted(labels), budget)
    within = needed < 0.98 * budget.eps
    assert int(within.sum()) > 5 and bool((victim(made).argmax(1) != labels)[within].all())


# Bad input: one clear sentence each


def linear(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :4]


EVERY: list[ImageAttack] = [
    PGD(steps=3),
    APGD(steps=3),
    EachTarget(PGD(steps=3)),
    FAB(steps=3),
    Square(queries=5),
    AutoAttack(),
]
LABELS = Untargeted(torch.tensor([0, 1, 2]))


def said(call: Callable[[], object]) -> str:
    with pytest.raises(CrossguardError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) > 20
    return sentence


@pytest.mark.parametrize("attack", EVERY, ids=lambda attack: type(attack).__name__)
def test_what_no_attack_can_use(attack: ImageAttack) -> None:
    images = middle(3)
    assert "allows no change of pixels" in said(lambda: attack.spends(Words(1)))
    nan = said(lambda: attack(lambda pixels: linear(pixels) * float("nan"), images, LABELS, Linf(0.1)))
    assert "not finite" in nan
    one = said(
        lambda: attack(
            lambda pixels: linear(pixels)[:, :1], images, Untargeted(torch.zeros(3, dtype=torch.int64)), Linf(0.1)
        )
    )
    assert "a single class" in one
    for wrong in (-1, -100, 4, 1000):
        labels = torch.tensor([0, wrong, 2])
        goals = (
            [Untargeted(labels)]
            if isinstance(attack, EachTarget | AutoAttack)
            else [Untargeted(labels), Targeted(labels)]
        )
        for goal in goals:
            sentence = said(functools.partial(attack, linear, images, goal, Linf(0.1)))
            assert f"class {wrong} does not exist" in sentence and "0 to 3" in sentence


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Linf(-8 / 255), "is not a budget"),
        (lambda: L2(-1.0), "is not a budget"),
        (lambda: L1(-1.0), "is not a budget"),
        (lambda: Linf(float("nan")), "is not a budget"),
        (lambda: PGD(steps=-1), "1 or more"),
        (lambda: APGD(steps=-1), "1 or more"),
        (lambda: FAB(steps=-1), "1 or more"),
        (lambda: Square(queries=-1), "1 or more"),
        (lambda: EachTarget(targets=-1), "1 or more"),
        (lambda: AutoAttack("nonsense"), "standard"),
        (lambda: Worst(()), "give some"),
        (lambda: Square()(linear, middle(3), LABELS, L1(3.0)), "Linf or L2"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], words: str) -> None:
    assert words in said(make)


def test_the_contract_refuses_an_attack_that_knows_the_wrong_way() -> None:
    @dataclasses.dataclass(frozen=True)
    class Descent(ImageAttack):
        def search(self, victim, clean, goal, budget, seeds):
            gradient, _, _ = victim.ascend(clean, goal)
            return Made(budget.project(clean - budget.eps * budget.ascent(gradient), clean))

    with pytest.raises(AssertionError, match="did not lower"):
        check_attack(Descent())
