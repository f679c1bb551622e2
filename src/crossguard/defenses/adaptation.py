"""Robust domain adaptation: a source with labels, a target without, and models that are to be right and robust there.

In two steps: `SourceFinetuning`, `SelfTraining` or `DANN` make a model for the target, and `DisentangledDistillation`
then makes it robust, on images of the target alone. `ARTUDA`, and `DANN` with an attack, ask for both at once, which is
what the two steps are compared with. All take a `Domains(source, target)`; none can see a label of the target.

Nobody has published these on CLIP-like models: features are the image embeddings, the classifier is the class prompts,
and the image tower is trained. Learning rates are ours where nothing else is said.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossguard.attacks.base import ImageAttack
from crossguard.attacks.gradient import PGD
from crossguard.budgets import Budget, Linf
from crossguard.data import Dataset
from crossguard.datasets.domains import Domains, Unlabelled
from crossguard.defenses.optimizers import SGD, AdamW, Optimizer
from crossguard.defenses.parts import Towers, Trainable
from crossguard.defenses.plan import Adversary, Stage
from crossguard.defenses.recipe import Recipe
from crossguard.defenses.terms import (
    ADVERSARIAL,
    CLEAN,
    IMAGE,
    KL,
    START,
    STUDENT,
    TEXT,
    Need,
    OverClasses,
    Seen,
    Spot,
    Term,
)
from crossguard.errors import CrossguardError
from crossguard.goals import Goal, Untargeted
from crossguard.models.base import VisionLanguageModel
from crossguard.shapes import Embeddings, Labels, Logits, Mask, PerImage
from crossguard.words import show

TARGET, TARGET_ADVERSARIAL = f"target:{CLEAN}", f"target:{ADVERSARIAL}"


# --- What is descended


@dataclass(frozen=True)
class PseudoLabelled(Term):
    """The cross-entropy of each image over the class prompts, with a teacher's answer as its label (Lee 2013). It is
    zero where the teacher gives its answer less than `threshold` of the probability.

    Args:
        image: the view of the images that the student sees.
        to: who teaches, and which view the teacher sees.
        threshold: from 0 (all images count) to 1.
    """

    image: str = CLEAN
    to: tuple[str, str] = (START, CLEAN)
    threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.threshold <= 1.0:
            raise CrossguardError(f"a threshold of {self.threshold} is no probability; give 0 to 1")

    def needs(self) -> tuple[Need, ...]:
        return (Need(IMAGE, self.image), Need(TEXT), *_answer(self.to))

    def sieve(self) -> tuple[Need, ...]:
        return _answer(self.to) if self.threshold else ()

    def each(self, seen: Seen) -> PerImage:
        loss = F.cross_entropy(self.outputs(seen), self._told(seen)[1], reduction="none")
        return loss * self.counted(seen)

    def counted(self, seen: Seen) -> Mask:
        return self._told(seen)[0] >= self.threshold

    def outputs(self, seen: Seen, spot: Spot | None = None) -> Logits:
        del spot
        return seen.logits(self.image)

    def goal(self, seen: Seen, spot: Spot) -> Goal:
        """Away from the teacher's answer, however sure it is."""
        del spot
        return Untargeted(self._told(seen)[1])

    def _told(self, seen: Seen) -> tuple[Tensor, Labels]:
        who, view = self.to
        sure, labels = seen.logits(view, who=who).softmax(1).max(1)
        return sure, labels


@dataclass(frozen=True)
class Confident(Term):
    """Another term, weighted by how sure a teacher is of an image: 1 - H / log(classes), with the entropy H of its
    answer. That is 1 for a certain answer and 0 for the same probability of all classes; with one class it is 1.

    Args:
        term: what is weighted.
        to: who teaches, and which view the teacher sees.
        whole: weight all images of the batch alike, by the sum of these numbers over the batch.
    """

    term: Term
    to: tuple[str, str] = (START, CLEAN)
    whole: bool = False

    @property
    def coupled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the value of an image depends on the others, by the weighted term or by the weight."""
        return self.term.coupled or self.whole

    @property
    def labelled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the weighted term asks for labels."""
        return self.term.labelled

    @property
    def compares(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the weighted term compares embeddings."""
        return self.term.compares

    def needs(self) -> tuple[Need, ...]:
        return (*self.term.needs(), *_answer(self.to))

    def each(self, seen: Seen) -> PerImage:
        who, view = self.to
        answer = F.log_softmax(seen.logits(view, who=who), dim=1)
        classes = answer.shape[1]
        largest = math.log(classes) if classes > 1 else 1.0  # of one class everybody is certain
        sure = 1.0 + (answer.exp() * answer).sum(1) / largest
        return self.term.each(seen) * (sure.sum() if self.whole else sure)

    def sieve(self) -> tuple[Need, ...]:
        return self.term.sieve()

    def counted(self, seen: Seen) -> Mask:
        return self.term.counted(seen)

    def answers(self, seen: Seen) -> tuple[Logits, Labels] | None:
        return self.term.answers(seen)


@dataclass(frozen=True)
class Matched(Term):
    """The mean squared difference of the numbers of the student's embedding from a teacher's.

    Args:
        image: the view of the images that the student sees.
        to: who teaches, and which view the teacher sees.
        unit: compare directions: both embeddings are brought to length 1 first.
    """

    image: str = CLEAN
    to: tuple[str, str] = (START, CLEAN)
    unit: bool = False

    compares: ClassVar[bool] = True

    def needs(self) -> tuple[Need, ...]:
        who, view = self.to
        return (Need(IMAGE, self.image), Need(IMAGE, view, who))

    def each(self, seen: Seen) -> PerImage:
        mine, theirs = (seen[need].float() for need in self.needs())
        if self.unit:
            mine, theirs = F.normalize(mine, dim=1), F.normalize(theirs, dim=1)
        return (mine - theirs).square().mean(1)


@dataclass(frozen=True)
class InDomain(Term):
    """The cross-entropy with which the module `domain` tells from an embedding that its image is of the source, or of
    the target. The module descends it; the image tower, through a reversal of the gradient, climbs it (Ganin et al.
    2016).

    Args:
        image: the view of the images.
        target: whether these are of the target.
        strength: the factor of the reversed gradient.
    """

    image: str = CLEAN
    target: bool = False
    strength: float = 1.0

    def needs(self) -> tuple[Need, ...]:
        return (Need(IMAGE, self.image),)

    def each(self, seen: Seen) -> PerImage:
        logits = seen.modules["domain"](reversed_gradient(seen.image(self.image), self.strength))[:, 0]
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(self.target)), reduction="none")


def reversed_gradient(embeddings: Embeddings, strength: float) -> Embeddings:
    """The same numbers, whose gradient arrives with the opposite sign and this factor."""
    return embeddings.detach() - strength * (embeddings - embeddings.detach())


class Discriminator(nn.Module):
    """Tells the domain from the direction of an embedding, by two hidden layers: positive for the target."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, embeddings: Embeddings) -> Tensor:
        # Lengths mean nothing to a cosine, and the numbers of a unit vector are as small as it is wide.
        return self.layers(F.normalize(embeddings.float(), dim=1) * math.sqrt(embeddings.shape[1]))


def _answer(to: tuple[str, str]) -> tuple[Need, Need]:
    """What a teacher's answer is made of."""
    who, view = to
    return Need(IMAGE, view, who), Need(TEXT, CLEAN, who)


# --- Step 1: a model for the target


@dataclass(frozen=True, kw_only=True)
class SourceFinetuning(Recipe):
    """Cross-entropy over the class prompts on the labelled source alone, which the target is then hoped to profit from:
    the baseline of every adaptation. `TeCoA` on the same data is its adversarial form."""

    optimizer: Optimizer = AdamW()
    trains: Trainable = Towers(("image",))

    def stages(self) -> tuple[Stage, ...]:
        return (self.stage(OverClasses()),)


@dataclass(frozen=True, kw_only=True)
class SelfTraining(Recipe):
    """Cross-entropy on the target with the model's own first answers as labels (pseudo-labels, Lee 2013), without any
    source. On CLIP that is cheap and strong, since zero-shot answers know no source domain. A reconstruction: labels
    are those of the model before the training and stay, and the threshold is ours.

    It takes a `Domains`, of which it sees the target alone, or any data, of which it sees no labels.

    Args:
        threshold: images to which the model gives its answer less than this probability do not count; the log says how
            many do. Where none does, there is nothing to learn, and that is said before the first step.
    """

    optimizer: Optimizer = AdamW()
    trains: Trainable = Towers(("image",))
    threshold: float = 0.5

    def feeds(self, data: Dataset) -> Mapping[str, Dataset]:
        return {"": _target(data)}

    def stages(self) -> tuple[Stage, ...]:
        return (self.stage(PseudoLabelled(threshold=self.threshold)),)


@dataclass(frozen=True, kw_only=True)
class AgainstDomains(Recipe, ABC):
    """What recipes with a discriminator of the two domains share.

    Args:
        strength: the factor of the reversed gradient.
        hidden: units in each of the two hidden layers of the discriminator.
    """

    optimizer: Optimizer = AdamW()
    trains: Trainable = Towers(("image",))
    strength: float = 1.0
    hidden: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_discriminator(self)

    def feeds(self, data: Dataset) -> Mapping[str, Dataset]:
        return _both(self, data)

    def modules(self, width: Callable[[], int]) -> Mapping[str, nn.Module]:
        return {"domain": Discriminator(width(), self.hidden)}


@dataclass(frozen=True, kw_only=True)
class DANN(AgainstDomains):
    """Domain-adversarial training (Ganin et al. 2016): cross-entropy on the source, while a discriminator learns to
    tell the two domains by their image embeddings, and the image tower, by a reversed gradient, to prevent that.

    With an attack it is the entangled baseline "source AT + DANN" (AT-UDA in DomainRobust): labels and the domain of
    the source are learned from its adversarial images.

    The published strength rises from 0 to 1 over the training and the published rate falls; here the strength stays
    as it is given, and the rate is the recipe's.

    Args:
        strength: see `AgainstDomains`.
        hidden: the same; the paper has 1,024.
        image_attack: who attacks the images of the source, climbing their cross-entropy; nobody, if None.
        budget: how far.
    """

    image_attack: ImageAttack | None = None
    budget: Budget = Linf(2 / 255)

    def stages(self) -> tuple[Stage, ...]:
        view = CLEAN if self.image_attack is None else ADVERSARIAL
        loss = OverClasses(view)
        attacks = () if self.image_attack is None else (Adversary(self.image_attack, self.budget, loss),)
        source = InDomain(view, strength=self.strength, weight=0.5)
        target = InDomain(TARGET, True, strength=self.strength, weight=0.5)
        return (self.stage(loss, source, target, adversaries=attacks),)


@dataclass(frozen=True, kw_only=True)
class ARTUDA(AgainstDomains):
    """Adversarially robust training for unsupervised domain adaptation (Lo and Patel 2022), everything in one loss:
    cross-entropy on the source, the divergence of the answer to adversarial images of the target from that to the clean
    ones, which the adversary climbs without labels, and a discriminator that meets both of them (`DANN`).

    Formula and attack as DomainRobust has them: CE(x_s) + `consistency` KL(x_t || x_t') - [CE_D(x_s, x_t') +
    CE_D(x_s, x_t)], 5 steps of half the budget at 2/255. That the divergence is taken this way round, with a gradient
    through both answers, is a reconstruction.

    Args:
        strength, hidden: see `AgainstDomains`.
        consistency: weight of the divergence.
        image_attack: who attacks the images of the target. It must begin with a random step: at the clean image, the
            divergence has no gradient.
        budget: how far.
    """

    consistency: float = 1.0
    image_attack: ImageAttack = PGD(steps=5, step=0.5, best=False, stop=False)
    budget: Budget = Linf(2 / 255)

    def stages(self) -> tuple[Stage, ...]:
        loss = KL(TARGET_ADVERSARIAL, to=(STUDENT, TARGET), weight=self.consistency)
        attack = Adversary(self.image_attack, self.budget, loss, of=TARGET, makes=TARGET_ADVERSARIAL)
        source = InDomain(CLEAN, strength=self.strength)  # in both of the pairs that the discriminator tells apart
        target = (InDomain(view, True, self.strength, weight=0.5) for view in (TARGET_ADVERSARIAL, TARGET))
        return (self.stage(OverClasses(), loss, source, *target, adversaries=(attack,)),)


# --- Step 2: robust there


@dataclass(frozen=True, kw_only=True)
class DisentangledDistillation(Recipe):
    """Robustness for a model that has been adapted, on unlabelled images of the target alone (step 2 of "Unsupervised
    Robust Domain Adaptation", Huang et al. 2025, arXiv 2511.11009, whose authors call it DART, a name that another
    method has too).

    With the model h as it was for a teacher, and x' made by an attack that climbs the cross-entropy of the student with
    h's answer: `weight` c(x) [KL(h(x)/T || s(x')/T) + KL(h(x)/T || s(x)/T)] + MSE(f_s(x), f_h(x)), without the factor
    T^2. The clean terms keep what was adapted, the adversarial one alone asks for robustness, and neither label nor
    source nor discriminator is there.

    From the released code: the formula, the weight 0.1, T = 2, 10 steps without a random start, SGD with Nesterov
    momentum, rate and decay. Other than there: the budget is one of pixels (theirs is 0.1 of ImageNet-normalized
    numbers that they cut at 0 and 1, which destroys half of each image); each image has its own confidence; the student
    begins as h; the result is the last step (theirs is chosen by labels of the target). The rate stays or falls as the
    recipe says (theirs falls as (1 + 0.001 t)^-0.75), and a batch is one of this package (theirs has 18 images).

    It takes a `Domains`, of which it sees the target alone, or any data, of which it sees no labels.

    Args:
        weight: of the two divergences.
        temperature: divides the logits in both.
        batch_confidence: weight all images alike by the sum of their confidences, as the released code does: the mean
            over the batch is taken before, so the number grows with the batch.
        unit: compare directions of embeddings instead of the raw numbers.
        teacher: h, where the student does not begin as h: the released code starts from a network that was not
            adapted. None: the model that is trained, as it was.
        image_attack: who attacks the images.
        budget: how far.
    """

    optimizer: Optimizer = SGD(lr=5e-3, weight_decay=1e-3, nesterov=True)
    trains: Trainable = Towers(("image",))
    weight: float = 0.1
    temperature: float = 2.0
    batch_confidence: bool = False
    unit: bool = False
    teacher: VisionLanguageModel | None = None
    image_attack: ImageAttack = PGD(steps=10, step=0.25, random_start=False, best=False, stop=False)
    budget: Budget = Linf(2 / 255)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise CrossguardError(
                f"DisentangledDistillation(temperature={self.temperature}) is not possible; give a positive number"
            )

    def feeds(self, data: Dataset) -> Mapping[str, Dataset]:
        return {"": _target(data)}

    def teachers(self) -> Mapping[str, VisionLanguageModel]:
        return {} if self.teacher is None else {"adapted": self.teacher}

    def stages(self) -> tuple[Stage, ...]:
        to = (START if self.teacher is None else "adapted", CLEAN)
        kept = [
            Confident(KL(view, to, temperature=self.temperature), to, self.batch_confidence, weight=self.weight)
            for view in (ADVERSARIAL, CLEAN)
        ]
        attack = Adversary(self.image_attack, self.budget, PseudoLabelled(ADVERSARIAL, to))
        return (self.stage(*kept, Matched(CLEAN, to, self.unit), adversaries=(attack,)),)


# --- What they train on


def _target(data: Dataset) -> Dataset:
    """The target of two domains, or else the data, without labels."""
    if isinstance(data, Domains):
        return data.unlabelled
    return Unlabelled(data) if data.labelled else data


def _both(recipe: Recipe, data: Dataset) -> Mapping[str, Dataset]:
    if not isinstance(data, Domains):
        raise CrossguardError(
            f"{type(recipe).__name__} adapts a source to a target, and {show(data, short=True)} is one set of images; "
            "give Domains(source, target)"
        )
    return {"": data, "target": data.unlabelled}


def _check_discriminator(recipe: AgainstDomains) -> None:
    name = type(recipe).__name__
    if recipe.hidden < 1:
        raise CrossguardError(f"{name}(hidden={recipe.hidden}) is not possible; give 1 or more units")
    if not recipe.strength >= 0:
        raise CrossguardError(f"{name}(strength={recipe.strength}) is not possible; give 0 or more")
