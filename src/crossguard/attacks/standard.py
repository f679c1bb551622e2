"""The standard evaluations as one word each: AutoAttack and the pair of attacks that robust CLIP papers use."""

from __future__ import annotations

from dataclasses import dataclass

from crossguard.attacks.apgd import APGD
from crossguard.attacks.base import ImageAttack, ImageVictim, Made
from crossguard.attacks.boundary import FAB
from crossguard.attacks.meta import EOT, EachTarget, Restarts, Worst
from crossguard.attacks.query import Square
from crossguard.budgets import L1, PixelBudget
from crossguard.errors import CrossguardError
from crossguard.goals import DLR, Goal
from crossguard.shapes import Images, Seeds

VERSIONS = ("standard", "plus", "rand")


@dataclass(frozen=True)
class AutoAttack(ImageAttack):
    """The ensemble of Croce and Hein 2020 in its three versions, parameter-free: each attack starts from the clean
    image and runs on the images that survived the ones before; `parts` shows the expression.

    'standard' is APGD-CE, APGD-T, FAB-T and Square, 'plus' adds untargeted APGD-DLR and FAB and 5 restarts, 'rand'
    (for random models) is APGD-CE and APGD-DLR on the average of 20 draws. As in any `Worst`, no image stands that one
    of its attacks beats. Beaten images leave within a run, which they do not in the reference code.
    """

    version: str = "standard"

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise CrossguardError(f"AutoAttack(version={self.version!r}) is unknown; give one of {', '.join(VERSIONS)}")

    @property
    def needs_classes(self) -> bool:
        return True

    def parts(self, budget: PixelBudget) -> tuple[ImageAttack, ...]:
        """The attacks in their order. In L1, APGD-CE has 5 restarts, APGD-T 5 targets, both the schedule of larger
        radii first (Croce and Hein 2021), and there is no Square, which the reference code has in L1 too."""
        sparse = isinstance(budget, L1)
        black = () if sparse else (Square(),)
        once = APGD(large_eps=sparse)
        each = EachTarget(APGD(loss=DLR(), large_eps=sparse), 5 if sparse else 9)
        if self.version == "rand":
            return EOT(once, 20), EOT(APGD(loss=DLR(), large_eps=sparse), 20)
        if self.version == "plus":
            return (
                Restarts(once, 5),
                Restarts(APGD(loss=DLR(), large_eps=sparse), 5),
                FAB(targets=None, restarts=5),
                *black,
                each,
                FAB(),
            )
        return Restarts(once, 5) if sparse else once, each, FAB(), *black

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        return Worst(self.parts(budget)).search(victim, clean, goal, budget, seeds)


@dataclass(frozen=True)
class RobustCLIP(ImageAttack):
    """APGD-CE, then APGD-T on what survives: the protocol of robust CLIP evaluations (FARE, Schlarmann et al. 2024;
    facts from the code of RobustVLM), a quarter of the cost of AutoAttack.

    It has no black-box attack, so it can't notice masked gradients; use AutoAttack for a number to quote.
    """

    steps: int = 100
    targets: int = 9

    @property
    def needs_classes(self) -> bool:
        return True

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        parts = APGD(steps=self.steps), EachTarget(APGD(steps=self.steps, loss=DLR()), self.targets)
        return Worst(parts).search(victim, clean, goal, budget, seeds)
