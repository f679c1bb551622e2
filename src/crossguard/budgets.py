"""What may change and how far. A budget knows geometry, never a model: every gradient attack has a norm by asking its
budget."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import count

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from crossguard.device import waits
from crossguard.errors import CrossguardError
from crossguard.seeds import fold, normal, uniform
from crossguard.shapes import Images, PerImage, Seeds
from crossguard.words import Word

NEWTON = 8  # rounds for a level, where nobody looks whether it is reached; images of 224 pixels take 2 or 3
SOFTEN = 16  # rounds for a threshold, likewise; 3 to 6 in a step, about 10 from a random start far outside


class Budget(Word, ABC):
    """What an adversary may change. `image` and `text` are the parts of it that concern pixels and words, where there
    are any."""

    @property
    def image(self) -> PixelBudget | None:
        return None

    @property
    def text(self) -> TextBudget | None:
        return None


class PixelBudget(Budget):
    """A ball of perturbations around a clean image, inside the box [0, 1] of pixels."""

    eps: float

    @property
    def image(self) -> PixelBudget:
        return self

    @abstractmethod
    def size(self, delta: Images) -> PerImage:
        """The norm of each perturbation, in the unit of `eps`."""

    @abstractmethod
    def ascent(self, gradient: Images) -> Images:
        """The direction of unit size that climbs fastest for this gradient."""

    @abstractmethod
    def shrink(self, delta: Images) -> Images:
        """The nearest point of the ball."""

    @abstractmethod
    def sample(self, seeds: Seeds, like: Images) -> Images:
        """A random perturbation inside the ball, drawn from each sample's own key."""

    @abstractmethod
    def surface(self, seeds: Seeds, like: Images) -> Images:
        """A random perturbation of size `eps`, where AutoAttack starts."""

    @abstractmethod
    def dual(self, gradient: Images) -> PerImage:
        """How far a function of this gradient climbs on a way of size 1: the dual norm of the gradient."""

    def reach(self, images: Images, gradient: Images, rise: PerImage) -> Images:
        """The smallest step, in this norm, along which a linear function of this gradient rises by `rise` (falls, if
        that is negative) while the pixels stay in [0, 1]: the projection onto a hyperplane within the box that FAB
        (Croce and Hein 2020, section 2.1) is made of. Where the box does not hold such a step, the step goes to the
        corner of the box that comes nearest.

        Only the direction of the gradient and the ratio of rise to gradient matter: the scale of the logits does not.
        """
        climb = gradient * per_image(rise.sign())
        steepest = climb.abs().flatten(1).amax(1).clamp_min(1e-30)
        room = torch.where(climb > 0, 1.0 - images, images).clamp_min(0.0).masked_fill(climb == 0, 0.0)
        slopes = climb.abs() / per_image(steepest)
        moved = self.moves(slopes.flatten(1), room.flatten(1), rise.abs() / steepest)
        return climb.sign() * moved.view_as(images)

    @abstractmethod
    def moves(self, slopes: Tensor, room: Tensor, rise: PerImage) -> Tensor:
        """How far each pixel has to move, at most its `room`, so that the sum of slope times move is `rise` and the
        moves as a whole are smallest; all of the room, where that is not enough."""

    def rounding(self, pixels: int) -> float:
        """How much the size of a perturbation of so many pixels may grow when the image is rounded to float32."""
        del pixels
        return 1e-6

    def project(self, images: Images, clean: Images) -> Images:
        """Back into the ball around `clean` and into [0, 1]. Clamping to the box moves towards `clean`, so the ball
        still holds."""
        return self.shrink(images - clean).add_(clean).clamp_(0.0, 1.0)

    def check(self, images: Images, clean: Images) -> PerImage:
        """The size of each perturbation; raises when one leaves the ball, the box or the finite numbers.

        The tolerance, 1e-4 of `eps` and what rounding can add, is far below the 1/255 of a pixel step.
        """
        if images.shape != clean.shape:
            raise CrossguardError(
                f"the attack changed the shape of the images: {tuple(clean.shape)} -> {tuple(images.shape)}"
            )
        if not bool(torch.isfinite(images).all()):
            raise CrossguardError("the attack returned pixels that are not finite numbers")
        if float(images.min()) < -1e-6 or float(images.max()) > 1.0 + 1e-6:
            raise CrossguardError("the attack returned pixels outside [0, 1]")
        size = self.size(images - clean)
        worst = float(size.max())
        if worst > self.eps * (1.0 + 1e-4) + self.rounding(clean[0].numel() if len(clean) else 0):
            raise CrossguardError(f"the attack broke its budget {self}: the largest perturbation has size {worst:.6g}")
        return size


@dataclass(frozen=True)
class Linf(PixelBudget):
    """Every pixel may move by at most `eps` (in pixels of [0, 1]): the threat model of Goodfellow et al. 2015 and
    Madry et al. 2018."""

    eps: float

    def __post_init__(self) -> None:
        _check_eps(self, 1.0, "the whole pixel range is 1")

    def size(self, delta: Images) -> PerImage:
        return delta.abs().flatten(1).amax(1)

    def ascent(self, gradient: Images) -> Images:
        return gradient.sign()

    def shrink(self, delta: Images) -> Images:
        return delta.clamp(-self.eps, self.eps)

    def sample(self, seeds: Seeds, like: Images) -> Images:
        return (2.0 * uniform(seeds, like.shape[1:], like.device) - 1.0) * self.eps

    def surface(self, seeds: Seeds, like: Images) -> Images:
        noise = self.sample(seeds, like)
        return noise * per_image(self.eps / self.size(noise).clamp_min(1e-30))

    def dual(self, gradient: Images) -> PerImage:
        return gradient.abs().flatten(1).sum(1)

    def moves(self, slopes: Tensor, room: Tensor, rise: PerImage) -> Tensor:
        return torch.minimum(_level(slopes, room, slopes * room, rise)[:, None], room)


@dataclass(frozen=True)
class L2(PixelBudget):
    """The perturbation as a whole, all pixels and channels of [0, 1], may have a Euclidean norm of at most `eps`."""

    eps: float

    def __post_init__(self) -> None:
        _check_eps(self, 1e4, "no image is that far from another")

    def size(self, delta: Images) -> PerImage:
        return delta.flatten(1).norm(dim=1)

    def ascent(self, gradient: Images) -> Images:
        return gradient / per_image(gradient.flatten(1).norm(dim=1).clamp_min(1e-30))

    def shrink(self, delta: Images) -> Images:
        size = self.size(delta).clamp_min(1e-30)
        return delta * per_image((self.eps / size).clamp_max(1.0))

    def sample(self, seeds: Seeds, like: Images) -> Images:
        direction = self.ascent(normal(fold(seeds, 1), like.shape[1:], like.device))
        radius = uniform(fold(seeds, 2), (1,), like.device)[:, 0]
        return direction * per_image(self.eps * radius ** (1.0 / math.prod(like.shape[1:])))

    def surface(self, seeds: Seeds, like: Images) -> Images:
        return self.eps * self.ascent(normal(fold(seeds, 1), like.shape[1:], like.device))

    def dual(self, gradient: Images) -> PerImage:
        return gradient.flatten(1).norm(dim=1)

    def moves(self, slopes: Tensor, room: Tensor, rise: PerImage) -> Tensor:
        limits = torch.where(slopes > 0, room / slopes, torch.inf)
        level = _level(slopes * slopes, limits, slopes * room, rise)[:, None]
        return torch.where(limits <= level, room, level * slopes)


@dataclass(frozen=True)
class L1(PixelBudget):
    """The absolute changes of all pixels and channels may add up to at most `eps`, in pixels of [0, 1]: few pixels may
    change much. 12 is usual on CIFAR-10 (Tramer and Boneh 2019, Croce and Hein 2021)."""

    eps: float

    def __post_init__(self) -> None:
        _check_eps(self, 1e6, "no image is that far from another", usual="12")

    def size(self, delta: Images) -> PerImage:
        return delta.abs().flatten(1).sum(1)

    def rounding(self, pixels: int) -> float:
        # Each pixel is rounded on its own, by up to half the spacing of float32 below 1.
        return 1e-6 + pixels * 2.0**-25

    def ascent(self, gradient: Images, density: PerImage | float | None = None, most: int | None = None) -> Images:
        """The signs of the largest coordinates of the gradient, a fraction `density` of all, scaled to unit size.

        The fastest direction of all is a single coordinate, which the box stops almost at once; SLIDE (Tramer and Boneh
        2019) and l1-APGD (Croce and Hein 2021) therefore step along several. Unless told otherwise these are 1 %, as in
        SLIDE, but no fewer than hold the budget if each moves by one half: in small images 1 % could not spend it.

        Args:
            most: `coordinates` of the largest density, which only whoever made the densities knows without waiting for
                an accelerator.
        """
        size = gradient.abs().flatten(1)
        pixels = size.shape[1]
        if density is None:
            density = min(max(0.01, 2.0 * self.eps / pixels), 1.0)
        if not isinstance(density, Tensor):
            most, density = self.coordinates(density, pixels), size.new_full((len(size),), density)
        last = (pixels - 1 - ((1.0 - density) * pixels).clamp(0, pixels - 1).long())[:, None]
        ranked = size.topk(pixels if most is None else most, dim=1).values
        signs = gradient.sign() * (size >= ranked.gather(1, last)).view_as(gradient)
        return signs / per_image(self.size(signs).clamp_min(1.0))

    def coordinates(self, density: float, pixels: int) -> int:
        """How many coordinates a step along this fraction of so many can have, rounded up generously."""
        return min(int(density * pixels) + 2, pixels)

    def shrink(self, delta: Images) -> Images:
        return _soften(delta, self.eps, None)

    def project(self, images: Images, clean: Images) -> Images:
        # The nearest point of ball and box together: a clamp after the ball would leave budget unspent (Croce and Hein
        # 2021).
        return self._within(images - clean, clean).add_(clean).clamp_(0.0, 1.0)

    def sample(self, seeds: Seeds, like: Images) -> Images:
        # Uniform in the ball: the directions of independent Laplace variables, the radius as its volume grows.
        pixels = like.shape[1:]
        draw = 2.0 * uniform(fold(seeds, 1), pixels, like.device) - 1.0
        laplace = draw.sign() * -torch.log1p(-draw.abs().clamp_max(1.0 - 2.0**-24))
        radius = uniform(fold(seeds, 2), (1,), like.device)[:, 0] ** (1.0 / math.prod(pixels))
        return laplace * per_image(self.eps * radius / self.size(laplace).clamp_min(1e-30))

    def surface(self, seeds: Seeds, like: Images) -> Images:
        return self._within(normal(fold(seeds, 1), like.shape[1:], like.device), like)

    def dual(self, gradient: Images) -> PerImage:
        return gradient.abs().flatten(1).amax(1)

    def moves(self, slopes: Tensor, room: Tensor, rise: PerImage) -> Tensor:
        # The steepest pixels first, each as far as it goes; the last one a part of its way.
        order = slopes.argsort(dim=1, descending=True, stable=True)
        gains = (slopes * room).gather(1, order)
        missing = rise[:, None] - (gains.cumsum(1) - gains)
        share = torch.where(gains > 0, missing / gains, 0.0).clamp(0.0, 1.0)
        return room * torch.zeros_like(room).scatter(1, order, share)

    def _within(self, delta: Images, clean: Images) -> Images:
        """The nearest point to `delta` of the ball and the box around `clean` together."""
        return _soften(delta, self.eps, torch.where(delta > 0.0, 1.0 - clean, clean))


class TextBudget(Budget):
    """How much of a string may change, counted in words or characters."""

    @property
    def text(self) -> TextBudget:
        return self

    @abstractmethod
    def limit(self, clean: str) -> int:
        """How much of this string may change."""

    @abstractmethod
    def size(self, text: str, clean: str) -> int:
        """How much of `clean` was changed to get `text`, in the unit of the budget."""

    def check(self, texts: list[str], clean: list[str]) -> list[int]:
        """The size of each change; raises when one is larger than the budget."""
        if len(texts) != len(clean):
            raise CrossguardError(f"the attack returned {len(texts)} texts for {len(clean)}")
        sizes = [self.size(text, before) for text, before in zip(texts, clean, strict=True)]
        for size, text, before in zip(sizes, texts, clean, strict=True):
            if size > self.limit(before):
                raise CrossguardError(
                    f"the attack broke its budget {self}: {before!r} became {text!r}, a change of {size}"
                )
        return sizes


@dataclass(frozen=True)
class Words(TextBudget):
    """At most `count` words of a string may be replaced by another word each; words are what single spaces separate."""

    count: int = 1

    def __post_init__(self) -> None:
        _check_count(self)

    def limit(self, clean: str) -> int:
        return self.count

    def size(self, text: str, clean: str) -> int:
        after, before = text.split(" "), clean.split(" ")
        if len(after) != len(before):
            return max(len(after), len(before))
        return sum(new != old for new, old in zip(after, before, strict=True))


@dataclass(frozen=True)
class WordShare(TextBudget):
    """At most this share of the words of a string may be replaced, rounded down: the 40 % of BERT-Attack (Li et al.
    2020), which is none of a string of one or two words."""

    share: float = 0.4

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise CrossguardError(
                f"WordShare(share={self.share}) is not a budget: give a share from 0 to 1, such as 0.4"
            )

    def limit(self, clean: str) -> int:
        return int(self.share * len(clean.split(" ")) + 1e-9)

    def size(self, text: str, clean: str) -> int:
        return Words().size(text, clean)


@dataclass(frozen=True)
class Characters(TextBudget):
    """At most `count` characters may be inserted, deleted or replaced (Levenshtein distance)."""

    count: int = 1

    def __post_init__(self) -> None:
        _check_count(self)

    def limit(self, clean: str) -> int:
        return self.count

    def size(self, text: str, clean: str) -> int:
        return Levenshtein.distance(text, clean)


@dataclass(frozen=True)
class Both(Budget):
    """Pixels and words may change together, each within its own budget."""

    pixels: PixelBudget
    words: TextBudget

    @property
    def image(self) -> PixelBudget:
        return self.pixels

    @property
    def text(self) -> TextBudget:
        return self.words


def _check_eps(budget: Linf | L2 | L1, most: float, why: str, usual: str = "8/255") -> None:
    if not 0.0 <= budget.eps <= most:
        raise CrossguardError(
            f"{type(budget).__name__}(eps={budget.eps}) is not a budget: eps is in pixels of [0, 1], "
            f"so {usual} is usual, at least 0 and at most {most:g} ({why})"
        )


def _check_count(budget: Words | Characters) -> None:
    if budget.count < 0:
        raise CrossguardError(f"{type(budget).__name__}(count={budget.count}) is not a budget: give 0 or more")


def per_image(values: Tensor) -> Tensor:
    """One value per image, in a shape that multiplies images."""
    return values.view(-1, 1, 1, 1)


def _level(weights: Tensor, limits: Tensor, full: Tensor, wanted: PerImage) -> PerImage:
    """The water level at which the sum of `weights * min(level, limits)` is `wanted`; infinite, if it never is.

    The sum is concave in the level, so Newton's method from below climbs to it and never passes it, and ends when it
    floods no further coordinate: the variable fixing of Kiwiel (2008) for the continuous knapsack. No sorting, a
    handful of rounds, and the same answer in any batch. `full` is `weights * limits`.

    An accelerator is not waited for: there it takes `NEWTON` rounds, since rounds after the last change nothing.
    """
    level = wanted / weights.sum(1).clamp_min(1e-30)
    level = torch.where(full.sum(1) > wanted, level, torch.inf)
    looking = not waits(level.device)
    for _ in count() if looking else range(NEWTON):
        flooded = limits <= level[:, None]
        left = wanted - torch.where(flooded, full, 0.0).sum(1)
        higher = torch.maximum(level, left / torch.where(flooded, 0.0, weights).sum(1).clamp_min(1e-30))
        if looking and not bool((higher > level).any()):
            break
        level = higher
    return level


def _soften(delta: Images, eps: float, room: Images | None) -> Images:
    """The nearest perturbation of L1 norm at most `eps` (and, with `room`, of no coordinate beyond its room).

    It takes the same threshold t off every coordinate: sign(d) min(max(|d| - t, 0), room), with t >= 0 the root of the
    sum minus `eps` (Croce and Hein 2021). The sum falls piecewise linearly in t, so a Newton step from the piece that
    holds the root is exact; where one would leave the bracket, or takes too many, the bracket is halved. The authors
    sort all breakpoints instead.

    An accelerator is not waited for: there it takes `SOFTEN` rounds, and where these were too few, the end of the
    bracket that lies inside the ball.
    """
    size = delta.abs().flatten(1)
    limit = None if room is None else room.flatten(1)
    low, high = size.new_zeros(len(size)), size.amax(1)
    left, threshold, done = size, low, torch.zeros_like(low, dtype=torch.bool)
    looking = not waits(size.device)
    for attempt in range(60 if looking else SOFTEN):
        left = (size - threshold[:, None]).clamp_min_(0.0)
        moving = left > 0.0
        if limit is not None:
            moving &= left < limit
            left = torch.minimum(left, limit)
        excess = left.sum(1) - eps
        # A sample that is done stays as it is, whatever the others of its batch still need.
        done = done | (excess.abs() <= 1e-6 * eps) | ((threshold == 0.0) & (excess <= 0.0))
        if looking and bool(done.all()):
            break
        low, high = torch.where(excess > 0.0, threshold, low), torch.where(excess > 0.0, high, threshold)
        newton = threshold + excess / moving.sum(1)
        middle = 0.5 * (low + high)
        guess = torch.where((newton > low) & (newton < high), newton, middle) if attempt < 20 else middle
        threshold = torch.where(done, threshold, guess)
    if not looking:
        left = (size - torch.where(done, threshold, high)[:, None]).clamp_min_(0.0)
        left = left if limit is None else torch.minimum(left, limit)
    return left.view_as(delta).copysign(delta)


def sized(budget: PixelBudget, size: float) -> str:
    """A size in the unit of a budget, for people."""
    return f"{255 * size:.4g}/255" if isinstance(budget, Linf) else f"{size:.4g}"
