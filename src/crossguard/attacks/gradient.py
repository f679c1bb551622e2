"""The projected-gradient family: one search for every norm, goal and victim."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from crossguard.attacks.base import Found, ImageAttack, ImageVictim, Made
from crossguard.budgets import PixelBudget
from crossguard.device import looks
from crossguard.errors import CrossguardError
from crossguard.goals import Goal, Loss
from crossguard.shapes import Images, Seeds
from crossguard.telling import tell

ROUND = 4  # steps, after which to see whether an image is back where it was: circles of 1, 2 and 4 points


@dataclass(frozen=True)
class PGD(ImageAttack):
    """Projected gradient ascent on the goal's loss (Madry et al. 2018).

    Settings of the same search: FGSM (Goodfellow et al. 2015) is `PGD(steps=1, step=1, random_start=False)`, BIM
    (Kurakin et al. 2017) `PGD(random_start=False)`, MI-FGSM (Dong et al. 2018) `PGD(momentum=1, random_start=False)`,
    and the CW attack of the CLIP literature `PGD(loss=Margin())`. MMCoA trains against `PGD(steps=10, step=1,
    best=False, stop=False)`.

    Args:
        steps: gradient steps of each start.
        step: length of a step as a fraction of the budget.
        momentum: decay of the accumulated gradient, each one normalized by its mean absolute value before it is added.
        random_start: start at a random point of the budget instead of the clean image.
        nonnegative_start: no pixel starts darker than it was, a quirk of the released code of Co-Attack.
        restarts: independent starts; the strongest result of each image counts. Later starts are always random.
        best: return the strongest iterate (`Found`) instead of the last one. Costs one forward a start. Against a
            victim that draws noise that is the luckiest of single draws; `EOT` compares averages.
        stop: images that have won leave the batch, if the goal ends there, and so do those that go in circles; their
            result cannot change. Without `best`, where winning ends nothing, those leave that go to and fro between two
            points, or stay at one; the result is the point at which they would end. Who leaves makes the batch smaller,
            and gradients in a smaller batch are rounded differently.
        loss: climb this loss of the logits instead of the goal's own.
    """

    steps: int = 10
    step: float = 0.25
    momentum: float = 0.0
    random_start: bool = True
    restarts: int = 1
    best: bool = True
    stop: bool = True
    loss: Loss | None = None
    nonnegative_start: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise CrossguardError(f"PGD(steps={self.steps}) does nothing; give 1 or more steps")
        if not self.step > 0:
            raise CrossguardError(
                f"PGD(step={self.step}) does not climb; give a positive fraction of the budget, such as 0.25"
            )
        if self.momentum < 0:
            raise CrossguardError(f"PGD(momentum={self.momentum}) is not possible; give 0 or more")
        if self.restarts < 1:
            raise CrossguardError(f"PGD(restarts={self.restarts}) is not possible; give 1 or more")

    @property
    def needs_classes(self) -> bool:
        return self.loss is not None

    @property
    def hears(self) -> bool:
        return self.stop and self.best

    @property
    def draws(self) -> bool:
        return self.random_start or self.restarts > 1

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        if self.loss is not None:
            goal = goal.climbing(self.loss)
        if budget.eps == 0.0:
            return Made(clean.clone())
        found = Found.nothing(clean, goal.ends and self.stop)
        for start, keep, noise in found.starts(self.restarts, seeds):
            self._climb(found, keep, victim.at(keep), clean[keep], goal.at(keep), budget, noise, start > 0)
        return found.made() if self.best else Made(found.images)

    def _climb(
        self,
        found: Found,
        rows: torch.Tensor,
        victim: ImageVictim,
        clean: Images,
        goal: Goal,
        budget: PixelBudget,
        seeds: Seeds,
        random: bool,
    ) -> None:
        """One start for the images at `rows`; what it finds goes into `found`."""
        images = clean
        if self.random_start or random:
            noise = budget.sample(seeds, clean)
            images = budget.project(clean + (noise.abs() if self.nonnegative_start else noise), clean)
        velocity = torch.zeros_like(clean) if self.momentum else None
        length = self.step * budget.eps
        before = None  # where the images were a round ago, and their losses
        circling = torch.zeros(len(rows), dtype=torch.bool, device=clean.device)
        returning = self.stop and not self.best and velocity is None
        path = list[Images]()  # where the images were two steps ago, and one step ago
        for step in range(self.steps):
            if returning and len(path) == 2 and victim.steady and looks(step, clean.device):
                back = (images == path[0]).flatten(1).all(1)
                if bool(back.any()):
                    left = self.steps - step
                    found.images[rows[back]] = (path[1] if left % 2 else images)[back]
                    keep = (~back).nonzero()[:, 0]
                    if len(keep) == 0:
                        return
                    rows, images, clean = rows[keep], images[keep], clean[keep]
                    victim, goal, path = victim.at(keep), goal.at(keep), [one[keep] for one in path]
            path = [*path[-1:], images] if returning else path
            gradient, losses, outputs = victim.ascend(images, goal)
            if self.best:
                found.offer(rows, images, *victim.heard(outputs, goal))
            if self.stop and self.best:
                if velocity is None and step % ROUND == 0:
                    # Steps of a fixed length end in circles, most of two points. All of a circle's points have been
                    # offered, and who answers alike can only go round again.
                    if before is not None and victim.steady:
                        circling = circling | ((images == before[0]).flatten(1).all(1) & (losses == before[1]))
                    before = images, losses
                if looks(step, clean.device):
                    victim.check()
                    keep = (~(circling | found.won[rows] if found.ends else circling)).nonzero()[:, 0]
                    tell("step {} of {}, {} images go on", step + 1, self.steps, len(keep))
                    if len(keep) == 0:
                        return
                    if len(keep) < len(rows):
                        rows, images, clean, gradient = rows[keep], images[keep], clean[keep], gradient[keep]
                        victim, goal, circling = victim.at(keep), goal.at(keep), circling[keep]
                        velocity = None if velocity is None else velocity[keep]
                        before = None if before is None else (before[0][keep], before[1][keep])
            if velocity is not None:
                norm = gradient.abs().flatten(1).mean(1).clamp_min(1e-30).view(-1, 1, 1, 1)
                velocity = self.momentum * velocity + gradient / norm
                gradient = velocity
            images = budget.project(torch.add(images, budget.ascent(gradient), alpha=length), clean)
        if self.best:
            found.offer(rows, images, *victim.heard(victim(images), goal))
        else:
            found.images[rows] = images
