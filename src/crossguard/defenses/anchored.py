"""Adversarial fine-tuning that the model as it was holds in place: by softened answers (AGFT), by attention maps
(TGA-ZSR), on captions (AdvFLYP); of the text tower (LEAF); and of the image tower's head alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.attacks.base import ImageAttack, TextAttack
from crossguard.attacks.gradient import PGD
from crossguard.attacks.text import Charmer
from crossguard.budgets import Budget, Characters, Linf
from crossguard.defenses.optimizers import SGD, AdamW, Optimizer
from crossguard.defenses.parts import Towers, Trainable
from crossguard.defenses.plan import Adversary, Stage
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.terms import (
    ADVERSARIAL,
    BATCH,
    CLEAN,
    IMAGE,
    KL,
    PATCHES,
    START,
    STUDENT,
    TEXT,
    Far,
    InBatch,
    Need,
    OverClasses,
    Seen,
    Term,
)
from crossguard.errors import CrossguardError
from crossguard.shapes import PerImage

_TWO_STEPS = PGD(steps=2, step=1.0, best=False, stop=False)


@dataclass(frozen=True, kw_only=True)
class AGFT(Recipe):
    """Alignment-guided fine-tuning of the image tower (Cui et al. 2026, arXiv 2603.29410): the answer to the
    adversarial image is what the model as it was says, less surely, of the clean one. The adversary climbs the same. It
    needs class prompts and no labels.

    Settings of the released code and its README: cosines times 180 for the student and times 0.4 * 180 for the teacher,
    SGD with momentum at 4e-4, 1,000 steps of warm-up and a cosine, ten epochs in batches of 128 on each of two cards,
    two steps of 1/255 at 1/255. The loss there is the cross-entropy with the teacher's answer; here it is the
    divergence from it, which has the same gradients and is zero where both agree. Under a student's factor of 180 the
    trained tower still answers with the logit scale that it has.

    Args:
        scale: the factor on the cosines of both while it trains; each model's own, if None.
        softened: the teacher's factor as a share of that.
    """

    optimizer: Optimizer = SGD(lr=4e-4)
    trains: Trainable = Towers(("image",))
    epochs: float = 10.0
    batch: int = 256
    warmup: int = 1000
    cosine: bool = True
    image_attack: ImageAttack = _TWO_STEPS
    budget: Budget = Linf(1 / 255)
    scale: float | None = 180.0
    softened: float = 0.4

    def __post_init__(self) -> None:
        if self.softened <= 0.0 or (self.scale is not None and self.scale <= 0.0):
            raise CrossguardError(
                f"AGFT(scale={self.scale}, softened={self.softened}) teaches nothing; give positive factors"
            )
        super().__post_init__()

    def stages(self) -> tuple[Stage, ...]:
        loss = KL(ADVERSARIAL, to=(START, CLEAN), scale=self.scale, softened=self.softened)
        return (self.stage(loss, adversaries=(Adversary(self.image_attack, self.budget, loss),)),)


def _length(rows: Tensor) -> PerImage:
    """The Euclidean length of each row; without a gradient where it is but rounding, as at the start of a training,
    when the direction would be chance and yet of length one."""
    length = torch.linalg.vector_norm(rows, dim=1)
    return torch.where(length > 1e-4, length, length.detach())


@dataclass(frozen=True)
class Attention(Term):
    """How far the text-guided attention map of an image has moved from the one that the model as it was makes of the
    clean image: the root of the summed squares (TGA-ZSR).

    The map is the cosine of each patch token with the text of the image's class, stretched so that its least value is 0
    and its largest 1, and enlarged bilinearly.

    Args:
        view: the view that the student sees.
        size: the side of the enlarged map in pixels. The distance grows about in proportion to it.
        over_tokens: divide each dimension of the tokens by its norm over all tokens of the image, the class token
            among them, as released code does, instead of each token by its own norm.
    """

    view: str = ADVERSARIAL
    size: int = 224
    over_tokens: bool = False

    labelled: ClassVar[bool] = True

    def needs(self) -> tuple[Need, ...]:
        pairs = ((self.view, STUDENT), (CLEAN, START))
        return (*(Need(tower, view, who) for view, who in pairs for tower in (PATCHES, IMAGE)), Need(TEXT))

    def each(self, seen: Seen) -> PerImage:
        texts = F.normalize(seen.text().float(), dim=1)[seen.labels]
        mine = self._map(seen.patches(self.view), seen.image(self.view), texts)
        there = seen.once(
            (Attention, self.size, self.over_tokens),
            lambda: self._map(seen.patches(CLEAN, START), seen.image(CLEAN, START), texts),
        )
        return _length((mine - there).flatten(1))

    def _map(self, patches: Tensor, image: Tensor, texts: Tensor) -> Tensor:
        side = isqrt(patches.shape[1])
        if side * side != patches.shape[1]:
            raise CrossguardError(f"{patches.shape[1]} patches are no square, and attention maps are made of squares")
        if self.over_tokens:
            patches = F.normalize(torch.cat([image[:, None], patches], dim=1).float(), dim=1)[:, 1:]
        else:
            patches = F.normalize(patches.float(), dim=2)
        near = (patches * texts[:, None]).sum(2)
        low, high = near.amin(1, keepdim=True), near.amax(1, keepdim=True)
        grid = ((near - low) / (high - low).clamp_min(1e-12)).view(-1, 1, side, side)
        return F.interpolate(grid, (self.size, self.size), mode="bilinear", align_corners=False)


@dataclass(frozen=True, kw_only=True)
class TGAZSR(Recipe):
    """Text-guided attention for zero-shot robustness (Yu et al. 2024, arXiv 2410.21802): the cross-entropy of TeCoA,
    and the attention maps of the adversarial and of the clean image stay near the one that the model as it was makes of
    the clean image. It needs patch tokens: a CLIP, or a VisionTextDualEncoder with a ViT.

    Settings of the released code: weights 0.08 and 0.05, SGD with momentum at 1e-4, 1,000 steps of warm-up and a
    cosine, ten epochs in batches of 128, two steps of 1/255 at 1/255; the adversary climbs the cross-entropy. That code
    divides patch tokens by norms over the tokens and not over the dimensions, though the formula calls for cosines:
    `TGAZSR(over_tokens=True)`. A reconstruction in that the maps are enlarged to 224 pixels whatever the model reads.
    Comp-TGA, which also looks at prompts of what the class is not, is not here.

    Args:
        refined: weight of the adversarial image's map.
        constrained: weight of the clean image's map.
        size: the side of the enlarged maps in pixels.
        over_tokens: norms as in the released code.
    """

    optimizer: Optimizer = SGD(lr=1e-4)
    trains: Trainable = Towers(("image",))
    epochs: float = 10.0
    warmup: int = 1000
    cosine: bool = True
    clamp_scale: bool = True
    image_attack: ImageAttack = _TWO_STEPS
    budget: Budget = Linf(1 / 255)
    refined: float = 0.08
    constrained: float = 0.05
    size: int = 224
    over_tokens: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise CrossguardError(f"TGAZSR(size={self.size}) has no attention maps; give 1 pixel or more")
        super().__post_init__()

    def stages(self) -> tuple[Stage, ...]:
        loss = OverClasses(ADVERSARIAL)
        refined = Attention(ADVERSARIAL, self.size, self.over_tokens, weight=self.refined)
        constrained = Attention(CLEAN, self.size, self.over_tokens, weight=self.constrained)
        attack = Adversary(self.image_attack, self.budget, loss)
        return (self.stage(loss, refined, constrained, adversaries=(attack,)),)


@dataclass(frozen=True)
class Apart(Far):
    """The distance, not squared, between embeddings of unit length and a teacher's."""

    def each(self, seen: Seen) -> PerImage:
        mine, theirs = (F.normalize(seen[need].float(), dim=1) for need in self.needs())
        return _length(mine - theirs)


@dataclass(frozen=True, kw_only=True)
class AdvFLYP(Recipe):
    """Adversarial fine-tuning of the image tower as it was pre-trained (Xing et al. 2026, arXiv 2604.11576):
    adversarial images are matched with captions by CLIP's own loss. Two more terms hold the adversarial image near what
    the model as it was makes of it, and near the clean one: distances of unit embeddings, and divergences of the
    answers over the captions of the batch.

    Settings of the released code: both weights 1, SGD with momentum at 1e-4, 1,000 steps of warm-up and a cosine,
    batches of 256, two steps of 1/255 at 1/255. Its command asks for 100 epochs of a million pairs of the web and stops
    early; ten are what its code has without. A reconstruction in two points: the adversary climbs the image-to-text
    half of the loss, since in the other half, which it climbs there as well, the images of a batch depend on each
    other; and the answers are over the distinct captions.

    Args:
        features: weight of the two distances; 0 leaves them out.
        answers: weight of the two divergences; 0 leaves them out.
    """

    optimizer: Optimizer = SGD(lr=1e-4)
    trains: Trainable = Towers(("image",))
    epochs: float = 10.0
    batch: int = 256
    warmup: int = 1000
    cosine: bool = True
    captions: bool = True
    image_attack: ImageAttack = _TWO_STEPS
    budget: Budget = Linf(1 / 255)
    features: float = 1.0
    answers: float = 1.0

    def stages(self) -> tuple[Stage, ...]:
        to = ((START, ADVERSARIAL), (STUDENT, CLEAN))
        held = [Apart(ADVERSARIAL, one, weight=self.features) for one in to]
        held += [KL(ADVERSARIAL, one, reverse=True, weight=self.answers) for one in to]
        attack = Adversary(self.image_attack, self.budget, OverClasses(ADVERSARIAL, over=BATCH))
        loss = InBatch(ADVERSARIAL, weight=0.5)
        return (self.stage(loss, *(term for term in held if term.weight), adversaries=(attack,)),)


@dataclass(frozen=True, kw_only=True)
class LEAF(Recipe):
    """Unsupervised adversarial fine-tuning of the text tower (Abad Rocamora et al. 2025, arXiv 2506.03355), FARE for
    texts: the raw embedding of the adversarial text stays where that of the clean text was before the training, by the
    squared distance summed over dimensions; the adversary edits one character and climbs the same. It needs captions,
    or with `captions=False` class prompts, and no labels; images are not looked at.

    Settings of the released code and its script for a ViT-L: AdamW at 1e-5 with PyTorch's betas and decay 1e-4, 1,400
    steps of warm-up and a cosine, 30 epochs of 80,000 captions in batches of 128; 50 random places, then 50 random
    characters at the best of them. A reconstruction in three points: the mean is over the distinct texts of a batch,
    decay reaches gains and biases too, and the script's constraint that the text must lose an English word needs a list
    of them, which does not come with this package. `text_attack=Charmer(positions=50, random=True,
    no_new_words='words.json')` asks for less: that it gains none. The paper begins with a FARE of the image tower.
    """

    optimizer: Optimizer = AdamW(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    trains: Trainable = Towers(("text",))
    epochs: float = 30.0
    warmup: int = 1400
    cosine: bool = True
    captions: bool = True
    text_attack: TextAttack = Charmer(positions=50, random=True)
    budget: Budget = Characters(1)

    def stages(self) -> tuple[Stage, ...]:
        loss = Far(ADVERSARIAL, to=(START, CLEAN), tower=TEXT)
        return (self.stage(loss, adversaries=(Adversary(self.text_attack, self.budget, loss),)),)


_HEADS = ("cross-entropy", "distance", "contrastive")


@dataclass(frozen=True, kw_only=True)
class RobustHead(Recipe):
    """Adversarial training of the last layer of the image tower alone, its projection into the shared space: what a
    defense that changes more should beat.

    A reconstruction of the idea of training small heads on the adversarial examples of a frozen backbone
    (arXiv 2505.11895), with the three losses named there. The head here is the one that the model has, and rates,
    budget and steps are ours. The attack goes through the whole tower.

    In a model of open_clip the last layer is the norm in front of the projection.

    Args:
        loss: 'cross-entropy' over class prompts (as TeCoA), 'distance' of raw embeddings from those of the clean images
            (as FARE, without labels), or 'contrastive' (as the images of MMCoA).
    """

    optimizer: Optimizer = SGD(lr=1e-2)
    trains: Trainable = Towers(("image",), last=1)
    cosine: bool = True
    image_attack: ImageAttack = PGD(steps=10, step=0.25, best=False, stop=False)
    budget: Budget = Linf(4 / 255)
    loss: str = "cross-entropy"

    def __post_init__(self) -> None:
        if self.loss not in _HEADS:
            raise CrossguardError(f"RobustHead(loss={self.loss!r}) is not known; give one of {', '.join(_HEADS)}")
        super().__post_init__()

    def stages(self) -> tuple[Stage, ...]:
        if self.loss == "contrastive":
            loss, climbs = InBatch(ADVERSARIAL), OverClasses(ADVERSARIAL, over=BATCH)
        else:
            loss = climbs = Far(ADVERSARIAL) if self.loss == "distance" else OverClasses(ADVERSARIAL)
        return (self.stage(loss, adversaries=(Adversary(self.image_attack, self.budget, climbs),)),)
