"""Defenses that move an image by what the model itself says of it: towards its own answer, away from all answers, or to
where it is surest of some."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crossguard.answer import Answer, Said, twice_differentiable
from crossguard.budgets import Linf, PixelBudget, per_image
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel, constant
from crossguard.models.counterattack import climb, direction
from crossguard.models.kinds import Purifier
from crossguard.models.noise import start
from crossguard.models.wrapper import Lent
from crossguard.shapes import Images, Labels, Logits, PerImage

STD = (0.26862954, 0.26130258, 0.27577711)  # by which CLIP divides its pixels


class _Moving(Purifier):
    """A defense that climbs the logits for some steps; needs classes."""

    def around(self, inner: Answer, live: Lent) -> Answer:
        live.texts(inner)
        return super().around(inner, live)

    @abstractmethod
    def moved(self, images: Images, inner: Answer, smooth: bool) -> Images:
        """The images after all steps, each differentiable and its sign a tanh if `smooth`."""

    def purify(self, images: Images, inner: Answer) -> Images:
        return self.moved(images, inner, False)

    def smoothed(self, images: Images, inner: Answer) -> Images:
        with twice_differentiable():
            return self.moved(images, inner, True)


@dataclass(frozen=True)
class AntiAdversary(_Moving):
    """Anti-adversary (Alfarra et al., AAAI 2022): the image is moved to where the model is surer of what it already
    says. Two signed steps down the cross-entropy of its own answer, each cut to [0, 1] and to no other ball.

    The numbers are those of the authors' code. The comparisons on CLIP take its step of 0.15 on normalized pixels, so
    it is one here: about 0.04 in pixels of [0, 1]. Around networks that normalize inside, the authors themselves take
    0.15 in pixels of [0, 1], which is `unit=(1.0, 1.0, 1.0)`. An image costs 4 forwards and 2 backwards.

    The smooth stand-in is ours: each sign a tanh of the gradient over its mean size.

    Args:
        step: of each pixel, in units of `unit`.
        unit: for red, green and blue, in pixels of [0, 1]; those by which CLIP divides.
    """

    base: VisionLanguageModel
    step: float = 0.15
    steps: int = 2
    unit: tuple[float, float, float] = STD

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(self, self.step, self.steps)
        if len(self.unit) != 3 or not all(0.0 < one < float("inf") for one in self.unit):
            raise CrossguardError(f"AntiAdversary(unit={self.unit}) is none; give three positive numbers, as (1, 1, 1)")

    def moved(self, images: Images, inner: Answer, smooth: bool) -> Images:
        length = self.step * constant(self.unit, images.device, images.dtype).view(3, 1, 1)
        with torch.no_grad():
            labels = inner.hard(images).logits.argmax(1)
        found = images
        for _ in range(self.steps):
            gradient, _ = inner.ascend(found, lambda said: sureness(said.logits, labels), graph=smooth)
            found = (found + length * direction(gradient, smooth)).clamp(0.0, 1.0)
        return found


@dataclass(frozen=True)
class HedgeDefense(_Moving):
    """Hedge defense (Wu et al., 2021): the image is moved to where the model is farthest from every answer at once,
    since wrong answers are said to give way first. Signed steps up the sum of the cross-entropies of all classes,
    within `eps` of the image.

    The numbers are those of Croce et al. (ICML 2022), who wrote it again to attack it. An image costs 21 forwards and
    20 backwards.

    The smooth stand-in is ours: each sign a tanh of the gradient over its mean size.

    Args:
        eps: in pixels of [0, 1].
        step: as a fraction of eps.
        random_start: begin at uniform noise in [-eps, eps] instead of at the image; Croce et al. take both.
    """

    base: VisionLanguageModel
    eps: float = 8 / 255
    step: float = 0.5
    steps: int = 20
    random_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_eps(self, self.eps)
        _check_steps(self, self.step, self.steps)

    @property
    def random(self) -> bool:  # type: ignore[override]  # of other words it is fixed, of this one a setting
        return self.random_start

    def moved(self, images: Images, inner: Answer, smooth: bool) -> Images:
        first = start(self, images, self.eps) if self.random_start else torch.zeros_like(images)
        found, _ = climb(images, inner, first, _everything, self.eps, self.step * self.eps, self.steps, smooth)
        return (images + found[-1]).clamp(0.0, 1.0)


def _everything(said: Said) -> PerImage:
    """The sum of the cross-entropies of all classes."""
    return -said.logits.log_softmax(1).sum(1)


def sureness(logits: Logits, labels: Labels) -> PerImage:
    """The logarithm of the probability of a label."""
    return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]


@dataclass(frozen=True)
class ET3(_Moving):
    """Energy-guided test-time transformation (ET3, Mirza et al., CVPR 2026): the image is moved down its energy,
    E = -t log sum exp(logits / t), by steps along the gradient of a fixed length in the L2 norm.

    The numbers are those of the authors' code for CLIP models that were trained adversarially: two steps of 2.5, each
    pixel kept within 4/255 (FARE; 5/255 for TeCoA). Their text speaks of an L2 ball, and their code for classifiers has
    one: `ball=L2(10.0)`, one step of 5. The length of a step is that of all pixels together, so at 32 pixels a side the
    same number goes seven times as far as at 224. An image costs 3 forwards and 2 backwards.

    Nothing in it is hard, so the smooth stand-in is the defense itself with its true gradient, taken by differentiating
    its gradients.

    Args:
        step: the L2 norm of a step, in pixels of [0, 1].
        ball: where the image may go, from where it was.
        temperature: t.
    """

    base: VisionLanguageModel
    step: float = 2.5
    steps: int = 2
    ball: PixelBudget = field(default_factory=lambda: Linf(4 / 255))
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(self, self.step, self.steps)
        if not 0.0 < self.temperature < float("inf"):
            raise CrossguardError(f"ET3(temperature={self.temperature}) is not possible; give a positive number")

    def moved(self, images: Images, inner: Answer, smooth: bool) -> Images:
        found = images
        for _ in range(self.steps):
            gradient, _ = inner.ascend(found, self._calm, graph=smooth)
            found = (found + self.step * unit(gradient)).clamp(0.0, 1.0)
            found = self.ball.project(found, images)
        return found

    def _calm(self, said: Said) -> PerImage:
        """Minus the energy."""
        return self.temperature * torch.logsumexp(said.logits / self.temperature, 1)


def unit(gradient: Tensor) -> Tensor:
    """Of each image, the gradient at length 1 in the L2 norm; zero where it is zero."""
    return gradient / per_image(gradient.flatten(1).norm(dim=1).clamp_min(1e-12))


def _check_eps(defense: Purifier, eps: float) -> None:
    if not 0.0 <= eps <= 1.0:
        name = type(defense).__name__
        raise CrossguardError(f"{name}(eps={eps}) is not possible; give 0 to 1, in pixels of [0, 1], such as 8/255")


def _check_steps(defense: Purifier, step: float, steps: int) -> None:
    name = type(defense).__name__
    if not 0.0 < step < float("inf"):
        raise CrossguardError(f"{name}(step={step}) does not move; give a positive number")
    if steps < 1:
        raise CrossguardError(f"{name}(steps={steps}) does nothing; give 1 or more")
