"""Minimum-norm attacks: they look for the nearest point beyond the decision boundary, whatever its distance."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from crossguard.attacks.base import Found, ImageAttack, ImageVictim, Made
from crossguard.budgets import L2, Linf, PixelBudget, per_image
from crossguard.device import looks
from crossguard.errors import CrossguardError
from crossguard.goals import Goal, Margin, Towards, Untargeted, classification
from crossguard.seeds import fold
from crossguard.shapes import Images, Labels, Logits, Mask, PerImage, Seeds
from crossguard.telling import tell


@dataclass(frozen=True)
class Plane:
    """The tangent of a decision boundary, seen from an image: the logit difference that has to rise above zero, and its
    gradient. `distance` is how far the plane is, without the box; infinite, where there is no slope to follow."""

    gradient: Images
    gap: PerImage
    distance: PerImage


@dataclass(frozen=True)
class Boundaries:
    """The decision boundaries that one run looks for: goals (all of them won alike), and which samples each one is
    for."""

    goals: tuple[Goal, ...]
    there: tuple[Mask, ...]

    @cached_property
    def places(self) -> tuple[Tensor, ...]:
        """The samples that each boundary is for, in ascending order; looked up once, since an accelerator has to be
        waited for."""
        return tuple(there.nonzero()[:, 0] for there in self.there)

    def anywhere(self) -> Mask:
        """The samples that have a boundary to look for."""
        return torch.stack(self.there).any(0)

    def won(self, outputs: Tensor) -> Mask:
        return self.goals[0].won(outputs)

    def at(self, keep: Tensor) -> Boundaries:
        return Boundaries(tuple(goal.at(keep) for goal in self.goals), tuple(there[keep] for there in self.there))

    def nearest(self, victim: ImageVictim, images: Images, budget: PixelBudget) -> Plane:
        """The nearest plane of each image, for one gradient per boundary."""
        gradient, gap = torch.zeros_like(images), images.new_zeros(len(images))
        distance = torch.full_like(gap, torch.inf)
        for goal, rows in zip(self.goals, self.places, strict=True):
            if len(rows) == 0:
                continue
            here: Tensor | slice = slice(None) if len(rows) == len(images) else rows
            asked, aim = (victim, goal) if here is not rows else (victim.at(rows), goal.at(rows))
            slope, rise, _ = asked.ascend(images[here], aim)
            steepness = budget.dual(slope)
            # a class that always answers as the label does has no boundary with it; 0/0 would make it the nearest one
            away = torch.where(steepness > 0, rise.abs() / steepness, torch.inf)
            closer = away < distance[here]
            gradient[here] = torch.where(per_image(closer), slope, gradient[here])
            gap[here] = torch.where(closer, rise, gap[here])
            distance[here] = torch.where(closer, away, distance[here])
        return Plane(gradient, gap, distance)


@dataclass
class Nearest:
    """The nearest adversarial image of each sample so far and its distance; infinitely far, while there is none."""

    images: Images
    distances: PerImage

    @staticmethod
    def nothing(clean: Images) -> Nearest:
        return Nearest(clean.clone(), clean.new_full((len(clean),), torch.inf))

    def offer(self, rows: Tensor, images: Images, distances: PerImage, done: Mask | None = None) -> None:
        """Keeps, of these candidates for the samples at `rows` (ascending), those that are nearer. A failure at an
        infinite distance replaces nothing but a failure. Nothing here waits for an accelerator.

        Args:
            done: those that keep what they have, whatever is offered.
        """
        here: Tensor | slice = slice(None) if len(rows) == len(self.distances) else rows
        better = (distances < self.distances[here]) | self.distances[here].isinf()
        better = better if done is None else better & ~done
        if here is rows:
            self.images[rows] = torch.where(per_image(better), images, self.images[rows])
        else:
            torch.where(per_image(better), images, self.images, out=self.images)
        self.distances[here] = torch.where(better, distances, self.distances[here])


class BoundaryAttack(ImageAttack):
    """An attack that minimizes the size of the perturbation.

    Called as every attack is, it has a budget: an image that finds an adversarial one inside it has won and leaves the
    batch; for any other, what the runs found is moved back into the budget and the image of the largest margin is
    returned, never one worse than the clean image. `nearest` measures distances and knows no budget but its norm.

    Where somebody else judges (`Goal.lasting`), the nearest adversarial image would be the worst choice, just beyond a
    boundary that is not the judge's. There all runs go to their end, their directions are followed to the rim of the
    budget, one plain step along the gradient competes with them, and of the images that have won, or else of all, the
    one of the largest margin is returned. So no image that the victim itself judges wrongly is lost, and a few may be
    won by these candidates alone.
    """

    @property
    def needs_classes(self) -> bool:
        return True

    @property
    def draws(self) -> bool:
        return False

    def nearest(
        self,
        victim: ImageVictim | Callable[[Images], Tensor],
        clean: Images,
        goal: Goal | Labels,
        budget: PixelBudget,
        seeds: Seeds | None = None,
    ) -> tuple[Images, PerImage]:
        """The nearest adversarial images, however far, and their distances in the norm of the budget.

        The distance is 0 for a clean image that has won already, and infinite where no adversarial image was found.
        `eps` counts for random starts only.
        """
        case = self.ready(victim, clean, goal, budget, seeds)
        asked, start = case.victim, case.clean
        aim = classification(case.goal, type(self).__name__).climbing(Margin())
        outputs = asked(start)
        asked.check()
        known = Nearest.nothing(start)
        known.distances[aim.won(outputs)] = 0.0
        for run, boundaries in enumerate(self.runs(aim, outputs)):
            rows = ((known.distances > 0) & boundaries.anywhere()).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            noise = fold(case.seeds[rows], run)
            near = self.hunt(asked.at(rows), start[rows], boundaries.at(rows), budget, noise, run, 0.0)
            known.offer(rows, near.images, near.distances)
        asked.check()
        missed = known.distances.isinf()
        known.images[missed] = start[missed]
        return known.images, known.distances

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        if budget.eps == 0.0:
            return Made(clean.clone())
        goal = classification(goal, type(self).__name__).climbing(Margin())
        everyone = torch.arange(len(clean), device=clean.device)
        outputs = victim(clean)
        victim.check()
        beyond = goal.won(outputs)
        found = Found.nothing(clean, goal.ends)
        found.offer(everyone, clean, beyond, goal.merit(outputs))
        if not goal.ends:
            gradient, _, _ = victim.ascend(clean, goal)
            self._offer(found, everyone, victim, clean + budget.eps * budget.ascent(gradient), clean, goal, budget)
        for run, boundaries in enumerate(self.runs(goal, outputs)):
            done = beyond | found.won if goal.ends else beyond
            rows = (~done & boundaries.anywhere()).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            asked, start, here = victim.at(rows), clean[rows], goal.at(rows)
            enough = budget.eps if goal.ends else 0.0
            near = self.hunt(asked, start, boundaries.at(rows), budget, fold(seeds[rows], run), run, enough)
            self._offer(found, rows, asked, near.images, start, here, budget)
            if not goal.ends:
                way = near.images - start
                rim = budget.eps / budget.size(way).clamp_min(1e-30)
                self._offer(found, rows, asked, start + way * per_image(rim), start, here, budget)
        return found.made()

    def _offer(
        self,
        found: Found,
        rows: Tensor,
        victim: ImageVictim,
        images: Images,
        clean: Images,
        goal: Goal,
        budget: PixelBudget,
    ) -> None:
        """Offers the images as far as the budget allows them. One inside it stays as it is, to the last bit: it may sit
        a rounding error beyond the boundary."""
        inside = budget.size(images - clean) <= budget.eps
        images = torch.where(per_image(inside), images.clamp(0.0, 1.0), budget.project(images, clean))
        outputs = victim(images)
        found.offer(rows, images, goal.won(outputs), goal.merit(outputs))

    @abstractmethod
    def runs(self, goal: Goal, outputs: Logits) -> Sequence[Boundaries]:
        """What to look for, one run after the other, given the clean logits; samples that are beaten take no part in
        later runs."""

    @abstractmethod
    def hunt(
        self,
        victim: ImageVictim,
        clean: Images,
        boundaries: Boundaries,
        budget: PixelBudget,
        seeds: Seeds,
        run: int,
        enough: float,
    ) -> Nearest:
        """One run, for samples that have not won. A sample with an adversarial image of at most the size
        `enough` has what it needs; where none was found, the image is the best try."""


@dataclass(frozen=True)
class FAB(BoundaryAttack):
    """Fast adaptive boundary attack (Croce and Hein 2020, algorithm 1): project onto the linearized boundary, from the
    iterate and from the clean image, average the two with a bias towards the clean image, and, once beyond the
    boundary, step back.

    With `targets` it is FAB-T of AutoAttack, which costs one gradient and one forward a step: one run for each of the
    best other classes. Classes whose clean logits tie with the label's or with a better target's are duplicates and
    are passed over. With `targets=None` it is the original, which looks at every class in every step.

    Args:
        steps: steps of each run.
        targets: how many other classes to try, best first by their clean logits; None for all at once.
        restarts: runs for each target. The first starts at the clean image, later ones at a random point half the
            budget away.
        alpha_max: the largest weight of the clean image's projection.
        eta: how far to step, as a multiple of the way to the boundary.
        beta: the part of the perturbation that a step back keeps.
    """

    steps: int = 100
    targets: int | None = 9
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise CrossguardError(f"FAB(steps={self.steps}) does nothing; give 1 or more steps")
        if self.targets is not None and self.targets < 1:
            raise CrossguardError(
                f"FAB(targets={self.targets}) attacks no class; give 1 or more targets, or None for all at once"
            )
        if self.restarts < 1:
            raise CrossguardError(f"FAB(restarts={self.restarts}) is not possible; give 1 or more")
        if not 0.0 <= self.alpha_max <= 1.0:
            raise CrossguardError(
                f"FAB(alpha_max={self.alpha_max}) is no weight; give a number from 0 to 1, usually 0.1"
            )
        if not self.eta >= 1.0:
            raise CrossguardError(f"FAB(eta={self.eta}) stops short of the boundary; give 1 or more, usually 1.05")
        if not 0.0 < self.beta < 1.0:
            raise CrossguardError(f"FAB(beta={self.beta}) is no step back; give a number between 0 and 1, usually 0.9")

    @property
    def draws(self) -> bool:
        return self.restarts > 1

    def runs(self, goal: Goal, outputs: Logits) -> Sequence[Boundaries]:
        every = boundaries_of(goal, outputs, self.targets)
        if self.targets is None:
            return [every] * self.restarts if every.goals else []
        pairs = zip(every.goals, every.there, strict=True)
        return [Boundaries((goal,), (there,)) for goal, there in pairs for _ in range(self.restarts)]

    def hunt(
        self,
        victim: ImageVictim,
        clean: Images,
        boundaries: Boundaries,
        budget: PixelBudget,
        seeds: Seeds,
        run: int,
        enough: float,
    ) -> Nearest:
        known = Nearest.nothing(clean)
        rows = torch.arange(len(clean), device=clean.device)
        done = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        images = clean
        if run % self.restarts:
            images = (clean + 0.5 * budget.surface(seeds, clean)).clamp(0.0, 1.0)
        for step in range(self.steps):
            plane = boundaries.nearest(victim, images, budget)
            look = looks(step, clean.device)
            if look:
                victim.check()
            images = self._step(images, clean, plane, budget)
            won = boundaries.won(victim(images))
            sizes = budget.size(images - clean)
            known.offer(rows, images, torch.where(won, sizes, torch.inf), done)
            # a flat spot stays flat, however often it is asked
            done = done | plane.distance.isinf() | (won & (sizes <= enough))
            images = torch.where(per_image(won), clean + self.beta * (images - clean), images)
            if look:
                keep = (~done).nonzero()[:, 0]
                tell("step {} of {}, {} images go on", step + 1, self.steps, len(keep))
                if len(keep) == 0:
                    break
                if len(keep) < len(rows):
                    rows, images, clean, done = rows[keep], images[keep], clean[keep], done[keep]
                    victim, boundaries = victim.at(keep), boundaries.at(keep)
        return known

    def _step(self, images: Images, clean: Images, plane: Plane, budget: PixelBudget) -> Images:
        """Equations 8 to 10: the projections of the iterate and of the clean image, averaged by their lengths."""
        short = (plane.gradient * (images - clean)).flatten(1).sum(1) - plane.gap
        starts, slopes = torch.cat([images, clean]), torch.cat([plane.gradient, plane.gradient])
        step, home = budget.reach(starts, slopes, torch.cat([-plane.gap, short])).chunk(2)
        lengths = budget.size(step).clamp_min(1e-8), budget.size(home).clamp_min(1e-8)
        alpha = per_image((lengths[0] / (lengths[0] + lengths[1])).clamp_max(self.alpha_max))
        return ((1 - alpha) * (images + self.eta * step) + alpha * (clean + self.eta * home)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class DeepFool(BoundaryAttack):
    """Steps onto the nearest linearized boundary until one is crossed (Moosavi-Dezfooli et al. 2016, algorithm 2; their
    equation 10 for the norms). Quick, and a generous upper bound of the distance: what is crossed once is not refined.

    Args:
        steps: steps at most.
        overshoot: how much further than the boundary, as a fraction of the way.
        candidates: the classes looked at, best first by their clean logits, the label among them; each other one costs
            a gradient a step.
    """

    norms: ClassVar[tuple[type[PixelBudget], ...]] = (Linf, L2)

    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise CrossguardError(f"DeepFool(steps={self.steps}) does nothing; give 1 or more steps")
        if not self.overshoot > 0:
            raise CrossguardError(
                f"DeepFool(overshoot={self.overshoot}) ends on the boundary, not beyond; give more than 0, usually 0.02"
            )
        if self.candidates < 2:
            raise CrossguardError(
                f"DeepFool(candidates={self.candidates}) has no class to go to; give 2 or more, usually 10"
            )

    def runs(self, goal: Goal, outputs: Logits) -> Sequence[Boundaries]:
        every = boundaries_of(goal, outputs, self.candidates - 1)
        return [every] if every.goals else []

    def hunt(
        self,
        victim: ImageVictim,
        clean: Images,
        boundaries: Boundaries,
        budget: PixelBudget,
        seeds: Seeds,
        run: int,
        enough: float,
    ) -> Nearest:
        del seeds, run, enough
        known = Nearest.nothing(clean)
        rows = torch.arange(len(clean), device=clean.device)
        done = torch.zeros(len(clean), dtype=torch.bool, device=clean.device)
        images, way = clean, torch.zeros_like(clean)
        for step in range(self.steps):
            plane = boundaries.nearest(victim, images, budget)
            # on the boundary itself a step would have no length
            length = plane.distance.clamp_min(1e-6).masked_fill(plane.distance.isinf(), 0.0)
            way = way + per_image(length) * budget.ascent(plane.gradient)
            images = (clean + (1 + self.overshoot) * way).clamp(0.0, 1.0)
            won = boundaries.won(victim(images))
            known.offer(rows, images, torch.where(won, budget.size(images - clean), torch.inf), done)
            done = done | plane.distance.isinf() | won
            if looks(step, clean.device):
                victim.check()
                keep = (~done).nonzero()[:, 0]
                tell("step {} of {}, {} images go on", step + 1, self.steps, len(keep))
                if len(keep) == 0:
                    break
                if len(keep) < len(rows):
                    rows, images, clean, way = rows[keep], images[keep], clean[keep], way[keep]
                    victim, boundaries, done = victim.at(keep), boundaries.at(keep), done[keep]
        return known


@dataclass(frozen=True)
class CarliniWagner(BoundaryAttack):
    """Minimizes |delta|^2 + c * max(confidence - margin, 0) over an image written as (1 + tanh w) / 2, with Adam, and
    searches the smallest c that succeeds (Carlini and Wagner 2017, their L2 attack).

    Slow and thorough: the original runs up to 10,000 steps. Adam moves every pixel by up to rate / 2 a step, so
    distances below rate / 2 times the root of the number of pixels need a smaller rate. A search ends for an image when
    a tenth of the steps has brought its objective down by less than a hundredth of a percent, as in the authors' code.

    Args:
        steps: steps of Adam for each constant, at most.
        searches: how many constants to try: ten times more after a failure, then bisection.
        rate: learning rate of Adam, in the unit of w.
        confidence: how far beyond the boundary to go, in logits.
        constant: the first c.
    """

    norms: ClassVar[tuple[type[PixelBudget], ...]] = (L2,)

    steps: int = 200
    searches: int = 9
    rate: float = 0.01
    confidence: float = 0.0
    constant: float = 0.001

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise CrossguardError(f"CarliniWagner(steps={self.steps}) does nothing; give 1 or more steps")
        if self.searches < 1:
            raise CrossguardError(f"CarliniWagner(searches={self.searches}) tries no constant; give 1 or more")
        if not self.rate > 0:
            raise CrossguardError(f"CarliniWagner(rate={self.rate}) does not move; give a positive rate, such as 0.01")
        if self.confidence < 0:
            raise CrossguardError(
                f"CarliniWagner(confidence={self.confidence}) stops short of the boundary; give 0 or more"
            )
        if not self.constant > 0:
            raise CrossguardError(
                f"CarliniWagner(constant={self.constant}) does not attack; give a positive constant, such as 0.001"
            )

    def runs(self, goal: Goal, outputs: Logits) -> Sequence[Boundaries]:
        everyone = torch.ones(len(outputs), dtype=torch.bool, device=outputs.device)
        return [Boundaries((goal,), (everyone,))]

    def hunt(
        self,
        victim: ImageVictim,
        clean: Images,
        boundaries: Boundaries,
        budget: PixelBudget,
        seeds: Seeds,
        run: int,
        enough: float,
    ) -> Nearest:
        del seeds, run
        known = Nearest.nothing(clean)
        rows = torch.arange(len(clean), device=clean.device)
        constants = clean.new_full((len(clean),), self.constant)
        lower, upper = torch.zeros_like(constants), torch.full_like(constants, torch.inf)
        for _ in range(self.searches):
            if len(rows) == 0:
                break
            won = self._descend(
                known, rows, victim.at(rows), clean[rows], boundaries.at(rows), budget, constants, enough
            )
            lower, upper = torch.where(won, lower, constants), torch.where(won, constants, upper)
            constants = torch.where(upper.isinf(), constants * 10, (lower + upper) / 2)
            keep = (known.distances[rows] > enough).nonzero()[:, 0]
            rows, constants, lower, upper = rows[keep], constants[keep], lower[keep], upper[keep]
        return known

    def _descend(
        self,
        known: Nearest,
        rows: Tensor,
        victim: ImageVictim,
        clean: Images,
        boundaries: Boundaries,
        budget: PixelBudget,
        constants: Tensor,
        enough: float,
    ) -> Mask:
        """Adam with these constants, from the clean images; what it finds goes into `known`. Says where it won."""
        won = torch.zeros(len(rows), dtype=torch.bool, device=clean.device)
        active = torch.arange(len(rows), device=clean.device)
        done = torch.zeros_like(won)
        # the authors' factor: pixels of exactly 0 or 1 would be infinitely far away
        free = torch.atanh((2.0 * clean - 1.0) * 0.999999)
        mean, square = torch.zeros_like(free), torch.zeros_like(free)
        last = clean.new_full((len(rows),), torch.inf)
        goal = boundaries.goals[0]
        for step in range(self.steps):
            images = (1.0 + torch.tanh(free)) / 2.0
            slope, gap, outputs = victim.ascend(images, goal)
            delta = images - clean
            sizes = budget.size(delta)
            short = (self.confidence - gap).clamp_min(0.0)
            hit = boundaries.won(outputs) & ((gap >= self.confidence) | (self.confidence == 0.0))
            won[active] |= hit & ~done
            known.offer(rows[active], images, torch.where(hit, sizes, torch.inf), done)
            objective = sizes**2 + constants * short
            done = done | (hit & (sizes <= enough))
            if step % max(self.steps // 10, 1) == 0:
                done |= objective > 0.9999 * last
                last = objective
            pull = 2.0 * delta - per_image(constants * (short > 0)) * slope
            gradient = pull * 2.0 * images * (1.0 - images)
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            scaled = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            free = free - self.rate * scaled
            if looks(step, clean.device):
                victim.check()
                keep = (~done).nonzero()[:, 0]
                tell("step {} of {}, {} images go on", step + 1, self.steps, len(keep))
                if len(keep) == 0:
                    break
                if len(keep) < len(active):
                    active, free, mean, square, last = active[keep], free[keep], mean[keep], square[keep], last[keep]
                    clean, constants, done = clean[keep], constants[keep], done[keep]
                    victim, goal, boundaries = victim.at(keep), goal.at(keep), boundaries.at(keep)
        return won


def boundaries_of(goal: Goal, outputs: Logits, count: int | None) -> Boundaries:
    """The boundaries between the label and the `count` best other classes (all, if None) by the clean logits; for a
    goal with a class of its own, the one boundary with that."""
    if not isinstance(goal, Untargeted):
        return Boundaries((goal,), (torch.ones(len(outputs), dtype=torch.bool, device=outputs.device),))
    ranked, there = _rivals(outputs, goal.labels)
    columns = range(min(count or ranked.shape[1], ranked.shape[1]))
    return Boundaries(
        tuple(Towards(goal.labels, ranked[:, column], Margin()) for column in columns),
        tuple(there[:, column] for column in columns),
    )


def _rivals(outputs: Logits, labels: Labels) -> tuple[Tensor, Tensor]:
    """The other classes by descending logit, and which of them count. Of classes with equal logits one counts, and
    none with the logit of the label: they are the same class twice (the same name, the same prompt)."""
    own = outputs.gather(1, labels[:, None])
    logits, ranked = outputs.scatter(1, labels[:, None], -torch.inf).sort(dim=1, descending=True, stable=True)
    there = (logits != own) & torch.cat([logits.isfinite()[:, :1], logits[:, 1:] != logits[:, :-1]], 1)
    there &= logits.isfinite()
    order = there.to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    return ranked.gather(1, order)[:, :-1], there.gather(1, order)[:, :-1]
