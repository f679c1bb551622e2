"""Attacks on a black box: they only ask for answers, never for a gradient. Where they beat an attack that climbs
gradients, the gradients are masked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from crossguard.attacks.base import Found, ImageAttack, ImageVictim, Made
from crossguard.budgets import L2, Linf, PixelBudget, per_image
from crossguard.device import looks
from crossguard.errors import CrossguardError
from crossguard.goals import Goal, Loss, Margin
from crossguard.seeds import fold, uniform
from crossguard.shapes import Images, Labels, Mask, PerImage, Seeds
from crossguard.telling import tell

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # iterations after which p halves
TOGETHER = 64  # iterations whose numbers are drawn at once: one by one, drawing would cost more than a small model


@dataclass(frozen=True)
class Square(ImageAttack):
    """Random search with squares that shrink (Andriushchenko et al. 2020, algorithms 1 to 3): a change of one square is
    kept if it raises the loss.

    Each sample has places, signs and orientations of its own, from its key and the number of the iteration. The code of
    AutoAttack shares them among the batch (in Linf all of them), so that a result depends on who else is in the batch;
    and it never reaches the last row and column, while here every place where a square fits is equally likely.

    Goals with a loss of their own (`Drift`) climb that one.

    Args:
        queries: questions about each image, the start included.
        p: share of the image's area that the first squares have; it halves after 10, 50, 200, 500, 1000, 2000, 4000,
            6000 and 8000 iterations.
        rescale: stretch or squeeze this schedule, which is made for 10000 queries, to the number of queries. AutoAttack
            does not.
        loss: climb this loss of the logits. The paper and AutoAttack climb the cross-entropy for targeted goals.
    """

    norms: ClassVar[tuple[type[PixelBudget], ...]] = (Linf, L2)
    sees = "scores"

    queries: int = 5000
    p: float = 0.8
    rescale: bool = False
    loss: Loss = Margin()

    def __post_init__(self) -> None:
        _check_queries(self)
        if not 0.0 < self.p <= 1.0:
            raise CrossguardError(
                f"Square(p={self.p}) is no share of an image; give more than 0 and at most 1, such as 0.8"
            )

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        if budget.eps == 0.0:
            return Made(clean.clone())
        if goal.classes:
            goal = goal.climbing(self.loss)
        start, move = (_stripes, _paint) if isinstance(budget, Linf) else (_tiles, _shift)
        clean = clean.contiguous()
        found, rows = Found.nothing(clean, goal.ends), torch.arange(len(clean), device=clean.device)
        numbers = clean.new_empty(len(clean), 0)
        best, highest = clean, clean.new_full((len(clean),), -torch.inf)  # the image whose squares are changed next
        for question in range(self.queries):
            if question == 0:
                images = start(clean, budget.eps, seeds)
            else:
                number = question - 1
                if number % TOGETHER == 0:
                    numbers = _numbers(seeds, question, clean.device)
                area = self._share(number) * clean.shape[2] * clean.shape[3]
                images = move(best, clean, budget.eps, area, numbers[:, number % TOGETHER])
            outputs = victim(images)
            losses = goal.loss(outputs)
            victim.note(~losses.isfinite())
            better = losses > highest
            best, highest = torch.where(per_image(better), images, best), torch.where(better, losses, highest)
            found.offer(rows, images, goal.won(outputs), goal.merit(outputs))
            if looks(question, clean.device):
                victim.check()
                keep = (~found.won[rows]).nonzero()[:, 0] if found.ends else rows
                tell("question {} of {}, {} images go on", question + 1, self.queries, len(keep))
                if len(keep) == 0:
                    break
                if len(keep) < len(rows):
                    rows, clean, numbers, seeds = rows[keep], clean[keep], numbers[keep], seeds[keep]
                    best, highest = best[keep], highest[keep]
                    victim, goal = victim.at(keep), goal.at(keep)
        return found.made()

    def _share(self, number: int) -> float:
        """The share of the area that the squares of this iteration have."""
        if self.rescale:
            number = int(number / self.queries * 10000)
        return self.p / 2 ** sum(number > halving for halving in HALVINGS)


def _numbers(seeds: Seeds, part: int, device: torch.device) -> Tensor:
    """The random numbers of `TOGETHER` iterations: four in [0, 1) for two places, four signs."""
    places, signs = uniform(fold(seeds, part), (TOGETHER, 8), device).split(4, dim=2)
    return torch.cat([places, _signs(signs)], dim=2)


def _signs(noise: Tensor) -> Tensor:
    return torch.where(noise < 0.5, -1.0, 1.0)


def _stripes(clean: Images, eps: float, seeds: Seeds) -> Images:
    """Where the search in Linf starts: vertical stripes of width 1, plus or minus eps in each channel."""
    signs = _signs(uniform(seeds, (3, 1, clean.shape[3]), clean.device))
    return (clean + eps * signs).clamp_(0.0, 1.0)


def _paint(images: Images, clean: Images, eps: float, area: float, numbers: Tensor) -> Images:
    """One square of every image moved to a corner of the budget, in each channel by the same sign (algorithm 2)."""
    height, width = images.shape[2:]
    side = min(max(round(math.sqrt(area)), 1), height, width)
    square = _square(numbers[:, :2], side, height, width)
    painted = clean.flatten(2).gather(2, square).add_(numbers[:, 4:7, None], alpha=eps).clamp_(0.0, 1.0)
    return images.flatten(2).scatter(2, square, painted).view_as(clean)


def _tiles(clean: Images, eps: float, seeds: Seeds) -> Images:
    """Where the search in L2 starts: bumps side by side, about 5 x 5 of them, as many as fit."""
    count, _, height, width = clean.shape
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    signs = _signs(uniform(seeds, (4, down, across), clean.device))[..., None, None]
    bumps = _bump(side, clean.device)
    tiles = signs[:, :3] * torch.where(signs[:, 3:] > 0, bumps, bumps.T)
    delta = torch.zeros_like(clean)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    tiled = tiles.transpose(3, 4).reshape(count, 3, down * side, across * side)
    delta[:, :, top : top + down * side, left : left + across * side] = tiled
    return _filled(clean, delta, eps)


def _shift(images: Images, clean: Images, eps: float, area: float, numbers: Tensor) -> Images:
    """One square of every perturbation loses its energy to a bump in another square (algorithm 3)."""
    height, width = images.shape[2:]
    side = min(max(round(math.sqrt(area)), 3) // 2 * 2 + 1, height, width)
    here, there = (_square(numbers[:, place : place + 2], side, height, width) for place in (0, 2))
    delta = (images - clean).flatten(2)
    spare = (eps**2 - delta.square().sum((1, 2), keepdim=True)).clamp_min_(0.0)
    old = delta.gather(2, here)
    kept = old.square().sum(2, keepdim=True)
    delta.scatter_(2, here, 0.0)  # now, so that what both squares hold is counted once
    moved = delta.gather(2, there).square_().sum(2, keepdim=True)
    delta.scatter_(2, there, 0.0)
    bump = _bump(side, clean.device)
    bumps = torch.where(numbers[:, 7:] > 0, bump.flatten(), bump.T.flatten())[:, None] * numbers[:, 4:7, None]
    new = bumps.addcdiv_(old, kept.sqrt() + 1e-12)
    new *= (spare / 3 + kept + moved).sqrt_() / (new.norm(dim=2, keepdim=True) + 1e-12)
    return _filled(clean, delta.scatter_(2, here, new).view_as(clean), eps)


def _filled(clean: Images, delta: Images, eps: float) -> Images:
    """The perturbation at the size of the budget, then kept in the box, which can only shorten it."""
    size = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return torch.addcmul(clean, delta, eps / (size + 1e-12)).clamp_(0.0, 1.0)


def _square(place: Tensor, side: int, height: int, width: int) -> Tensor:
    """Where the pixels of a square are in each of n flattened images, for every channel: shape (n, 3, side * side)."""
    # Rounding to float32 can carry a number just below 1 one place too far.
    top = (place[:, 0] * (height - side + 1)).long().clamp_max_(height - side)
    left = (place[:, 1] * (width - side + 1)).long().clamp_max_(width - side)
    return ((top * width + left)[:, None] + _corner(side, width, place.device))[:, None].expand(-1, 3, -1)


@lru_cache(maxsize=32)
def _corner(side: int, width: int, device: torch.device) -> Tensor:
    """Where the pixels of a square in the top left corner are in a flattened image."""
    span = torch.arange(side, device=device)
    return (span[:, None] * width + span).flatten()


@lru_cache(maxsize=32)
def _bump(side: int, device: torch.device) -> Tensor:
    """A pyramid up above a pyramid down, together of unit energy (equation 2)."""
    half = side // 2
    bump = torch.cat([_pyramid(half, side), -_pyramid(side - half, side)])
    return (bump / bump.norm()).to(device)


def _pyramid(height: int, width: int) -> Tensor:
    """Centered rectangles on top of each other, the m-th of height 1 / m^2; of unit energy."""
    levels = max(height, width) // 2 + 1
    steps = torch.arange(1, levels + 1, dtype=torch.float32) ** -2
    heights = steps.flip(0).cumsum(0).flip(0)
    down = (torch.arange(height) - height // 2).abs()
    across = (torch.arange(width) - width // 2).abs()
    pyramid = heights[torch.maximum(down[:, None], across[None, :])]
    return pyramid / pyramid.norm().clamp_min(1e-12)


@dataclass(frozen=True)
class RayS(ImageAttack):
    """Searches for the ray of signs on which the boundary is nearest and sees nothing but whether the goal is won (Chen
    and Gu 2020, algorithms 2 and 3): blocks of signs flip, halves at first, single pixels at last, and a flip that
    brings the boundary nearer stays, at the radius that a binary search finds.

    The search is deterministic. Every image has its own place in it, so that each forward asks one question about every
    image that is left. An image leaves with the first answer that wins within the budget, or when a sweep through all
    its single pixels has changed nothing; what is left in the end goes the whole budget along its ray. Where somebody
    else judges (`Goal.lasting`), no image leaves for having won, all go the whole budget, and the last question is
    whether they have won there: who has not, but had won on the way, keeps that.

    Args:
        queries: questions about each image, the first of which is the clean image itself.
    """

    norms: ClassVar[tuple[type[PixelBudget], ...]] = (Linf,)
    sees = "decisions"

    queries: int = 10000

    def __post_init__(self) -> None:
        _check_queries(self)

    @property
    def draws(self) -> bool:
        return False

    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        del seeds
        if not goal.wins:
            raise CrossguardError(
                f"RayS needs to be told when it has won, and {type(goal).__name__} never says so; try Square instead"
            )
        if budget.eps == 0.0 or len(clean) == 0:
            return Made(clean.clone())
        everyone = victim, goal
        won = goal.won(victim(clean))  # within the budget, so far
        within, whole = clean.clone(), clean.clone()  # the image that won, and the one at the rim of the budget
        blocks, singles = _blocks(clean[0].numel(), self.queries)
        blocks = blocks.to(clean.device)
        rays = _Rays.start(clean)
        if goal.ends:
            rays.done = won.clone()  # what is beaten unchanged stays as it is, unless another model is going to judge
        for question in range(self.queries if goal.ends else self.queries - 1):
            if question > 0:
                signs, radii = rays.ask(blocks)
                rays.learn(signs, radii, goal.won(victim(_along(rays.clean, signs, radii))))
                rays.done = rays.done | rays.stuck(singles)
                if goal.ends:
                    rays.done |= rays.radii <= budget.eps
            if looks(question, clean.device):
                victim.check()
                keep = (~rays.done).nonzero()[:, 0]
                tell("question {} of {}, {} images go on", question + 1, self.queries, len(keep))
                if len(keep) < len(rays.rows):
                    rays.at(rays.done.nonzero()[:, 0]).write(won, within, whole, budget.eps)
                    rays, victim, goal = rays.at(keep), victim.at(keep), goal.at(keep)
                if len(keep) == 0:
                    break
        rays.write(won, within, whole, budget.eps)
        if not goal.ends and self.queries > 1:
            asked, aim = everyone
            won = won & ~aim.won(asked(whole))
        return Made(torch.where(per_image(won), within, whole))


@dataclass
class _Rays:
    """Where the search stands for each image that is left.

    Attributes:
        signs: the best ray so far, of plus and minus 1.
        radii: the smallest radius at which it won; infinite where no ray has won yet.
        below: the largest radius at which it did not, in this binary search.
        searching: in a binary search, as opposed to trying another ray.
        block: the number of the block that is flipped next, or was flipped to get this ray.
        progress: the number of the block that brought the boundary nearer last.
        done: whether the search is over; ray and radius stay as they are, whatever is asked until somebody looks.
        tolerance: where a binary search ends: 0.001 in the Euclidean length of the ray, as in the paper's code.
    """

    rows: Tensor
    clean: Images
    signs: Images
    radii: PerImage
    below: PerImage
    searching: Mask
    block: Labels
    progress: Labels
    done: Mask
    tolerance: float

    @staticmethod
    def start(clean: Images) -> _Rays:
        count, device = len(clean), clean.device
        nowhere = torch.zeros(count, dtype=torch.int64, device=device)
        return _Rays(
            rows=torch.arange(count, device=device),
            clean=clean,
            signs=torch.ones_like(clean),
            radii=torch.full((count,), torch.inf, device=device),
            below=torch.zeros(count, device=device),
            searching=torch.zeros(count, dtype=torch.bool, device=device),
            block=nowhere,
            progress=nowhere,
            done=torch.zeros(count, dtype=torch.bool, device=device),
            tolerance=1e-3 / math.sqrt(clean[0].numel()),
        )

    def ask(self, blocks: Tensor) -> tuple[Images, PerImage]:
        """The ray and the radius of the next question about each image."""
        first, last = blocks[self.block].T[..., None]
        pixels = torch.arange(self.clean[0].numel(), device=self.clean.device)
        flipped = (pixels >= first) & (pixels < last) & ~self.searching[:, None]
        signs = torch.where(flipped.view_as(self.signs), -self.signs, self.signs)
        # A radius of 1 leads to a corner of the box. The paper tries a flip at the best radius itself; just inside of
        # it, a flip that makes no difference costs one question instead of a binary search.
        trial = (self.radii - self.tolerance).clamp(0.0, 1.0)
        return signs, torch.where(self.searching, (self.below + self.radii) / 2, trial)

    def learn(self, signs: Images, radii: PerImage, reached: Mask) -> None:
        """What the answers to these questions say."""
        reached = reached & ~self.done
        self.signs = torch.where(reached.view(-1, 1, 1, 1), signs, self.signs)
        self.radii = torch.where(reached, radii, self.radii)
        self.progress = torch.where(reached, self.block, self.progress)
        self.below = torch.where(self.searching, torch.where(reached, self.below, radii), 0.0)
        self.searching = (self.searching | reached) & (self.radii - self.below > self.tolerance)
        self.block = self.block + (~self.searching).long()

    def stuck(self, singles: int) -> Mask:
        """Where every pixel was flipped on its own, in vain, since the boundary came nearer last."""
        return self.block - (self.progress + 1).clamp_min(singles) >= self.clean[0].numel()

    def whole(self, eps: float) -> Images:
        """The images at the rim of the budget, along the best rays so far."""
        return _along(self.clean, self.signs, torch.full_like(self.radii, eps))

    def write(self, won: Mask, within: Images, whole: Images, eps: float) -> None:
        """Notes for these images where the search has come to: whether a ray has won within the budget, the image on
        it (radii only shrink, so it is that of the last win), and the image at the rim."""
        inside = self.radii <= eps
        won[self.rows] = won[self.rows] | inside
        on_ray = _along(self.clean, self.signs, self.radii)
        within[self.rows] = torch.where(per_image(inside), on_ray, self.clean)
        whole[self.rows] = self.whole(eps)

    def at(self, keep: Tensor) -> _Rays:
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: part[keep] for name, part in parts.items() if isinstance(part, Tensor)})


def _along(clean: Images, signs: Images, radii: PerImage) -> Images:
    return clean.addcmul(signs, radii.view(-1, 1, 1, 1)).clamp_(0.0, 1.0)


def _blocks(pixels: int, count: int) -> tuple[Tensor, int]:
    """The first and the last pixel (exclusive) of at least `count` blocks in turn: everything, halves, quarters, ...,
    then single pixels over and over; and the number of the first single pixel."""
    levels, total, size, singles = [], 0, pixels, 0
    level = 0
    while total < count:
        size = -(-pixels // 2**level)
        first = torch.arange(0, pixels, size)
        if size > 1:
            singles = total + len(first)
        levels.append(torch.stack([first, (first + size).clamp_max(pixels)], dim=1))
        total += len(first)
        level += 1
    return torch.cat(levels), singles


def _check_queries(attack: Square | RayS) -> None:
    if attack.queries < 1:
        name = type(attack).__name__
        raise CrossguardError(f"{name}(queries={attack.queries}) asks nothing; give 1 or more questions")
