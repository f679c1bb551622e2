"""Our attacks beside those of foolbox, torchattacks and AutoAttack, and the mistakes that make attacks weak by accident:
each is made here on purpose, to see that it would be noticed."""

from __future__ import annotations

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
from crossguard.budgets import PixelBudget
from crossguard.goals import ByWayOf, CrossEntropy, Loss
from crossguard.seeds import by_position, normal, uniform
from crossguard.testing import LinearVictim, check_attack

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


@functools.cache
def convnet() -> nn.Module:
    """A small network that tells noisy templates apart, with boundaries some way off its data."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(216, 48), nn.ReLU(), nn.Linear(48, 10),
        )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(60):
        images, labels = templates(64, 64 * step)
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def templates(count: int, start: int = 99991) -> tuple[Tensor, Tensor]:
    clean = 0.5 + 0.12 * normal(torch.arange(10) + 1000, (3, 10, 10))
    labels = (torch.arange(count) * 7 + start) % 10
    return (clean[labels] + 0.12 * normal(by_position(count) + 5000 + start, (3, 10, 10))).clamp(0, 1), labels


def middle(count: int, size: int = 6) -> Tensor:
    """Images far from the borders of the pixel range, so that the box never binds."""
    return 0.4 + 0.2 * uniform(by_position(count), (3, size, size))


# The same loops, pixel for pixel


def last_of_pgd(net: nn.Module, images: Tensor, labels: Tensor, budget: PixelBudget) -> Tensor:
    return PGD(steps=10, random_start=False, best=False, stop=False)(net, images, Untargeted(labels), budget)


@pytest.mark.parametrize("budget", [Linf(0.04), L2(0.5)], ids=str)
def test_pgd_is_that_of_foolbox(budget: Linf | L2) -> None:
    foolbox = pytest.importorskip("foolbox")
    net, (images, labels) = convnet(), templates(32)
    kind = foolbox.attacks.LinfPGD if isinstance(budget, Linf) else foolbox.attacks.L2PGD
    attack = kind(steps=10, random_start=False, abs_stepsize=0.25 * budget.eps)
    victim = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    _, theirs, _ = attack(victim, images, labels, epsilons=budget.eps)
    compare(last_of_pgd(net, images, labels, budget), theirs, images, budget)


@pytest.mark.parametrize("budget", [Linf(0.04), L2(0.5)], ids=str)
def test_pgd_is_that_of_torchattacks(budget: Linf | L2) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    net, (images, labels) = convnet(), templates(32)
    kind = torchattacks.PGD if isinstance(budget, Linf) else torchattacks.PGDL2
    with torch.enable_grad():
        theirs = kind(net, eps=budget.eps, alpha=0.25 * budget.eps, steps=10, random_start=False)(images, labels)
    compare(last_of_pgd(net, images, labels, budget), theirs, images, budget)


def compare(ours: Tensor, theirs: Tensor, clean: Tensor, budget: Linf | L2) -> None:
    assert float((ours - clean).abs().max()) > 0.01, "nothing moved, so nothing was compared"
    if isinstance(budget, Linf):
        assert torch.equal(ours, theirs)
    else:
        # They guard the norm with other constants and divide in another order, so rounding differs.
        assert torch.allclose(ours, theirs, atol=1e-6)


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
        return dict(zip(names, (shorten(part, changes) for part in AutoAttack().parts(budget)), strict=True))

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


def shorten(attack: ImageAttack, changes: dict[str, int]) -> ImageAttack:
    fields = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}
    inner = {name: shorten(value, changes) for name, value in fields.items() if isinstance(value, ImageAttack)}
    return dataclasses.replace(attack, **{name: changes[name] for name in changes if name in fields}, **inner)


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
    """No more than one image in 500 above theirs: with so few, none for what follows the gradient. Random search finds
    other images with other noise; there the sum over the seeds may be off by a standard deviation."""
    print(contests)
    for name in contests[0]:
        ours, theirs = (sum(counts[name][side] for counts in contests) for side in (0, 1))
        slack = images // 500
        assert ours <= theirs + slack, f"{name} leaves {ours} images standing and AutoAttack's {theirs}: {contests}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("budget", [Linf(0.05), L2(0.8)], ids=str)
def test_as_strong_as_autoattack_on_a_small_network(budget: PixelBudget) -> None:
    net, (images, labels) = convnet(), templates(64)
    contests = [contest(net, images, labels, budget, Size(15, 3, 60), seed) for seed in range(3)]
    judge(contests, 3 * len(images))


@needs_data
@pytest.mark.filterwarnings("ignore")
def test_as_strong_as_autoattack_on_a_resnet() -> None:
    net = victims().resnet(20)
    images, labels = victims().pictures("test", 10)
    judge([contest(net, images, labels, Linf(1 / 255), Size(8, 2, 40), seed) for seed in range(1)], 10)
