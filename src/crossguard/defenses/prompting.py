"""Training-time defenses that learn prompts and leave the weights as they are: AdvPT, APT, visual prompting, C-AVP and
FAP.

Any of them trains any part (`trains=...`): what is given here is what its paper trains. Momentum 0.9 and weight decay
5e-4 of AdvPT, APT and FAP are the defaults of Dassl, the toolbox behind them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.attacks.base import ImageAttack
from crossguard.attacks.gradient import PGD
from crossguard.budgets import Budget, Linf
from crossguard.defenses.optimizers import SGD, Optimizer
from crossguard.defenses.parts import Trainable
from crossguard.defenses.plan import Adversary, Stage
from crossguard.defenses.prompts import ClassFrames, Combined, Context, Coupled, Deep, Frame
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.terms import (
    ADVERSARIAL,
    CLEAN,
    IMAGE,
    KL,
    START,
    STUDENT,
    TEXT,
    Far,
    Need,
    OverClasses,
    Seen,
    Term,
)
from crossguard.errors import CrossguardError
from crossguard.models.prompted import seen_with
from crossguard.shapes import Labels, Logits, PerImage


@dataclass(frozen=True)
class Smeared(Far):
    """The Kullback-Leibler divergence KL(teacher || student) of softmaxed raw embeddings, as if their dimensions were
    classes: what AdvPT's attack climbs, which knows no texts."""

    def each(self, seen: Seen) -> PerImage:
        mine, theirs = (F.log_softmax(seen[need].float(), dim=1) for need in self.needs())
        return (theirs.exp() * (theirs - mine)).sum(1)


@dataclass(frozen=True)
class OfBank(Term):
    """The cross-entropy of image embeddings as the model had them before the training, with the student's texts over
    all classes. Images that an adversary made once have one embedding each, which makes a bank of them.

    Args:
        image: the view of the images.
    """

    image: str = ADVERSARIAL

    labelled: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    def needs(self) -> tuple[Need, ...]:
        return (Need(IMAGE, self.image, START), Need(TEXT, CLEAN))

    def each(self, seen: Seen) -> PerImage:
        return F.cross_entropy(*self.answers(seen), reduction="none")

    def answers(self, seen: Seen) -> tuple[Logits, Labels]:
        return seen.heads[STUDENT](seen.image(self.image, START), seen.text()), seen.labels


@dataclass(frozen=True, kw_only=True)
class AdvPT(Recipe):
    """Adversarial prompt tuning (Zhang et al. 2024): 32 learned words before the class name, which all classes share,
    descend the cross-entropy of a bank of adversarial image embeddings. The bank is made once, by an attack on the
    original image tower that knows no texts and climbs the divergence of softmaxed raw embeddings; both towers stay as
    they are.

    Numbers of the released code: 8/255 in 10 steps of 1.25/10 of it, whose start brightens only; SGD 0.002 with a
    cosine, batch 32, 100 epochs, all images. There, the first epoch has the rate 1e-5, and images are not augmented. It
    tests with 16/255 in 40 steps of the same attack on the original tower, which cannot know the prompt: to repeat that
    give the base as the surrogate.
    """

    trains: Trainable = Context(tokens=32)
    optimizer: Optimizer = SGD(lr=2e-3, weight_decay=5e-4)
    cosine: bool = True
    epochs: float = 100.0
    batch: int = 32
    image_attack: ImageAttack = PGD(steps=10, step=0.125, nonnegative_start=True, best=False, stop=False)
    budget: Budget = Linf(8 / 255)

    def stages(self) -> tuple[Stage, ...]:
        climbs = Smeared(ADVERSARIAL, (START, CLEAN))
        maker = Adversary(self.image_attack, self.budget, climbs, on=START, once=True)
        return (self.stage(OfBank(), adversaries=(maker,)),)


@dataclass(frozen=True, kw_only=True)
class APT(Recipe):
    """Adversarial prompt tuning (Li et al. 2024): 16 learned words before the class name descend the cross-entropy of
    images that are attacked on the fly, against the words as they are. The words of all classes are the same, or with
    `trains=Context(tokens=16, specific=True)` each class has its own. The towers stay as they are; in the paper the
    image tower was trained by TeCoA before.

    Numbers of the released code: 4/255 in 3 steps of 2.67/255, SGD 0.002 with a cosine, batch 32, 50 epochs, 16 images
    of each class, random crops and flips (here `augment`). There, the first epoch has the rate 1e-5. Of its three ways
    to attack, 'onfly' is the default, and the others are switches.

    Args:
        constant: attack the model with its own prompts instead, as it was.
        perturbed: while the images are attacked the words climb as well, by plain gradient steps of this rate, and are
            put back behind the attack. The code gives the rate no default.
    """

    trains: Trainable = Context(tokens=16)
    optimizer: Optimizer = SGD(lr=2e-3, weight_decay=5e-4)
    cosine: bool = True
    epochs: float = 50.0
    batch: int = 32
    shots: int | None = 16
    image_attack: ImageAttack = PGD(steps=3, step=2.67 / 4, best=False, stop=False)
    budget: Budget = Linf(4 / 255)
    constant: bool = False
    perturbed: float = 0.0

    def __post_init__(self) -> None:
        if self.constant and self.perturbed:
            raise CrossguardError(
                "APT(constant=True) attacks the model as it was, whose words stay; give perturbed=0.0 or constant=False"
            )
        super().__post_init__()

    def stages(self) -> tuple[Stage, ...]:
        loss, on = OverClasses(ADVERSARIAL, CLEAN), START if self.constant else STUDENT
        maker = Adversary(self.image_attack, self.budget, loss, on=on, ascends=self.perturbed)
        return (self.stage(loss, adversaries=(maker,)),)


@dataclass(frozen=True, kw_only=True)
class VisualPrompt(Recipe):
    """The visual prompts of TeCoA (Mao et al. 2023): a frame of 30 pixels and ten more tokens of the image tower
    descend the cross-entropy of attacked images over all class prompts; the towers stay as they are. On a tower without
    tokens give `trains=Frame(...)` alone.

    Numbers of the released code: SGD with momentum and rate 40 (its own comment asks why so large), warm-up 1000 and
    cosine, batch 16, 10 epochs, 2/255 in 5 steps of 1/255; prompts in the unit of normalized pixels, never clipped,
    which begin standard normal. In a training of fewer than 1,000 steps, give a shorter warm-up.
    """

    trains: Trainable = Combined(
        (Frame(30, clip=False, normalized=True, start=1.0), Deep(tokens=10, depth=1, start=1.0))
    )
    optimizer: Optimizer = SGD(lr=40.0)
    warmup: int = 1000
    cosine: bool = True
    epochs: float = 10.0
    batch: int = 16
    image_attack: ImageAttack = PGD(steps=5, step=0.5, best=False, stop=False)
    budget: Budget = Linf(2 / 255)

    def stages(self) -> tuple[Stage, ...]:
        loss = OverClasses(ADVERSARIAL, CLEAN)
        return (self.stage(loss, adversaries=(Adversary(self.image_attack, self.budget, loss),)),)


@dataclass(frozen=True)
class Consistent(KL):
    """KL of the answer to an adversarial image from the answer to the clean one, times one plus the cosine of both
    image embeddings: FAP's consistency, whose gradient goes through all of it."""

    to: tuple[str, str] = (STUDENT, CLEAN)

    def each(self, seen: Seen) -> PerImage:
        who, view = self.to
        near = F.cosine_similarity(seen.image(view, who), seen.image(self.image), dim=1)
        return super().each(seen) * (near + 1.0)


@dataclass(frozen=True, kw_only=True)
class FAP(Recipe):
    """Few-shot adversarial prompt learning (Zhou et al. 2024): learned tokens of both towers that hang together descend
    the cross-entropy of clean images plus a consistency of attacked images with them, against an adversary that climbs
    the divergence of both answers.

    Numbers of the released code: two tokens before nine layers, which begin as 'a photo'; weight 1.5; 1/255 in 2 steps
    of it; SGD 0.0035 with a cosine, batch 4, 10 epochs, 16 images of each class. There, the first epoch has the rate
    1e-5, and all is in half precision. A thread of users reports that the weight 1.5 loses all robustness on EuroSAT.

    Args:
        consistency: the weight of the second term.
    """

    trains: Trainable = Coupled()
    optimizer: Optimizer = SGD(lr=3.5e-3, weight_decay=5e-4)
    cosine: bool = True
    epochs: float = 10.0
    batch: int = 4
    shots: int | None = 16
    image_attack: ImageAttack = PGD(steps=2, step=1.0, best=False, stop=False)
    budget: Budget = Linf(1 / 255)
    consistency: float = 1.5

    def stages(self) -> tuple[Stage, ...]:
        maker = Adversary(self.image_attack, self.budget, KL(to=(STUDENT, CLEAN)))
        terms = (OverClasses(CLEAN, CLEAN), Consistent(weight=self.consistency))
        return (self.stage(*terms, adversaries=(maker,)),)


@dataclass(frozen=True)
class UnderOwn(Term):
    """Minus the logarithm of the probability of the right class under the prompt of this class: the mean over the
    images of each class, and the sum of these means.

    Args:
        image: the view of the images.
    """

    image: str = CLEAN

    labelled: ClassVar[bool] = True

    def needs(self) -> tuple[Need, ...]:
        return (Need(IMAGE, self.image), Need(TEXT, CLEAN))

    def each(self, seen: Seen) -> PerImage:
        return F.nll_loss(*self.answers(seen), reduction="none")

    def value(self, seen: Seen) -> Tensor:
        return _by_class(self.each(seen), seen.labels)

    def answers(self, seen: Seen) -> tuple[Logits, Labels]:
        return seen.logits(self.image), seen.labels


@dataclass(frozen=True)
class Apart(Term):
    """The three hinges of C-AVP on probabilities p(class | prompt) of images of class y, each at least -tau: (1) the
    best p(k | prompt k) of another class k minus p(y | prompt y); (2) for every other class j, p(j | prompt j) minus
    the best other probability under prompt j; (3) the best p(y | prompt k) under another prompt k minus p(y | prompt
    y). Means over the images of each class (2: over all others), summed over the classes.

    That is the released code. The third is told as the best other class under prompt y elsewhere.

    Args:
        image: the view of the images.
        tau: how far apart is enough.
        matched, unmatched, mismatched: whether the first, the second and the third count.
    """

    image: str = CLEAN
    tau: float = 0.1
    matched: bool = True
    unmatched: bool = True
    mismatched: bool = True

    labelled: ClassVar[bool] = True
    coupled: ClassVar[bool] = True

    def needs(self) -> tuple[Need, ...]:
        return (Need(IMAGE, self.image), Need(TEXT, CLEAN))

    def each(self, seen: Seen) -> PerImage:
        """The share of each image in the sum, times the number of images."""
        images, texts, labels = seen.image(self.image), seen.text(), seen.labels
        count = len(texts)
        rows = torch.arange(count, device=texts.device)
        under = [seen.heads[STUDENT](images, seen_with(texts, count, rows.new_full((count,), k))) for k in range(count)]
        known = torch.stack(under, 1).exp()  # (images, prompts, classes)
        own, itself = known.diagonal(dim1=1, dim2=2), torch.eye(count, dtype=torch.bool, device=texts.device)
        right = own.gather(1, labels[:, None])[:, 0]
        mine = F.one_hot(labels, count).to(own.dtype)
        share = mine / mine.sum(0).clamp(min=1.0)  # of each image in the mean of its class
        total = torch.zeros_like(right)
        if self.matched:
            best = own.masked_fill(mine.bool(), -torch.inf).amax(1)
            total = total + share.sum(1) * (best - right).clamp(min=-self.tau)
        if self.unmatched:
            others = known.masked_fill(itself, -torch.inf).amax(2)
            theirs = (1.0 - mine) / (1.0 - mine).sum(0).clamp(min=1.0)
            total = total + (theirs * (own - others).clamp(min=-self.tau)).sum(1)
        if self.mismatched:
            same = known[torch.arange(len(labels), device=labels.device), :, labels]
            best = same.masked_fill(mine.bool(), -torch.inf).amax(1)
            total = total + share.sum(1) * (best - right).clamp(min=-self.tau)
        return len(labels) * total


def _by_class(each: PerImage, labels: Labels) -> Tensor:
    """The sum over classes of the mean over their images."""
    counts = torch.bincount(labels)[labels]
    return (each / counts).sum()


@dataclass(frozen=True, kw_only=True)
class CAVP(Recipe):
    """Class-wise adversarial visual prompting (C-AVP, Chen et al. 2023): pixels for each class, under which the right
    class shall be likely for clean and for attacked images, and hinges that keep the prompts of classes apart on clean
    ones. The network stays as it is.

    Numbers of the released code, for a ResNet-18 and CIFAR-10: 8/255 in 10 steps of a quarter of it, SGD 0.1 with
    momentum 0.9 and a cosine, batch 256, 50 epochs, weight 3 and tau 0.1 of the hinges, which `hinges=0.0` leaves out.
    There, images are attacked behind the prompt of their class while training, and at test by an adversary that knows
    no prompt; here, in front of it and always against all prompts. Random crops and flips are given by `augment`.
    """

    trains: Trainable = ClassFrames()
    optimizer: Optimizer = SGD(lr=0.1)
    cosine: bool = True
    epochs: float = 50.0
    batch: int = 256
    image_attack: ImageAttack = PGD(steps=10, step=0.25, best=False, stop=False)
    budget: Budget = Linf(8 / 255)
    hinges: float = 3.0
    tau: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.trains, ClassFrames):
            raise CrossguardError(
                f"CAVP(trains={type(self.trains).__name__}()) has no prompt for each class; give ClassFrames(), or "
                "train one prompt for all with VisualPrompt"
            )

    def stages(self) -> tuple[Stage, ...]:
        maker = Adversary(self.image_attack, self.budget, UnderOwn(ADVERSARIAL))
        terms = (UnderOwn(CLEAN), UnderOwn(ADVERSARIAL), Apart(weight=self.hinges, tau=self.tau))
        return (self.stage(*(term for term in terms if term.weight), adversaries=(maker,)),)
