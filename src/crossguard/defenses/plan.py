"""What a training can be told: its stages, each with terms and adversaries, and the options that every recipe has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from crossguard.attacks.base import ImageAttack, TextAttack, spelled
from crossguard.attacks.gradient import PGD
from crossguard.budgets import Budget
from crossguard.data import Dataset
from crossguard.defenses.optimizers import Adam, Optimizer
from crossguard.defenses.parts import Towers, Trainable
from crossguard.defenses.terms import (
    ADVERSARIAL,
    BATCH,
    CLEAN,
    IMAGE,
    SELF,
    START,
    STUDENT,
    TEXT,
    Need,
    OverClasses,
    Term,
)
from crossguard.defenses.validation import Validation
from crossguard.errors import CrossguardError
from crossguard.models.base import VisionLanguageModel
from crossguard.seeds import uniform
from crossguard.shapes import Images, Seeds
from crossguard.words import Word


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


@dataclass(frozen=True)
class Adversary:
    """Who makes a view of each batch against which the student learns.

    Args:
        attack: an attack on images or on texts.
        budget: how far it may go.
        climbs: what it climbs: the value of this term with the view that it `makes` in its place. That may be a term
            that the student descends, or any other.
        of: the view that it begins with.
        makes: the view that it makes.
        on: whose answer it attacks; the term's 'student' is read as this one.
        once: make the view of an image once in the whole training, without augmentation, and remember what those say
            of it who do not learn: a bank of embeddings, made from the image alone. The student cannot see it.
        leaks: add the gradients of its steps to the update, a fault of released code: there, gradients of parameters
            are cleared before the attack and not after it.
        ascends: what is trained climbs as well while the attack lasts, and is put back behind it: after each step of
            the attack a plain gradient step of this rate up the mean over the batch, as in the released code of APT.
    """

    attack: ImageAttack | TextAttack
    budget: Budget
    climbs: Term
    of: str = CLEAN
    makes: str = ADVERSARIAL
    on: str = STUDENT
    once: bool = False
    leaks: bool = False
    ascends: float = 0.0

    def __post_init__(self) -> None:
        self.attack.spends(self.budget)
        name = spelled(self.attack)
        if not 0.0 <= self.ascends < float("inf"):
            raise CrossguardError(f"{name}: the rate ascends={self.ascends} is not possible; give 0 or more")
        if self.ascends and not self._steady:
            raise CrossguardError(
                f"what is trained cannot climb beside {name}: all images must take each step together, and against the "
                "student over classes; give PGD(best=False, stop=False)"
            )
        if self.climbs.coupled:
            raise CrossguardError(
                f"{name} cannot climb {type(self.climbs).__name__}, in which the images of a batch depend on each "
                "other; give a term of each image alone, such as OverClasses"
            )
        if not self.spots:
            raise CrossguardError(
                f"{name} makes the view {self.makes!r}, of which {type(self.climbs).__name__} sees no {self.tower}; "
                "name it in the term that is climbed"
            )
        if self._texts and any(need.tower != TEXT for need in self.needs):
            raise CrossguardError(
                f"{name} sees texts alone, since they are attacked once for all images of a batch, and "
                f"{type(self.climbs).__name__} asks for images; give it a term of texts, such as DRIFTED"
            )
        if self.once and self.on == STUDENT:
            raise CrossguardError(
                f"{name} cannot attack a student once, since it learns; give on='start', or once=False"
            )
        if self.once and (self._texts or any(need.tower == TEXT for need in self.needs)):
            raise CrossguardError(
                f"{name} cannot be used once on texts or against them, which are others in each step; give once=False"
            )

    @property
    def tower(self) -> str:
        """Whether it attacks images or texts."""
        return TEXT if isinstance(self.attack, TextAttack) else IMAGE

    @property
    def spots(self) -> tuple[Need, ...]:
        """The needs of what it climbs that change with the view that it makes."""
        return tuple(need for need in self.needs if need.view == self.makes and (need.tower == TEXT) == self._texts)

    @property
    def needs(self) -> tuple[Need, ...]:
        """All that is seen of what it climbs."""
        return tuple(dict.fromkeys(need.by(self.on) for need in self.climbs.needs()))

    @property
    def _texts(self) -> bool:
        return self.tower == TEXT

    @property
    def _steady(self) -> bool:
        """Whether each step of the attack is one question about all images, and what it climbs follows from the answer
        alone."""
        attack = self.attack
        steps = isinstance(attack, PGD) and not attack.stop and not attack.best and attack.restarts == 1
        return steps and self.on == STUDENT and not self.once and isinstance(self.climbs, OverClasses)


@dataclass(frozen=True)
class EMA:
    """An exponential moving average of what is trained, beginning with the weights at the start of the stage.

    Args:
        decay: what stays of the average when new weights come in.
        per: how often they do: 'step' or 'epoch' (and after the last step).
    """

    decay: float = 0.999
    per: str = "step"

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise CrossguardError(f"EMA(decay={self.decay}) is not possible; give a number from 0 to 1")
        if self.per not in ("step", "epoch"):
            raise CrossguardError(f"EMA(per={self.per!r}) is not known; give 'step' or 'epoch'")


VANILLA, PREVIOUS = "vanilla", "previous"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of a training with a loss, adversaries and an optimizer of its own. It hands on its average, if it
    takes one, or else its last weights: to the next stage or, at the end, as the result.

    Args:
        terms: the weighted sum that the student descends.
        adversaries: in the order in which they make their views; each sees those made before.
        optimizer: its peak rate is multiplied by warm-up and decay.
        epochs: passes over the data; `steps`, if given, counts instead.
        steps: optimizer steps.
        warmup: steps over which the learning rate rises linearly.
        cosine: the rate falls to zero along a half cosine afterwards; otherwise it stays.
        average: take this average of the weights, and hand it on in their place.
        pull: at the start of every epoch but the first, go this part of the way to what the stage before handed on
            (for the first stage, to the model as it was).
        starts: with what the stage before handed on ('previous'), or with the model as it was ('vanilla').
    """

    terms: tuple[Term, ...]
    adversaries: tuple[Adversary, ...] = ()
    optimizer: Optimizer = Adam()
    epochs: float = 1.0
    steps: int | None = None
    warmup: int = 0
    cosine: bool = False
    average: EMA | None = None
    pull: float = 0.0
    starts: str = PREVIOUS

    def __post_init__(self) -> None:
        if not self.terms:
            raise CrossguardError("a stage without terms trains nothing; give it one or more")
        check_length("Stage", self.epochs, self.steps)
        check_schedule("Stage", self.warmup)
        if not 0.0 <= self.pull <= 1.0:
            raise CrossguardError(f"Stage(pull={self.pull}) is not possible; give a number from 0 to 1")
        if self.starts not in (VANILLA, PREVIOUS):
            raise CrossguardError(f"Stage(starts={self.starts!r}) is not known; give 'vanilla' or 'previous'")
        self._check_views()

    @property
    def needs(self) -> tuple[Need, ...]:
        """All that its terms see."""
        return tuple(dict.fromkeys(need for term in self.terms for need in term.needs()))

    @property
    def everything(self) -> tuple[Need, ...]:
        """All that its terms and its adversaries see."""
        return tuple(dict.fromkeys([*self.needs, *(need for one in self.adversaries for need in one.needs)]))

    @property
    def labelled(self) -> bool:
        """Whether anybody asks for labels."""
        return any(term.labelled for term in [*self.terms, *(one.climbs for one in self.adversaries)]) or any(
            need.tower == TEXT and need.over == BATCH for need in self.everything
        )

    def _check_views(self) -> None:
        """Raises where somebody sees a view that nobody has made."""
        made = set[tuple[str, str, str]]()

        def check(need: Need, who: str) -> None:
            kind = TEXT if need.tower == TEXT else IMAGE
            if need.view.rpartition(":")[2] != CLEAN and (kind, need.view, need.over) not in made:
                over = f" over {need.over!r}" if kind == TEXT else ""
                raise CrossguardError(
                    f"{who} cannot see {kind}s{over} in a view {need.view!r}, which nobody makes; there is 'clean', "
                    "and what an adversary makes of what it climbs"
                )

        for one in self.adversaries:
            for need in one.needs:
                if need not in one.spots:
                    check(need, spelled(one.attack))
            over = one.spots[0].over
            check(Need(one.tower, one.of, over=over), spelled(one.attack))
            made.add((one.tower, one.makes, over))
        for term in self.terms:
            for need in term.needs():
                check(need, type(term).__name__)
        once = {one.makes for one in self.adversaries if one.once}
        for need in self.everything:
            if need.view in once and need.tower != TEXT and need.who in (STUDENT, SELF):
                raise CrossguardError(
                    f"the view {need.view!r} is made once for those who do not learn, and a student is asked about it; "
                    "give once=False"
                )


@dataclass(frozen=True, kw_only=True)
class Plan(Word, ABC):
    """How a training goes: its stages, and the options that every recipe has.

    Args:
        trains: what of the model is trained.
        epochs: passes over the data; `steps`, if given, counts instead.
        steps: optimizer steps.
        batch: images in a step, over all processes together.
        optimizer: an optimizer word.
        warmup: steps over which the learning rate rises linearly.
        cosine: the rate falls to zero along a half cosine afterwards; otherwise it stays.
        average: the result is this average of the weights instead of the last ones.
        validate: what is measured at the end of each epoch; nothing, if None.
        best: the result is what had the highest robust accuracy there (of the last stage, the first of equals) instead
            of what came last. Whoever reports accuracy on the validation data then has chosen by them.
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

    trains: Trainable = Towers()
    epochs: float = 1.0
    steps: int | None = None
    batch: int = 128
    optimizer: Optimizer = Adam()
    warmup: int = 0
    cosine: bool = False
    average: EMA | None = None
    validate: Validation | None = None
    best: bool = False
    shots: int | None = None
    fresh_shots: bool = False
    captions: bool = False
    augment: Augment | None = None
    clamp_scale: bool = False
    clip: float | None = None
    bf16: bool = False
    save_every: int = 100
    seed: int = 0

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """What the student descends and who attacks it, one stage after the other."""

    def stage(self, *terms: Term, adversaries: tuple[Adversary, ...] = ()) -> Stage:
        """A stage with the length, the optimizer and the schedule that the recipe was given."""
        return Stage(
            terms=terms, adversaries=adversaries, optimizer=self.optimizer, epochs=self.epochs, steps=self.steps,
            warmup=self.warmup, cosine=self.cosine, average=self.average,
        )  # fmt: skip

    def teachers(self) -> Mapping[str, VisionLanguageModel]:
        """Models that terms see beside the student, by their names. 'start' and 'self' are there without being
        named. Teachers get no gradient and never change."""
        return {}

    def feeds(self, data: Dataset) -> Mapping[str, Dataset]:
        """What batches come from, by the name that stands in front of a view ('target:clean'). The one called '' comes
        first: its labels and class prompts are those of the training, and its passes are the epochs."""
        return {"": data}

    def modules(self, width: Callable[[], int]) -> Mapping[str, nn.Module]:
        """Modules that are trained beside the part and thrown away at the end, such as the discriminator of a domain.
        Torch's generator follows from the seed where this is called.

        Args:
            width: says how many dimensions an embedding has; the model is asked for that where this is called.
        """
        del width
        return {}

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_length(name, self.epochs, self.steps)
        check_schedule(name, self.warmup)
        if self.seed < 0:
            raise CrossguardError(f"{name}(seed={self.seed}) is not possible; give 0 or more")
        if self.fresh_shots and self.shots is None:
            raise CrossguardError(f"{name}(fresh_shots=True) needs a number of shots, such as shots=16")
        if self.batch < 2:
            raise CrossguardError(
                f"{name}(batch={self.batch}) is not possible; a contrastive batch needs at least 2 images"
            )
        if self.best and self.validate is None:
            raise CrossguardError(
                f"{name}(best=True) needs to know what is best; give validate=Validation(data) with held-out data"
            )
        if self.shots is not None and self.shots < 1:
            raise CrossguardError(f"{name}(shots={self.shots}) is not possible; give 1 or more")
        if self.save_every < 0:
            raise CrossguardError(f"{name}(save_every={self.save_every}) is not possible; give 0 or more seconds")
        if self.clip is not None and not self.clip > 0:
            raise CrossguardError(f"{name}(clip={self.clip}) trains nothing; give a positive norm, or None")
        known = {STUDENT, START, SELF, *self.teachers()}
        for stage in self.stages():
            once = {one.makes for one in stage.adversaries if one.once}
            for need in stage.everything:
                if need.view in once and self.augment is not None:
                    raise CrossguardError(
                        f"{name} makes the view {need.view!r} of each image once, and so cannot augment it anew in "
                        "each step; give augment=None"
                    )
                if need.who not in known:
                    raise CrossguardError(f"{name} has no teacher {need.who!r}; it has {', '.join(sorted(known))}")


def check_length(name: str, epochs: float, steps: int | None) -> None:
    """Raises where a training or a stage of this length would not be one."""
    if steps is not None and steps < 1:
        raise CrossguardError(f"{name}(steps={steps}) trains nothing; give 1 or more steps")
    if not 0 < epochs <= 1e6:
        raise CrossguardError(
            f"{name}(epochs={epochs}) is not possible; give a positive number of epochs, at most a million"
        )


def check_schedule(name: str, warmup: int) -> None:
    """Raises where the rate would rise for less than no time."""
    if warmup < 0:
        raise CrossguardError(f"{name}(warmup={warmup}) is not possible; give 0 or more steps")
