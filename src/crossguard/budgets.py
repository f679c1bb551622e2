"""What may change and how far. A budget knows geometry, never a model: every gradient attack has a norm by asking its
budget."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from crossguard.errors import CrossguardError
from crossguard.seeds import fold, normal, uniform
from crossguard.shapes import Images, PerImage, Seeds


class Budget(ABC):
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

    def project(self, images: Images, clean: Images) -> Images:
        """Back into the ball around `clean` and into [0, 1]. Clamping to the box moves towards `clean`, so the ball
        still holds."""
        return self.shrink(images - clean).add_(clean).clamp_(0.0, 1.0)

    def check(self, images: Images, clean: Images) -> PerImage:
        """The size of each perturbation; raises when one leaves the ball, the box or the finite numbers.

        The tolerance of 1e-6 (times the largest possible rounding of a sum, for L2) is far below the 1/255 of a pixel
        step.
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
        if worst > self.eps * (1.0 + 1e-4) + 1e-6:
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
        return noise * _per_image(self.eps / self.size(noise).clamp_min(1e-30))


@dataclass(frozen=True)
class L2(PixelBudget):
    """The perturbation as a whole may have a Euclidean norm of at most `eps`, over all pixels and channels of [0,
    1]."""

    eps: float

    def __post_init__(self) -> None:
        _check_eps(self, 1e4, "no image is that far from another")

    def size(self, delta: Images) -> PerImage:
        return delta.flatten(1).norm(dim=1)

    def ascent(self, gradient: Images) -> Images:
        return gradient / _per_image(gradient.flatten(1).norm(dim=1).clamp_min(1e-30))

    def shrink(self, delta: Images) -> Images:
        size = self.size(delta).clamp_min(1e-30)
        return delta * _per_image((self.eps / size).clamp_max(1.0))

    def sample(self, seeds: Seeds, like: Images) -> Images:
        direction = self.ascent(normal(fold(seeds, 1), like.shape[1:], like.device))
        radius = uniform(fold(seeds, 2), (1,), like.device)[:, 0]
        return direction * _per_image(self.eps * radius ** (1.0 / math.prod(like.shape[1:])))

    def surface(self, seeds: Seeds, like: Images) -> Images:
        return self.eps * self.ascent(normal(fold(seeds, 1), like.shape[1:], like.device))


class TextBudget(Budget):
    """How much of a string may change, counted in words or characters."""

    count: int

    @property
    def text(self) -> TextBudget:
        return self

    @abstractmethod
    def size(self, text: str, clean: str) -> int:
        """How much of `clean` was changed to get `text`, in the unit of the budget."""

    def check(self, texts: list[str], clean: list[str]) -> list[int]:
        """The size of each change; raises when one is larger than the budget."""
        if len(texts) != len(clean):
            raise CrossguardError(f"the attack returned {len(texts)} texts for {len(clean)}")
        sizes = [self.size(text, before) for text, before in zip(texts, clean, strict=True)]
        for size, text, before in zip(sizes, texts, clean, strict=True):
            if size > self.count:
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

    def size(self, text: str, clean: str) -> int:
        after, before = text.split(" "), clean.split(" ")
        if len(after) != len(before):
            return max(len(after), len(before))
        return sum(new != old for new, old in zip(after, before, strict=True))


@dataclass(frozen=True)
class Characters(TextBudget):
    """At most `count` characters may be inserted, deleted or replaced (Levenshtein distance)."""

    count: int = 1

    def __post_init__(self) -> None:
        _check_count(self)

    def size(self, text: str, clean: str) -> int:
        row = list(range(len(clean) + 1))
        for i, new in enumerate(text, 1):
            diagonal, row[0] = row[0], i
            for j, old in enumerate(clean, 1):
                diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (new != old))
        return row[-1]


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


def _check_eps(budget: Linf | L2, most: float, why: str) -> None:
    if not 0.0 <= budget.eps <= most:
        raise CrossguardError(
            f"{type(budget).__name__}(eps={budget.eps}) is not a budget: eps is in pixels of [0, 1], "
            f"so 8/255 is usual, at least 0 and at most {most:g} ({why})"
        )


def _check_count(budget: Words | Characters) -> None:
    if budget.count < 0:
        raise CrossguardError(f"{type(budget).__name__}(count={budget.count}) is not a budget: give 0 or more")


def _per_image(values: PerImage) -> Tensor:
    return values.view(-1, 1, 1, 1)
