"""What a training can be told: the options that every recipe has, and what a recipe says of its loss and adversary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from crossguard.attacks.base import ImageAttack, TextAttack
from crossguard.budgets import Budget
from crossguard.defenses.optimizers import Adam, Optimizer
from crossguard.defenses.terms import Term
from crossguard.errors import CrossguardError
from crossguard.seeds import uniform
from crossguard.shapes import Images, Seeds

TOWERS = ("image", "text", "head")


@dataclass(frozen=True)
class Augment:
    """Random flips and shifts (reflected at the border) of training images, drawn per sample and step."""

    flip: bool = True
    shift: int = 4

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise CrossguardError(f"Augment(shift={self.shift}) is not possible; give 0 or more pixels")

    def __call__(self, images: Images, seeds: Seeds) -> Images:
        if self.shift >= min(images.shape[-2:]):
            size = tuple(images.shape[-2:])
            raise CrossguardError(f"Augment(shift={self.shift}) is too far for images of {size} pixels; lower it")
        chance = uniform(seeds, (3,), images.device)
        if self.flip:
            images = torch.where((chance[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
        if self.shift:
            height, width = images.shape[-2:]
            padded = F.pad(images, (self.shift,) * 4, mode="reflect")
            tops = (chance[:, 1] * (2 * self.shift + 1)).long()
            lefts = (chance[:, 2] * (2 * self.shift + 1)).long()
            images = torch.stack(
                [
                    image[:, top : top + height, left : left + width]
                    for image, top, left in zip(padded, tops.tolist(), lefts.tolist(), strict=True)
                ]
            )
        return images


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """How a training goes: the options that every recipe has.

    Args:
        epochs: passes over the data; `steps`, if given, counts instead.
        steps: optimizer steps.
        batch: images in a step, over all processes together.
        optimizer: an optimizer word.
        warmup: steps over which the learning rate rises linearly.
        cosine: the rate falls to zero along a half cosine afterwards; otherwise it stays.
        towers: what is trained, of 'image', 'text' and 'head' (the logit scale and bias).
        last: train only the last so many layers of each tower (a layer is a module that owns parameters); all, if None.
        shots: train on this many images of each class, the same ones in every epoch; all, if None.
        fresh_shots: other images of each class in every epoch, as the released code of MMCoA does: it reports "k-shot"
            runs that see k times epochs images of a class. Starts over when they run out (there, epochs become empty).
        captions: pair each image with one of its captions (drawn anew each step) instead of its class prompt.
        augment: random flips and shifts; none, if None.
        clamp_scale: keep the logit scale at most 100, as CLIP and TeCoA train.
        clip: largest norm of the gradient; not limited, if None.
        bf16: forward and backward in bfloat16 autocast; attacks stay in float32.
        save_every: seconds between saves of the running training, which take a twentieth of its time at most.
        seed: of everything random.
    """

    epochs: float = 1.0
    steps: int | None = None
    batch: int = 128
    optimizer: Optimizer = Adam()
    warmup: int = 0
    cosine: bool = False
    towers: tuple[str, ...] = TOWERS
    last: int | None = None
    shots: int | None = None
    fresh_shots: bool = False
    captions: bool = False
    augment: Augment | None = None
    clamp_scale: bool = False
    clip: float | None = None
    bf16: bool = False
    save_every: int = 100
    seed: int = 0

    def adversary(self) -> tuple[ImageAttack | None, TextAttack | None, Budget | None]:
        """The inner adversary: what attacks the images and the texts of a batch, and how far; nothing by default."""
        return None, None, None

    @property
    def leaks(self) -> bool:
        """Whether the parameter gradients of the attack's steps are added to the update, a fault of released code."""
        return False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.steps is not None and self.steps < 1:
            raise CrossguardError(f"{name}(steps={self.steps}) trains nothing; give 1 or more steps")
        if not 0 < self.epochs <= 1e6:
            raise CrossguardError(
                f"{name}(epochs={self.epochs}) is not possible; give a positive number of epochs, at most a million"
            )
        if self.seed < 0:
            raise CrossguardError(f"{name}(seed={self.seed}) is not possible; give 0 or more")
        if self.fresh_shots and self.shots is None:
            raise CrossguardError(f"{name}(fresh_shots=True) needs a number of shots, such as shots=16")
        if self.batch < 2:
            raise CrossguardError(
                f"{name}(batch={self.batch}) is not possible; a contrastive batch needs at least 2 images"
            )
        if not self.towers or set(self.towers) - set(TOWERS):
            raise CrossguardError(f"{name}(towers={self.towers}) is not possible; give some of {TOWERS}")
        for field in ("last", "shots"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise CrossguardError(f"{name}({field}={value}) is not possible; give 1 or more")
        if self.save_every < 0:
            raise CrossguardError(f"{name}(save_every={self.save_every}) is not possible; give 0 or more seconds")
        if self.warmup < 0:
            raise CrossguardError(f"{name}(warmup={self.warmup}) is not possible; give 0 or more steps")
        if self.clip is not None and not self.clip > 0:
            raise CrossguardError(f"{name}(clip={self.clip}) trains nothing; give a positive norm, or None")

    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The weighted sum that the student descends."""
