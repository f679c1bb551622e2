"""Auto-PGD: gradient ascent that finds its own step sizes, so that nothing has to be tuned to a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from crossguard.attacks.base import Found, ImageAttack, ImageVictim, Made, spelled
from crossguard.budgets import L1, PixelBudget, per_image
from crossguard.device import looks
from crossguard.errors import CrossguardError
from crossguard.goals import Goal, Loss
from crossguard.shapes import Images, PerImage, Seeds
from crossguard.telling import tell


@dataclass(frozen=True)
class APGD(ImageAttack):
    """Auto-PGD (Croce and Hein 2020, Algorithm 1): every image has a step size of its own, which is halved at
    checkpoints where the loss has stopped rising, and the search goes on from its best point.

    APGD-CE of AutoAttack is `APGD()`, APGD-DLR is `APGD(loss=DLR())`; APGD-T is the latter with a goal `Towards` each
    target. Within an `L1` budget it is their l1-APGD (Croce and Hein 2021): steps along few coordinates, as many as the
    best point so far suggests.

    Outcomes equal those of the authors' code from the same start. Two accidents of that code are left out: it compares
    the first loss with 0 instead of the loss at the start, and with `large_eps` it counts coordinates that only
    rounding has changed as changed.

    Args:
        steps: gradient steps of each start.
        restarts: independent starts; the strongest image of all (`Found`) counts. Later starts are always random.
        loss: climb this loss of the logits instead of the goal's own.
        rho: the step is halved where the loss rose in no more than this fraction of the steps since the last
            checkpoint.
        random_start: start at a random point of the budget's surface instead of the clean image.
        stop: images that have won leave the batch, if the goal ends there; their result cannot change.
        large_eps: spend 30 % of the steps within three times the budget and 30 % within twice of it, each time going
            on from the best point pulled back (Croce and Hein 2021). For L1 only, as in AutoAttack.
    """

    steps: int = 100
    restarts: int = 1
    loss: Loss | None = None
    rho: float = 0.75
    random_start: bool = True
    stop: bool = True
    large_eps: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise CrossguardError(f"APGD(steps={self.steps}) does nothing; give 1 or more steps")
        if self.large_eps and self.steps < 5:
            raise CrossguardError(
                f"APGD(steps={self.steps}, large_eps=True) leaves no step for the budget itself; give 5 or more steps"
            )
        if self.restarts < 1:
            raise CrossguardError(f"APGD(restarts={self.restarts}) is not possible; give 1 or more")
        if not 0.0 < self.rho < 1.0:
            raise CrossguardError(
                f"APGD(rho={self.rho}) is no fraction of steps; give one between 0 and 1, such as 0.75"
            )

    @property
    def needs_classes(self) -> bool:
        return self.loss is not None

    @property
    def hears(self) -> bool:
        return self.stop

    @property
    def draws(self) -> bool:
        return self.random_start or self.restarts > 1

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        if self.large_eps and not isinstance(budget, L1):
            raise CrossguardError(
                f"APGD(large_eps=True) needs an L1 budget, not {spelled(budget)}; leave out large_eps"
            )
        if self.loss is not None:
            goal = goal.climbing(self.loss)
        if budget.eps == 0.0:
            return Made(clean.clone())
        found = Found.nothing(clean, goal.ends and self.stop)
        for start, keep, noise in found.starts(self.restarts, seeds):
            random = self.random_start or start > 0
            self._start(found, keep, victim.at(keep), clean[keep], goal.at(keep), budget, noise if random else None)
        return found.made()

    def _start(
        self,
        found: Found,
        rows: Tensor,
        victim: ImageVictim,
        clean: Images,
        goal: Goal,
        budget: PixelBudget,
        seeds: Seeds | None,
    ) -> None:
        """One start for the images at `rows`, at random if there are seeds; what it finds goes into `found`."""
        stages = self._stages(budget)
        images = clean
        if seeds is not None:
            images = (clean + stages[0][0].surface(seeds, clean)).clamp_(0.0, 1.0)
        for (wide, steps), (narrow, _) in pairwise(stages):
            images = narrow.project(self._scout(self._begin(rows, clean, images, wide), victim, goal, steps), clean)
        self._climb(found, self._begin(rows, clean, images, budget), victim, goal, stages[-1][1])

    def _begin(self, rows: Tensor, clean: Images, images: Images, budget: PixelBudget) -> _Climb:
        if isinstance(budget, L1):
            return _Sparse(rows, clean, images, budget, staged=self.large_eps)
        return _Dense(rows, clean, images, budget, self.rho)

    def _stages(self, budget: PixelBudget) -> list[tuple[PixelBudget, int]]:
        """The balls to search one after the other, with the number of steps in each; the last is the budget."""
        if not self.large_eps or not isinstance(budget, L1):
            return [(budget, self.steps)]
        part = math.ceil(0.3 * self.steps)
        wider = [(replace(budget, eps=factor * budget.eps), part) for factor in (3.0, 2.0)]
        return [*wider, (budget, self.steps - 2 * part)]

    def _scout(self, climb: _Climb, victim: ImageVictim, goal: Goal, steps: int) -> Images:
        """The images of the highest loss within a wider ball: where to go on from, since nobody wins there."""
        checkpoints = climb.checkpoints(steps)
        for step in range(steps):
            gradient, losses, _ = victim.ascend(climb.images, goal)
            climb.hear(gradient, losses)
            if step in checkpoints:
                climb.check(checkpoints[step])
            climb.move()
        better = goal.loss(victim(climb.images)) > climb.best_losses
        return torch.where(per_image(better), climb.images, climb.best)

    def _climb(self, found: Found, climb: _Climb, victim: ImageVictim, goal: Goal, steps: int) -> None:
        """Climbs within the budget; all images on the way are offered."""
        checkpoints = climb.checkpoints(steps)
        for step in range(steps):
            gradient, losses, outputs = victim.ascend(climb.images, goal)
            found.offer(climb.rows, climb.images, *victim.heard(outputs, goal))
            if looks(step, climb.images.device):
                victim.check()
                keep = (~found.won[climb.rows]).nonzero()[:, 0] if found.ends else climb.rows
                tell("step {} of {}, {} images go on", step + 1, steps, len(keep))
                if len(keep) == 0:
                    return
                if len(keep) < len(climb.rows):
                    climb.keep(keep)
                    victim, goal, gradient, losses = victim.at(keep), goal.at(keep), gradient[keep], losses[keep]
            climb.hear(gradient, losses)
            if step in checkpoints:
                climb.check(checkpoints[step])
            climb.move()
        # Nothing follows the last point, so it costs no gradient.
        found.offer(climb.rows, climb.images, *victim.heard(victim(climb.images), goal))


class _Climb(ABC):
    """The images of one start that still climb, and all that belongs to each of them: every tensor has a row for
    each."""

    def __init__(self, rows: Tensor, clean: Images, images: Images) -> None:
        self.rows, self.clean, self.images = rows, clean, images
        self.gradient, self.losses = torch.zeros_like(clean), clean.new_full((len(clean),), torch.inf)
        self.best, self.best_gradient = images, self.gradient
        self.best_losses = -self.losses

    def keep(self, rows: Tensor) -> None:
        """Forgets all but these images; what happens to them does not depend on the others."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])

    def hear(self, gradient: Images, losses: PerImage) -> None:
        """What the victim says about the current images."""
        better = losses > self.best_losses
        self.best_losses = torch.where(better, losses, self.best_losses)
        self.best = torch.where(per_image(better), self.images, self.best)
        self.best_gradient = torch.where(per_image(better), gradient, self.best_gradient)
        self.gradient, self.losses = gradient, losses

    def restart(self, where: Tensor) -> None:
        """Goes on from the best point of these images."""
        self.images = torch.where(per_image(where), self.best, self.images)
        self.gradient = torch.where(per_image(where), self.best_gradient, self.gradient)

    @abstractmethod
    def checkpoints(self, steps: int) -> dict[int, int]:
        """After how many steps to look back, and on how many."""

    @abstractmethod
    def check(self, span: int) -> None:
        """Looks back on the last `span` steps."""

    @abstractmethod
    def move(self) -> None:
        """Takes a step."""


class _Dense(_Climb):
    """Linf and L2 (Croce and Hein 2020, Algorithm 1): steps with momentum, halved where the loss has stopped rising."""

    def __init__(self, rows: Tensor, clean: Images, images: Images, budget: PixelBudget, rho: float) -> None:
        super().__init__(rows, clean, images)
        self.budget, self.rho = budget, rho
        self.before: Images | None = None
        self.length = torch.full_like(self.losses, 2.0 * budget.eps)
        self.rises = torch.zeros_like(rows)
        self.halved = torch.ones_like(rows, dtype=torch.bool)
        self.checked = self.losses

    def hear(self, gradient: Images, losses: PerImage) -> None:
        self.rises = self.rises + (losses > self.losses)
        super().hear(gradient, losses)

    def checkpoints(self, steps: int) -> dict[int, int]:
        span, shorter, least = (max(int(fraction * steps), 1) for fraction in (0.22, 0.03, 0.06))
        step, spans = span, {}
        while step < steps:
            spans[step] = span
            span = max(span - shorter, least)
            step += span
        return spans

    def check(self, span: int) -> None:
        # Equality counts as stuck, as in the authors' code; the paper's inequality is strict.
        stuck = (self.rises <= self.rho * span) | (~self.halved & (self.best_losses <= self.checked))
        self.length = torch.where(stuck, self.length / 2.0, self.length)
        self.halved, self.checked, self.rises = stuck, self.best_losses, torch.zeros_like(self.rises)
        self.restart(stuck)

    def move(self) -> None:
        step = torch.addcmul(self.images, per_image(self.length), self.budget.ascent(self.gradient))
        images = self.budget.project(step, self.clean)
        if self.before is not None:
            images = torch.lerp(self.images, images, 0.75).add_(self.images, alpha=0.25).sub_(self.before, alpha=0.25)
            images = self.budget.project(images, self.clean)
        self.before, self.images = self.images, images


class _Sparse(_Climb):
    """L1 (Croce and Hein 2021): steps along the coordinates of the largest gradient, as many as the best point has
    changed, divided by 1.5. Where their number has settled the step shrinks; where it still falls the search starts
    over from the best point with the full step."""

    def __init__(self, rows: Tensor, clean: Images, images: Images, budget: L1, staged: bool) -> None:
        super().__init__(rows, clean, images)
        self.budget = budget
        self.length = torch.full_like(self.losses, budget.eps)
        self.changed = self._changed(images) if staged else torch.full_like(self.losses, clean[0].numel())
        self.density = self.changed / clean[0].numel() / 1.5 if staged else torch.full_like(self.losses, 0.2)
        self.most = self._most()

    def _changed(self, images: Images) -> PerImage:
        return (images != self.clean).flatten(1).sum(1, dtype=torch.float32)

    def _most(self) -> int:
        """How many coordinates the widest step has. Reading that makes the program wait for an accelerator, as often as
        the search looks back and no more."""
        return self.budget.coordinates(float(self.density.max()), self.clean[0].numel())

    def checkpoints(self, steps: int) -> dict[int, int]:
        span = max(int(0.04 * steps), 1)
        return dict.fromkeys(range(span, steps, span), span)

    def check(self, span: int) -> None:
        changed = self._changed(self.best)
        sparser = changed / self.changed < 0.95
        self.density = changed / self.clean[0].numel() / 1.5
        self.changed, self.most = changed, self._most()
        eps = self.budget.eps
        self.length = torch.where(sparser, eps, (self.length / 1.5).clamp_min(eps / 10.0))
        self.restart(sparser)

    def move(self) -> None:
        direction = self.budget.ascent(self.gradient, self.density, self.most)
        step = torch.addcmul(self.images, per_image(self.length), direction)
        self.images = self.budget.project(step, self.clean)
