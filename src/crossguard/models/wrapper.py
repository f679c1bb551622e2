"""A model around a model: the seam of test-time and training-free defenses."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from crossguard.data import Prompts
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.seeds import drawn, normal
from crossguard.shapes import Embeddings, Images, Logits, PerImage, Seeds, TextEmbeddings


class Wrapper(VisionLanguageModel):
    """A defended model is a model: whatever a wrapper does not change is its base's.

    A wrapper that changes how images are embedded can stand around any model whose classes are told apart by
    embeddings. One that needs the prompts, or votes over logits, writes `classifier` itself, starting from
    `self.base.classifier(prompts)`; what such a defense does is lost around it, so that is refused.
    """

    base: VisionLanguageModel

    def encode_image(self, images: Images) -> Embeddings:
        return self.base.encode_image(images)

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        return self.base.encode_text(texts)

    def cut(self, texts: Sequence[str]) -> int:
        return self.base.cut(texts)

    def logits(self, images: Embeddings, texts: TextEmbeddings) -> Logits:
        return self.base.logits(images, texts)

    @property
    def device(self) -> torch.device:
        return self.base.device

    def classifier(self, prompts: Prompts) -> Callable[[Images], Logits]:
        _check_kept(self, self.base)
        return super().classifier(prompts)

    def keys(self, count: int, use: str = "") -> Seeds:
        """The keys that this wrapper draws its noise from for `count` images (see `seeds.drawn`). Its gate and its
        images each begin anew (`seeds.same_draw`), so what opens the gate is what acts behind it.

        Args:
            use: tells apart several kinds of noise of one answer.
        """
        return drawn(count, f"{type(self).__name__} {len(layers(self))} {use}")

    def smooth(self) -> VisionLanguageModel:
        """A stand-in whose gradients are its true ones, every hard step (a sign, a rounding, a gate) replaced by a
        smooth one: what `Unrolled` crafts on. Raises, where a wrapper offers none."""
        if not self.differentiable:
            raise CrossguardError(f"{type(self).__name__} offers no smooth version of itself; it is attacked by BPDA")
        inner = self.base.smooth() if isinstance(self.base, Wrapper) else self.base
        return self if inner is self.base else replace(self, base=inner)  # type: ignore[type-var]

    def gate(self, images: Images) -> PerImage:
        """How far the defense is from doing nothing: it acts on an image where this is positive. A wrapper without a
        gate passes on that of its base; raises, where there is none."""
        if isinstance(self.base, Wrapper):
            return self.base.gate(images)
        raise CrossguardError(f"{type(self).__name__} has no gate to aim at; it always acts")


def layers(model: VisionLanguageModel) -> list[VisionLanguageModel]:
    """A defended model and what it wraps, from the outside in."""
    found = [model]
    while isinstance(found[-1], Wrapper):
        found.append(found[-1].base)
    return found


def _check_kept(outer: VisionLanguageModel, base: VisionLanguageModel) -> None:
    """Raises where the outer model would ask what is inside for embeddings only, and something in there answers
    otherwise than by them."""
    for inner in layers(base):
        for name in ("classifier", "class_embeddings"):
            if getattr(type(inner), name) not in (getattr(VisionLanguageModel, name), getattr(Wrapper, name)):
                around, lost = type(outer).__name__, type(inner).__name__
                raise CrossguardError(
                    f"{around} around {lost} would lose what {lost} does with the prompts (its {name}); put {lost} "
                    f"around {around}, or give {around} a {name} of its own"
                )


class Purifier(Wrapper):
    """A wrapper that cleans the pixels first. Attacks see through it by BPDA (Athalye et al. 2018): the forward uses
    the purified image, the backward treats purifying as the identity. So a purifier is attacked adaptively unless a
    surrogate says otherwise.

    Purifying is done without gradients, so a long chain of steps costs no memory; a purifier that needs some for steps
    of its own turns them on (`torch.enable_grad`) for pixels of its own.
    """

    differentiable = False

    @abstractmethod
    def purify(self, images: Images) -> Images:
        """Cleaner images, same shape, in [0, 1]."""

    def encode_image(self, images: Images) -> Embeddings:
        return self.base.encode_image(self._purified(images))

    def _purified(self, images: Images) -> Images:
        """The purified images, whose gradient is passed on to the images as they were."""
        with torch.no_grad():
            change = self.purify(images.detach()) - images
        return images + change

    def smoothed(self, images: Images) -> Images:
        """`purify` without its hard steps, differentiable."""
        del images
        raise CrossguardError(f"{type(self).__name__} offers no smooth version of itself; it is attacked by BPDA")

    def smooth(self) -> VisionLanguageModel:
        return _Smoothed(self)

    def gate(self, images: Images) -> PerImage:
        return super().gate(self._purified(images))


@dataclass(frozen=True)
class BitDepth(Purifier):
    """Rounds every pixel to `bits` bits (feature squeezing, Xu et al. 2018): the simplest purifier, and a
    gradient-masking one."""

    base: VisionLanguageModel
    bits: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CrossguardError(f"BitDepth(bits={self.bits}) is not possible; give 1 to 8 bits")

    def purify(self, images: Images) -> Images:
        levels = 2**self.bits - 1
        return torch.round(images * levels) / levels

    def smoothed(self, images: Images) -> Images:
        """The staircase with steps of finite slope: between two levels a sigmoid that passes through both."""
        levels, steepness = 2**self.bits - 1, 8.0
        below = torch.floor(images * levels).detach()
        rise = torch.sigmoid(steepness * (images * levels - below - 0.5))
        low, high = 1.0 / (1.0 + math.exp(steepness / 2)), 1.0 / (1.0 + math.exp(-steepness / 2))
        return (below + (rise - low) / (high - low)) / levels


@dataclass(frozen=True)
class GaussianNoise(Wrapper):
    """Adds Gaussian noise of standard deviation `std` (in pixels of [0, 1]) to each image, anew at each question: the
    simplest random defense. One draw, not the vote of randomized smoothing (Cohen et al. 2019)."""

    base: VisionLanguageModel
    std: float = 8 / 255
    random = True

    def __post_init__(self) -> None:
        if not self.std >= 0.0:
            raise CrossguardError(f"GaussianNoise(std={self.std}) is not possible; give 0 or more, in pixels of [0, 1]")

    def encode_image(self, images: Images) -> Embeddings:
        noise = normal(self.keys(len(images)), images.shape[1:], images.device)
        return self.base.encode_image((images + self.std * noise).clamp(0.0, 1.0))


@dataclass(frozen=True)
class Unrolled(VisionLanguageModel):
    """A defended model with its hard steps made smooth, as the surrogate to craft on: gradients go through the defense
    instead of around it (BPDA). Judged is the defense itself: `surrogate="Unrolled(BitDepth(Tiny()))"`."""

    base: Wrapper

    def encode_image(self, images: Images) -> Embeddings:
        return self.base.smooth().encode_image(images)

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        return self.base.smooth().encode_text(texts)

    def logits(self, images: Embeddings, texts: TextEmbeddings) -> Logits:
        return self.base.logits(images, texts)

    def classifier(self, prompts: Prompts) -> Callable[[Images], Logits]:
        return self.base.smooth().classifier(prompts)

    def gate(self, images: Images) -> PerImage:
        return self.base.gate(images)

    @property
    def device(self) -> torch.device:
        return self.base.device


@dataclass(frozen=True)
class _Smoothed(Wrapper):
    """A purifier with the gradients of its smooth version."""

    purifier: Purifier

    def __post_init__(self) -> None:
        _check_kept(self, self.purifier)

    @property
    def base(self) -> VisionLanguageModel:  # type: ignore[override]
        inner = self.purifier.base
        return inner.smooth() if isinstance(inner, Wrapper) else inner

    def encode_image(self, images: Images) -> Embeddings:
        return self.base.encode_image(self.purifier.smoothed(images))
