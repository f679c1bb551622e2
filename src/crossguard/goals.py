"""What the adversary wants: a loss to climb, and whether it has won. Goals know outputs, never models or pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.device import waits
from crossguard.errors import CrossguardError
from crossguard.shapes import Embeddings, Labels, Logits, Mask, PerImage, TextEmbeddings
from crossguard.words import Word


class Loss(Word, ABC):
    """A per-image quantity of logits that an adversary climbs. It is never averaged: a mean over a large batch
    underflows in half precision, and then the attack is weak. It is computed in float32 whatever the logits are in."""

    @abstractmethod
    def away(self, logits: Logits, labels: Labels) -> PerImage:
        """Large when the answer is far from `labels`."""

    @abstractmethod
    def towards(self, logits: Logits, targets: Labels) -> PerImage:
        """Large when the answer is near `targets`."""

    def between(self, logits: Logits, labels: Labels, targets: Labels) -> PerImage:
        """Large when the answer is nearer to `targets` than to `labels`: away from one class towards another."""
        del labels
        return self.towards(logits, targets)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Cross-entropy of the logits, with the model's own logit scale inside (Madry et al. 2018), climbed as log-odds.

    The value is the log-sum-exp of the other logits minus the logit of the label, x, where the cross-entropy is
    log(1 + exp(x)). One rises with the other and their gradients have the same direction, so steps along the sign or
    the unit vector of the gradient are the same. But in float32 the cross-entropy of a confident answer loses half its
    gradient when the label leads by 17 logits, and all of it at 104; log-odds never saturate.
    """

    def away(self, logits: Logits, labels: Labels) -> PerImage:
        logits = logits.float()
        return log_odds(_others(logits, labels), _at(logits, labels))

    def towards(self, logits: Logits, targets: Labels) -> PerImage:
        return -self.away(logits, targets)


@dataclass(frozen=True)
class Margin(Loss):
    """Best other logit minus the logit of the label (Carlini and Wagner 2017, without their confidence): positive
    means beaten."""

    def away(self, logits: Logits, labels: Labels) -> PerImage:
        return -_lead(logits.float(), labels)

    def towards(self, logits: Logits, targets: Labels) -> PerImage:
        return _lead(logits.float(), targets)

    def between(self, logits: Logits, labels: Labels, targets: Labels) -> PerImage:
        logits = logits.float()
        return _at(logits, targets) - _at(logits, labels)


@dataclass(frozen=True)
class DLR(Loss):
    """Difference of logits ratio (Croce and Hein 2020): the margin over the spread of the best logits, so that neither
    the scale of the logits nor an offset matters.

    Untargeted it divides by z(1) - z(3), with a target by z(1) - (z(3) + z(4)) / 2. With three classes and a target
    the last two take the place of z(3) and z(4), because the ratio would be constant where the target is the third;
    with two classes, where any such ratio is constant, it is the margin itself. The paper has neither case.
    """

    def away(self, logits: Logits, labels: Labels) -> PerImage:
        logits = logits.float()
        return -_lead(logits, labels) / _spread(logits, labels, 2, 3)

    def towards(self, logits: Logits, targets: Labels) -> PerImage:
        logits = logits.float()
        return _lead(logits, targets) / self._spread_with_target(logits, targets)

    def between(self, logits: Logits, labels: Labels, targets: Labels) -> PerImage:
        logits = logits.float()
        return (_at(logits, targets) - _at(logits, labels)) / self._spread_with_target(logits, labels)

    def _spread_with_target(self, logits: Logits, labels: Labels) -> PerImage | float:
        return _spread(logits, labels, 1, 3) if logits.shape[1] == 3 else _spread(logits, labels, 2, 4)


def _spread(logits: Logits, labels: Labels, first: int, last: int) -> PerImage | float:
    """The best logit minus the mean of those ranked from `first` up to `last` (exclusive, counted from 0)."""
    if logits.shape[1] < 3:
        return 1.0
    # A twin of the label must not take a rank of its own: the ratio would be constant.
    logits = torch.where(_twins(logits, labels), logits.amin(1, keepdim=True), logits)
    best = logits.topk(last, dim=1).values
    return best[:, 0] - best[:, first:].mean(1) + 1e-12


@dataclass(frozen=True)
class Goal(ABC):
    """What is climbed, per image, and whether the adversary has won, which is the truth whoever judges in the end.

    Of two images the one that has won is the stronger; of two that are equal in this, the one of more `merit`.

    Attributes:
        ends: whether an image may leave the batch as soon as it has won. Only where the victim of the search is also
            the judge: another judge may still be right about an image that has just crossed the boundary, so there the
            search goes on and gains merit. `lasting` gives such a goal.
        redrawn: the judge is the victim of the search, in another draw of its noise. One win is not enough there, so
            the goal does not end; but an image may leave after many draws that it has won (`EOT`).
        wins: False for goals that are only about more or less, and are never won.
        classes: whether outputs are logits of classes, so that another loss of them can be climbed.
    """

    ends: bool = field(default=True, kw_only=True)
    redrawn: bool = field(default=False, kw_only=True)
    wins: ClassVar[bool] = True
    classes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.is_inference():  # which no gradient may keep
                object.__setattr__(self, name, value.clone())

    @abstractmethod
    def loss(self, outputs: Tensor) -> PerImage:
        """The adversary climbs this; one value per sample."""

    @abstractmethod
    def won(self, outputs: Tensor) -> Mask:
        """Where the adversary has won; nowhere, for a goal that is only about more or less."""

    def merit(self, outputs: Tensor) -> PerImage:
        """What makes one image stronger than another when both have won or neither has. For classifications it is the
        margin by which the answer is wrong, whatever loss is climbed, so that the results of several attacks can be
        compared; otherwise the loss."""
        return self.loss(outputs)

    @abstractmethod
    def at(self, keep: Tensor) -> Goal:
        """The same goal for some of the samples (a mask or indices)."""

    def counts(self) -> tuple[int, ...]:
        """How many samples each of its parts is for, all the same if it is well made; nothing, if it cannot say."""
        return ()

    def climbing(self, loss: Loss) -> Goal:
        """The same goal, climbing another loss on the way."""
        raise CrossguardError(f"{type(self).__name__} has a loss of its own and cannot climb {loss}")

    def lasting(self) -> Goal:
        """The same goal for a search that somebody else judges: who has won does not leave."""
        return replace(self, ends=False, redrawn=False)


def nobody(outputs: Tensor) -> Mask:
    """The answer of goals that are never won."""
    return torch.zeros(len(outputs), dtype=torch.bool, device=outputs.device)


class Classification(Goal):
    """A goal over logits of classes: the loss is a `criterion` of them, won is decided by the largest logit, and the
    merit is a margin, whatever the criterion is."""

    criterion: Loss
    classes: ClassVar[bool] = True

    @property
    @abstractmethod
    def named(self) -> dict[str, Labels]:
        """The classes that it names, one of each image, by the fields that hold them."""

    def at(self, keep: Tensor) -> Classification:
        return replace(self, **{field: classes[keep] for field, classes in self.named.items()})

    def counts(self) -> tuple[int, ...]:
        return tuple(len(classes) for classes in self.named.values())

    def climbing(self, loss: Loss) -> Classification:
        return replace(self, criterion=loss)

    def check(self, logits: Logits) -> None:
        """Refuses classes that the victim has no logits for, and victims that cannot be wrong."""
        count = logits.shape[1]
        if count < 2:
            raise CrossguardError(
                "the victim has a single class, so no answer of it can be wrong; give 2 or more classes"
            )
        for classes in self.named.values():
            if len(classes) != len(logits):
                raise CrossguardError(f"{len(classes)} labels were given for {len(logits)} images; give one for each")
        lowest, highest = self._span
        if lowest < 0 or highest >= count:
            wrong = lowest if lowest < 0 else highest
            raise CrossguardError(
                f"class {wrong} does not exist: the victim answers with {count} classes, so labels are 0 to {count - 1}"
            )

    @cached_property
    def _span(self) -> tuple[int, int]:
        """The lowest and the highest class that it names, read once and not at each question. On an accelerator they
        are not read, since every step would wait; an index out of range is an error there by itself."""
        named = torch.cat(list(self.named.values()))
        if not len(named) or waits(named.device):
            return 0, 0
        lowest, highest = named.aminmax()
        return int(lowest), int(highest)


@dataclass(frozen=True)
class Untargeted(Classification):
    """Any answer but the label."""

    labels: Labels
    criterion: Loss = field(default_factory=CrossEntropy)

    @property
    def named(self) -> dict[str, Labels]:
        return {"labels": self.labels}

    def loss(self, outputs: Tensor) -> PerImage:
        self.check(outputs)
        return self.criterion.away(outputs, self.labels)

    def won(self, outputs: Tensor) -> Mask:
        self.check(outputs)
        return outputs.argmax(1) != self.labels

    def merit(self, outputs: Tensor) -> PerImage:
        self.check(outputs)
        return Margin().away(outputs, self.labels)


@dataclass(frozen=True)
class Targeted(Classification):
    """One particular wrong answer."""

    targets: Labels
    criterion: Loss = field(default_factory=CrossEntropy)

    @property
    def named(self) -> dict[str, Labels]:
        return {"targets": self.targets}

    def loss(self, outputs: Tensor) -> PerImage:
        self.check(outputs)
        return self.criterion.towards(outputs, self.targets)

    def won(self, outputs: Tensor) -> Mask:
        self.check(outputs)
        return outputs.argmax(1) == self.targets

    def merit(self, outputs: Tensor) -> PerImage:
        self.check(outputs)
        return Margin().towards(outputs, self.targets)


@dataclass(frozen=True)
class Towards(Classification):
    """Any answer but the label, climbing towards one other class: how targeted attacks serve an untargeted goal. Won
    and merit are those of `Untargeted`."""

    labels: Labels
    targets: Labels
    criterion: Loss = field(default_factory=CrossEntropy)

    @property
    def named(self) -> dict[str, Labels]:
        return {"labels": self.labels, "targets": self.targets}

    def loss(self, outputs: Tensor) -> PerImage:
        self.check(outputs)
        return self.criterion.between(outputs, self.labels, self.targets)

    def won(self, outputs: Tensor) -> Mask:
        self.check(outputs)
        return outputs.argmax(1) != self.labels

    def merit(self, outputs: Tensor) -> PerImage:
        self.check(outputs)
        return Margin().away(outputs, self.labels)


@dataclass(frozen=True)
class Drift(Goal):
    """Away from what the sample's embedding was: the label-free goal of BERT-Attack in MMCoA and of Co-Attack.

    The loss is 1 - cosine. The reference code climbs KL(softmax(clean) || softmax(new)) of unit embeddings, which ranks
    candidates alike (KL is (1 - cosine) / d within about 1 %) but lives at 1e-6 to 1e-4, where half precision is blind.
    """

    clean: Embeddings
    wins: ClassVar[bool] = False

    def loss(self, outputs: Tensor) -> PerImage:
        return 1.0 - F.cosine_similarity(outputs.float(), self.clean.float(), dim=1)

    def won(self, outputs: Tensor) -> Mask:
        return nobody(outputs)

    def at(self, keep: Tensor) -> Drift:
        return replace(self, clean=self.clean[keep])

    def counts(self) -> tuple[int, ...]:
        return (len(self.clean),)


@dataclass(frozen=True)
class Mismatch(Goal):
    """Texts that lose their own images: where `Drift` only moves a text, this counts whom it leaves behind.

    An image is lost when another text is nearer to it (by cosine) than its own. The loss is the share of a text's
    images that are lost, and among equals the larger mean margin by which its images prefer other texts, scaled so
    that it never outweighs one image. Ours, not from a paper; SGA (Lu et al. 2023) takes the cosine with one paired
    image. The other texts are the clean ones: when all are rewritten at once, which images are lost in the end also
    depends on theirs.

    `Mismatch.of(images, owners, texts)` makes one from embeddings.

    Args:
        images: the clean image embeddings.
        owners: for each image, the number of the text it belongs to.
        bars: for each image, the cosine with the nearest text that is not its own.
        rows: which texts these are; for `Mismatch.of`, all of them in order.
    """

    images: Embeddings
    owners: Labels
    bars: PerImage
    rows: Tensor

    @staticmethod
    def of(images: Embeddings, owners: Labels, texts: TextEmbeddings) -> Mismatch:
        """The goal for clean texts (one of each class) with these embeddings."""
        if len(images) != len(owners):
            raise CrossguardError(f"{len(owners)} owners were given for {len(images)} images; give one for each")
        if len(texts) < 2:
            raise CrossguardError("an image cannot be lost to another text where there is only one; give 2 or more")
        if len(owners) and not 0 <= int(owners.min()) <= int(owners.max()) < len(texts):
            raise CrossguardError(f"an image belongs to a text that is not there; owners are 0 to {len(texts) - 1}")
        unit, classes = F.normalize(images.float(), dim=1), F.normalize(texts.float(), dim=1)
        bars = (unit @ classes.T).scatter(1, owners[:, None], -torch.inf).amax(1)
        return Mismatch(unit, owners, bars, torch.arange(len(texts), device=texts.device))

    def loss(self, outputs: Tensor) -> PerImage:
        return self._measured(outputs)[0]

    def won(self, outputs: Tensor) -> Mask:
        return self._measured(outputs)[1]

    def at(self, keep: Tensor) -> Mismatch:
        return replace(self, rows=self.rows[keep.to(self.rows.device)])

    def counts(self) -> tuple[int, ...]:
        return (len(self.rows),)

    def _measured(self, outputs: Tensor) -> tuple[PerImage, Mask]:
        """The loss of each text, and whether all its images are lost; a text without images has nothing to lose."""
        units = F.normalize(outputs.float(), dim=1)
        losses = torch.zeros(len(outputs), device=outputs.device)
        won = torch.zeros(len(outputs), dtype=torch.bool, device=outputs.device)
        for text in self.rows.unique().tolist():
            own, mine = self.owners == text, self.rows == text
            if not bool(own.any()):
                continue
            gaps = self.bars[own] - units[mine] @ self.images[own].T  # from -2 to 2
            lost = gaps > 0.0
            losses[mine] = lost.float().mean(1) + gaps.mean(1) / (4 * gaps.shape[1] + 1)
            won[mine] = lost.all(1)
        return losses, won


def classification(goal: Goal, attack: str) -> Untargeted | Targeted | Towards:
    """The goal itself, for attacks that need to know classes; raises where the goal has none."""
    if not isinstance(goal, Untargeted | Targeted | Towards):
        raise CrossguardError(
            f"{attack} attacks a classification; {type(goal).__name__} has no classes, so try PGD instead"
        )
    return goal


def log_odds(others: Tensor, own: PerImage) -> PerImage:
    """The log-sum-exp of other logits, shape (n, k), minus one's own: how much likelier they are, all together. Those
    that do not count are minus infinity; where none counts, there is nothing to become likelier and the answer is 0."""
    alone = others.isneginf().all(1, keepdim=True)
    likelier = others.masked_fill(alone, 0.0).logsumexp(1)
    return torch.where(alone[:, 0], own, likelier) - own


def _at(logits: Logits, classes: Labels) -> PerImage:
    return logits.gather(1, classes[:, None])[:, 0]


def _twins(logits: Logits, labels: Labels) -> Tensor:
    """The classes that cannot be told from the label, because their names are the same and so their logits are."""
    return (logits == logits.gather(1, labels[:, None])).scatter(1, labels[:, None], False)


def _others(logits: Logits, labels: Labels) -> Logits:
    """The logits without those of the label and of its twins, which are minus infinity. Over a twin the label never
    leads, wherever the image goes, so a loss that looked at it would lead nowhere."""
    return logits.masked_fill(_twins(logits, labels), -torch.inf).scatter(1, labels[:, None], -torch.inf)


def _lead(logits: Logits, labels: Labels) -> PerImage:
    """The margin over the best class that is no twin of the label; 0 where there is no such class."""
    own, others = _at(logits, labels), _others(logits, labels).amax(1)
    return own - torch.where(others.isneginf(), own, others)


def margin(logits: Logits, labels: Labels) -> PerImage:
    """The logit of the label minus the best other logit: how much is left before the answer changes."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return own - others.amax(1)
