"""Attacks made of attacks: the worst of several, again with other noise, one class after the other, on average over
what is random."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from crossguard.attacks.base import Found, ImageAttack, ImageVictim, Made, altered, spelled
from crossguard.attacks.gradient import PGD
from crossguard.budgets import PixelBudget
from crossguard.errors import CrossguardError
from crossguard.goals import DLR, Goal, Towards, Untargeted, classification
from crossguard.seeds import fold, normal
from crossguard.shapes import Images, Labels, Logits, Mask, PerImage, Seeds
from crossguard.telling import part, tell


@dataclass(frozen=True)
class Worst(ImageAttack):
    """One attack after the other, each on the images that still stand: the ensemble of AutoAttack (Croce and Hein
    2020), and the worst case per image that Carlini et al. 2019 ask for.

    Where somebody else judges (`Goal.lasting`) every attack runs on every image. Of the results the strongest counts:
    one that has won before one that has not, and the one of the largest margin among equals. Against a victim that
    draws noise the results are compared by the same five draws for all (`ImageVictim.judge`), which costs five forwards
    for each attack; on a fixed victim it costs one in all, for the clean images.

    Each attack draws the noise that it would draw alone with the same seeds, and meets the same noise of the victim.
    So an image that one of them beats alone never stands here (by the five draws, if the victim draws noise). What
    remains is that networks round a little differently in batches of another size. Where an attack is listed again, it
    has other noise.
    """

    attacks: tuple[ImageAttack, ...] = (PGD(), PGD(loss=DLR()))

    def __post_init__(self) -> None:
        if not self.attacks:
            raise CrossguardError("Worst() of no attacks does nothing; give some, such as Worst((PGD(), Square()))")
        for number, attack in enumerate(self.attacks):
            if attack in self.attacks[:number] and not attack.draws:
                raise CrossguardError(
                    f"Worst() holds {spelled(attack)} twice, which draws no noise and finds the same again; leave one "
                    "out, or give it restarts of its own"
                )

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        contest = _Contest(victim, clean, goal, budget, seeds)
        for number, attack in enumerate(self.attacks):
            with part("{} ({} of {})", spelled(attack), number + 1, len(self.attacks)):
                contest.run(attack, self.attacks[:number].count(attack))
        return contest.found.made()


@dataclass(frozen=True)
class Restarts(ImageAttack):
    """The same attack `count` times, each time with other noise, on the images that still stand."""

    attack: ImageAttack = field(default_factory=PGD)
    count: int = 5

    def __post_init__(self) -> None:
        if self.count < 1:
            raise CrossguardError(f"Restarts(count={self.count}) does nothing; give 1 or more")
        if self.count > 1 and not self.attack.draws:
            raise CrossguardError(
                f"Restarts of {spelled(self.attack)} find the same again, since it draws no noise; give it a random "
                "start or restarts of its own, if it has such a setting, such as FAB(restarts=5)"
            )

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        return Worst((self.attack,) * self.count).search(victim, clean, goal, budget, seeds)


@dataclass(frozen=True)
class EachTarget(ImageAttack):
    """The attack once towards each of the likeliest other classes, most likely first, on the images that still stand.

    `EachTarget(APGD(loss=DLR()))` is APGD-T of AutoAttack. Classes that can't be told from the label (their names are
    the same, so their logits are) are no way out and come last; with fewer classes than targets all are taken. What
    was found towards one class is compared with the rest as in `Worst`. Each run has noise of its own, since it is the
    same attack again, and the first has that of the attack alone; more targets never lose an image that fewer beat.

    Args:
        targets: how many classes; AutoAttack takes 9.
    """

    attack: ImageAttack = field(default_factory=PGD)
    targets: int = 9

    def __post_init__(self) -> None:
        if self.targets < 1:
            raise CrossguardError(f"EachTarget(targets={self.targets}) aims at nothing; give 1 or more classes")

    @property
    def needs_classes(self) -> bool:
        return True

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        aim = classification(goal, "EachTarget")
        if not isinstance(aim, Untargeted):
            raise CrossguardError("EachTarget serves an untargeted goal; a targeted one has its class already")
        contest = _Contest(victim, clean, goal, budget, seeds)
        aims = likeliest(contest.outputs, aim.labels, self.targets)
        for number, targets in enumerate(aims):
            with part("class {} of {}", number + 1, len(aims)):
                contest.run(self.attack, number, Towards(aim.labels, targets, aim.criterion, ends=goal.ends))
        return contest.found.made()


@dataclass(frozen=True)
class EOT(ImageAttack):
    """The attack on the average over everything random (expectation over transformation, Athalye et al. 2018): each
    step averages gradients, losses and outputs over several draws of the model's own noise.

    Where the model that is searched is also the judge, in other draws, PGD and APGD let an image go that has won in
    each of the last `SURE` draws, of one step after the other. After so many no more than 5 % of all draws can still be
    right about it, at 95 % confidence, and most of them decide. That rule is ours; without it nearly all of the work
    would be for images that are beaten.

    Args:
        samples: draws; AutoAttack's 'rand' takes 20.
        noise: standard deviation of Gaussian pixel noise added to each draw, in pixels of [0, 1], where they stay; it
            smooths a deterministic model whose gradient is shattered.
        flip: mirror every second draw: an adversary for defenses that look at mirrored views.
    """

    attack: ImageAttack = field(default_factory=PGD)
    samples: int = 20
    noise: float = 0.0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise CrossguardError(f"EOT(samples={self.samples}) averages over nothing; give 1 or more")
        if not self.noise >= 0.0:
            raise CrossguardError(f"EOT(noise={self.noise}) is not possible; give 0 or more, in pixels of [0, 1]")

    @property
    def draws(self) -> bool:
        return super().draws or self.noise > 0.0

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        if isinstance(victim, _Averaged):
            raise CrossguardError("an EOT inside an EOT averages twice; give one of them more samples instead")
        held = {item.name: getattr(victim, item.name) for item in fields(ImageVictim)}
        averaged = _Averaged(**held, samples=self.samples, noise=self.noise, flip=self.flip)
        if goal.redrawn and self.attack.hears:
            won = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
            averaged, goal = replace(averaged, won=won), replace(goal, ends=True, redrawn=False)
        # What beats the average may not beat the model itself, so nothing is said of the images.
        return Made(self.attack.craft(averaged, clean, goal, budget, seeds).images)


@dataclass(frozen=True)
class PredictedLabel(ImageAttack):
    """The attack with the victim's own clean answer for a label: an adversary who doesn't know the truth.

    Robust accuracy that is higher under the true label than under this one, or higher than clean accuracy, says that
    the defense reads the label off the perturbation (label leakage, Kurakin et al. 2017).
    """

    attack: ImageAttack = field(default_factory=PGD)

    @property
    def needs_classes(self) -> bool:
        return True

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        aim = classification(goal, "PredictedLabel")
        if not isinstance(aim, Untargeted):
            raise CrossguardError("PredictedLabel serves an untargeted goal; a targeted one needs no label")
        own = replace(aim, labels=victim(clean).argmax(1))
        # Won was another goal than that of whoever asks, so nothing is said of the images.
        return Made(self.attack.craft(victim, clean, own, budget, seeds).images)


@dataclass(frozen=True)
class BF16(ImageAttack):
    """The attack in bfloat16 autocast, for hardware that is faster in it; whoever judges does so in float32.

    What only rounding has beaten still stands for the judge, so a number to quote takes the survivors again in full
    precision: `Worst((BF16(attack), attack))`. Float16 is not offered: its gradients underflow.
    """

    attack: ImageAttack = field(default_factory=PGD)

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        def rounded(full: Callable[[Images], Tensor]) -> Callable[[Images], Tensor]:
            def answer(images: Images) -> Tensor:
                with torch.autocast(images.device.type, torch.bfloat16):
                    return full(images).float()

            return answer

        half = altered(victim.answer, rounded)
        # What it knows of its images it knows in bfloat16, so nothing is said of them.
        return Made(self.attack.craft(replace(victim, answer=half), clean, goal, budget, seeds).images)


@dataclass(frozen=True)
class _Averaged(ImageVictim):
    """A victim whose answers are means over several draws.

    Args:
        won: of each sample how many draws in a row it has won; None, if an average is enough to have won.
    """

    samples: int = 1
    noise: float = 0.0
    flip: bool = False
    won: Tensor | None = None

    def __call__(self, images: Images) -> Tensor:
        outputs = [super(_Averaged, self).__call__(view) for view in self._views(images)]
        return torch.stack(outputs).mean(0)

    def judge(self, images: Images, goal: Goal) -> tuple[Mask, PerImage]:
        # The same draw again and again would have no average; single draws are what the model is judged by anyway.
        return ImageVictim(self.answer, self.queries, self.seeds, self.rows).judge(images, goal)

    def ascend(self, images: Images, goal: Goal) -> tuple[Images, PerImage, Tensor]:
        gradient, losses, outputs = torch.zeros_like(images), images.new_zeros(len(images)), None
        for number, view in enumerate(self._views(images)):
            one, loss, output = super().ascend(view, goal)
            gradient += one.flip(3) if self._mirrored(number) else one
            losses += loss
            if self.won is not None:
                self.won.copy_(torch.where(goal.won(output), self.won + 1, 0))
            outputs = output if outputs is None else outputs + output
        assert outputs is not None
        return gradient / self.samples, losses / self.samples, outputs / self.samples

    def heard(self, outputs: Tensor, goal: Goal) -> tuple[Mask, PerImage]:
        won, merit = super().heard(outputs, goal)
        return won if self.won is None else self.won >= SURE, merit

    def at(self, keep: Tensor) -> _Averaged:
        """The same for some of the samples, which go on counting by themselves: another start begins anew."""
        part = super().at(keep)
        assert isinstance(part, _Averaged)
        return part if self.won is None else replace(part, won=self.won[keep])

    @property
    def steady(self) -> bool:
        return not self.noise and super().steady

    def _views(self, images: Images) -> Iterable[Images]:
        for number in range(self.samples):
            view = images
            if self.noise and self.seeds is not None and self.queries is not None:
                noise = normal(fold(self.keys(), _VIEWS), images.shape[1:], images.device)
                view = (view + self.noise * noise).clamp(0.0, 1.0)  # a victim is asked about images
            yield view.flip(3) if self._mirrored(number) else view

    def _mirrored(self, number: int) -> bool:
        return self.flip and number % 2 == 1


SURE = 64  # draws in a row: 1 - 0.05 ** (1 / 64) is 4.6 %
_VIEWS = 7  # sets the noise of the views apart from that of the model
_TURNS = 1000  # sets the noise of an attack that runs for the n-th time apart from that of its own n-th restart
_APART = 2**32  # questions, more than any attack asks: sets the victim's noise apart when an attack runs again


class _Contest:
    """Attacks that run one after the other on the samples that still stand, and the strongest image of each sample.

    Every attack draws what it would draw if it ran alone: its own noise follows from the same keys, and to a victim
    that draws noise its questions are the first. So what it beats alone is beaten here.

    Attributes:
        found: the strongest image of each sample so far; the clean one, before any attack.
        outputs: those of the clean images.
    """

    def __init__(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> None:
        self.victim, self.clean, self.goal, self.budget, self.seeds = victim, clean, goal, budget, seeds
        self.asked = victim.asked()
        self.found, self.outputs = Found.nothing(clean, goal.ends), victim(clean)
        unchanged = Made(clean, goal.won(self.outputs), goal.merit(self.outputs))
        self.found.take(torch.arange(len(clean), device=clean.device), unchanged, victim, goal)

    def run(self, attack: ImageAttack, before: int = 0, way: Goal | None = None) -> None:
        """Runs one attack.

        Args:
            before: how often the same attack has run before; each time it has other noise.
            way: the goal of the attack itself, where that is another way to win the same.
        """
        rows = self.found.open()
        if not len(rows):
            return
        victim = self.victim.numbered(self.asked + before * _APART).at(rows)
        seeds = fold(self.seeds, before + _TURNS) if before else self.seeds
        stood = ~self.found.won
        tell("{} standing", stood.sum())
        made = attack.craft(victim, self.clean[rows], (way or self.goal).at(rows), self.budget, seeds[rows])
        self.found.take(rows, made, victim, self.goal.at(rows))
        tell("{} -> {} standing", stood.sum(), (~self.found.won).sum())


def likeliest(logits: Logits, labels: Labels, count: int) -> list[Labels]:
    """The `count` other classes of highest logit, as one label per image each, or as many as there are; those that
    can't be told from the label come last."""
    own = logits.gather(1, labels[:, None])
    others = torch.where(logits == own, -torch.finfo(logits.dtype).max, logits).scatter(1, labels[:, None], -torch.inf)
    ranked = others.argsort(dim=1, descending=True, stable=True)
    return list(ranked[:, : min(count, logits.shape[1] - 1)].unbind(1))
