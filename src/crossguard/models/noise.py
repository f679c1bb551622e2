"""Defenses that add noise to the pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.models.kinds import Transform
from crossguard.models.wrapper import Wrapper
from crossguard.shapes import Images


@dataclass(frozen=True)
class GaussianNoise(Transform):
    """Adds Gaussian noise of standard deviation `std` (in pixels of [0, 1]) to each image, anew at each question: the
    simplest random defense. One draw, not the vote of randomized smoothing (Cohen et al. 2019)."""

    base: VisionLanguageModel
    std: float = 8 / 255
    random = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.std >= 0.0:
            raise CrossguardError(f"GaussianNoise(std={self.std}) is not possible; give 0 or more, in pixels of [0, 1]")

    def transform(self, images: Images) -> Images:
        return (images + self.std * self.normal(images)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class RN(Transform):
    """Adds uniform noise in [-eps, eps] to each image: the baseline "RN" of the counterattack papers, TTC (Xing et al.
    2025) without a step. Their code takes 4/255.

    Args:
        eps: in pixels of [0, 1].
    """

    base: VisionLanguageModel
    eps: float = 4 / 255
    random = True
    draws_as = "TTC"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.eps <= 1.0:
            raise CrossguardError(f"RN(eps={self.eps}) is not possible; give 0 to 1, in pixels of [0, 1]")

    def transform(self, images: Images) -> Images:
        return (images + start(self, images, self.eps)).clamp(0.0, 1.0)


def start(defense: Wrapper, images: Images, eps: float, use: str = "start") -> Tensor:
    """Uniform noise in [-eps, eps] that leaves the images in [0, 1]: where a counterattack begins."""
    return within(eps * defense.uniform(images, use), images, eps)


def within(change: Tensor, images: Images, eps: float) -> Tensor:
    """The change cut to [-eps, eps] and to what leaves the images in [0, 1]."""
    return change.clamp(-eps, eps).clamp(min=-images, max=1.0 - images)
