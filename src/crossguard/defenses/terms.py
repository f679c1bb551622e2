"""The terms of training losses: what each needs to see of a step, and its value for every image.

A term is at once what a student descends and what an adversary may climb: cross-entropy, the distance to a teacher's
embedding, the divergence from a teacher's answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crossguard.errors import CrossguardError
from crossguard.goals import Goal, Untargeted, nobody
from crossguard.models.base import cosine
from crossguard.shapes import Embeddings, Labels, Logits, Mask, PerImage, TextEmbeddings

IMAGE, TEXT, PATCHES = "image", "text", "patches"  # what is encoded
CLEAN, ADVERSARIAL = "clean", "adversarial"  # views
STUDENT, START, SELF = (
    "student",
    "start",
    "self",
)  # who encodes: who learns; the model as it was; who learns, held still
CLASSES, BATCH = "classes", "batch"  # which texts: one for each class, or those that the images of the batch own


@dataclass(frozen=True)
class Need:
    """One thing that a term needs to see: what a tower makes of a view.

    Args:
        tower: 'image' (raw embeddings of the images), 'patches' (their patch tokens in the shared space) or 'text' (raw
            embeddings of the texts).
        view: 'clean', or what an adversary makes. Views of the images of another feed have its name in front:
            'target:clean'.
        who: 'student', 'start' (the model as it was before the training), 'self' (the student, without a gradient), or
            a teacher that the recipe names.
        over: which texts: 'classes' (one of each class, in the order of the labels) or 'batch' (the distinct ones of
            the images in the batch). Where images have captions, both are those of the batch.
    """

    tower: str
    view: str = CLEAN
    who: str = STUDENT
    over: str = CLASSES

    def __post_init__(self) -> None:
        if self.tower not in (IMAGE, TEXT, PATCHES):
            raise CrossguardError(f"there is no tower {self.tower!r}; give 'image', 'text' or 'patches'")
        if self.over not in (CLASSES, BATCH):
            raise CrossguardError(f"texts over {self.over!r} are not known; give 'classes' or 'batch'")
        if self.tower != TEXT and self.over != CLASSES:
            object.__setattr__(self, "over", CLASSES)  # images are not over anything: one need, one name

    @property
    def feed(self) -> str:
        """The feed of the view; '' is the one that the recipe is fitted on."""
        return self.view.rpartition(":")[0]

    def by(self, who: str) -> Need:
        """The same of somebody in the student's place."""
        return replace(self, who=who) if self.who == STUDENT else self


Head = Callable[[Embeddings, TextEmbeddings], Logits]


@dataclass(frozen=True)
class Seen:
    """What a term sees of a step: for each of its needs the embeddings, which texts belong to the images, and how
    somebody reads logits from both.

    Args:
        found: by need.
        heads: by who encodes: scaled cosines (plus the bias) of image and text embeddings.
        places: for each image the row of its text, over 'classes' (its label) and over 'batch'; missing where the data
            has no labels.
        modules: the modules that a recipe trains beside the part, by their names (`Recipe.modules`).
        student: who is meant by 'student': somebody else, where an adversary attacks another network.
        made: what terms have made of all this, for each other (`once`).
    """

    found: Mapping[Need, Tensor]
    heads: Mapping[str, Head] = field(default_factory=dict)
    places: Mapping[str, Labels] = field(default_factory=dict)
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    student: str = STUDENT
    made: dict[object, Tensor] = field(default_factory=dict)

    def image(self, view: str = CLEAN, who: str = STUDENT) -> Embeddings:
        """Raw embeddings of the images of a view, one row for each."""
        return self[Need(IMAGE, view, who)]

    def patches(self, view: str = CLEAN, who: str = STUDENT) -> Tensor:
        """Patch tokens of the images of a view in the space of the embeddings, shape (n, patches, d)."""
        return self[Need(PATCHES, view, who)]

    def text(self, view: str = CLEAN, who: str = STUDENT, over: str = CLASSES) -> TextEmbeddings:
        """Raw embeddings of the texts of a view, one row for each text."""
        return self[Need(TEXT, view, who, over)]

    def logits(
        self,
        image: str = CLEAN,
        text: str = CLEAN,
        who: str = STUDENT,
        over: str = CLASSES,
        scale: float | None = None,
    ) -> Logits:
        """The logits of each image with each text.

        Args:
            image: the view of the images.
            text: the view of the texts.
            scale: the factor on cosines, without a bias; that of the model itself with its bias, if None.
        """
        images, texts = self.image(image, who), self.text(text, who, over)
        if scale is not None:
            return cosine(images, texts) * scale
        return self.heads[Need(IMAGE, who=who).by(self.student).who](images, texts)

    def place(self, over: str) -> Labels:
        """For each image, the row of the text that belongs to it."""
        if over not in self.places:
            raise CrossguardError(
                "a loss asks for the labels of images that have none; train with one that needs no labels, such as "
                "FARE, or give labelled data"
            )
        return self.places[over]

    @property
    def labels(self) -> Labels:
        """The labels of the images; raises where the data has none."""
        return self.place(CLASSES)

    @property
    def own(self) -> Labels:
        """For each image the row of its text among those of the batch; raises where the data has no labels."""
        return self.place(BATCH)

    def replaced(self, found: Mapping[Need, Tensor]) -> Seen:
        """The same with other embeddings for some needs."""
        return replace(self, found={**self.found, **found}, made={})

    def once(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, made when it is first asked for under this key: for what several terms share."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def at(self, rows: Tensor, tower: str) -> Seen:
        """The same for some of the texts, or else for some of the images (a mask or indices)."""
        texts = tower == TEXT
        found = {need: one[rows] if (need.tower == TEXT) == texts else one for need, one in self.found.items()}
        places = self.places if texts else {over: one[rows] for over, one in self.places.items()}
        return replace(self, found=found, places=places, made={})

    def __getitem__(self, need: Need) -> Tensor:
        need = need.by(self.student)
        if need not in self.found:
            raise CrossguardError(f"a loss asks for {need}, which its needs() do not name")
        return self.found[need]


@dataclass(frozen=True)
class Term(ABC):
    """One summand of a training loss, and what an adversary may climb.

    Args:
        weight: its factor in the loss. An adversary climbs the term without it.
        reduce: 'mean' or 'sum' over the images of the batch.
    """

    weight: float = field(default=1.0, kw_only=True)
    reduce: str = field(default="mean", kw_only=True)

    coupled: ClassVar[bool] = False  # whether the value of an image depends on the others in its batch
    labelled: ClassVar[bool] = False  # whether it asks for labels
    compares: ClassVar[bool] = False  # whether it puts embeddings of one beside those of another

    def __post_init__(self) -> None:
        if self.reduce not in ("mean", "sum"):
            raise CrossguardError(f"{type(self).__name__}(reduce={self.reduce!r}) is not known; give 'mean' or 'sum'")

    @abstractmethod
    def needs(self) -> tuple[Need, ...]:
        """What it must see."""

    @abstractmethod
    def each(self, seen: Seen) -> PerImage:
        """Its value for each image (for each text, where it is about texts alone), before weight and reduction."""

    def value(self, seen: Seen) -> Tensor:
        """Its value for the batch, before the weight."""
        each = self.each(seen)
        return each.sum() if self.reduce == "sum" else each.mean()

    def answers(self, seen: Seen) -> tuple[Logits, Labels] | None:
        """The logits by which it tells texts apart, and the right ones, for the accuracy in the log; None, where it
        does not."""
        del seen
        return None

    def sieve(self) -> tuple[Need, ...]:
        """What of its needs decides which images count, where it leaves some out; nothing, where all do. The student
        is not among them: what it says now is no reason to learn nothing."""
        return ()

    def counted(self, seen: Seen) -> Mask:
        """Which images count, by what its sieve needs."""
        raise NotImplementedError(f"{type(self).__name__} leaves no image out")

    # What an adversary climbs

    def outputs(self, seen: Seen, spot: Spot) -> Tensor:
        """What an adversary asks of the network about the view that it makes, one row for each image or text. The
        others of the batch cannot change a row."""
        return spot.pack(seen)

    def goal(self, seen: Seen, spot: Spot) -> Goal:
        """What an adversary climbs, from those outputs: the value of each."""
        return Climb(self, seen, spot)


@dataclass
class Spot:
    """The place where an adversary acts on a term: the needs that change with the view that it makes. Their values as
    one tensor of outputs, and back."""

    needs: tuple[Need, ...]
    shapes: list[torch.Size] = field(default_factory=list)

    @property
    def tower(self) -> str:
        """Whether images or texts are attacked."""
        return TEXT if self.needs[0].tower == TEXT else IMAGE

    def pack(self, seen: Seen) -> Tensor:
        """The outputs, shape (n, numbers)."""
        parts = [seen.found[need] for need in self.needs]
        self.shapes = [part.shape[1:] for part in parts]
        return torch.cat([part.flatten(1) for part in parts], dim=1) if len(parts) > 1 else parts[0].flatten(1)

    def unpack(self, outputs: Tensor) -> dict[Need, Tensor]:
        """What each need is, by these outputs."""
        parts = outputs.split([shape.numel() for shape in self.shapes], dim=1)
        return {
            need: part.reshape(len(outputs), *shape)
            for need, part, shape in zip(self.needs, parts, self.shapes, strict=True)
        }


@dataclass(frozen=True)
class Climb(Goal):
    """Up the value of a term. It is never won: the search uses all its steps."""

    term: Term
    seen: Seen
    spot: Spot
    wins: ClassVar[bool] = False

    def loss(self, outputs: Tensor) -> PerImage:
        return self.term.each(self.seen.replaced(self.spot.unpack(outputs)))

    def won(self, outputs: Tensor) -> Mask:
        return nobody(outputs)

    def at(self, keep: Tensor) -> Climb:
        return replace(self, seen=self.seen.at(keep, self.spot.tower))


@dataclass(frozen=True)
class OverClasses(Term):
    """The one-way cross-entropy of each image over texts: over the prompts of all classes the loss of TeCoA and of PGD
    in MMCoA. An adversary climbs it as log-odds, which never saturate (`goals.CrossEntropy`), or another loss of the
    same logits.

    Args:
        image: the view of the images.
        text: the view of the texts.
        over: 'classes', or 'batch' for the distinct texts of the batch.
        scale: the factor on cosines; the model's own, if None.
    """

    image: str = CLEAN
    text: str = CLEAN
    over: str = CLASSES
    scale: float | None = None

    labelled: ClassVar[bool] = True

    def needs(self) -> tuple[Need, ...]:
        return (Need(IMAGE, self.image), Need(TEXT, self.text, over=self.over))

    def each(self, seen: Seen) -> PerImage:
        return F.cross_entropy(self.outputs(seen), seen.place(self.over), reduction="none")

    def answers(self, seen: Seen) -> tuple[Logits, Labels]:
        return self.outputs(seen), seen.place(self.over)

    def outputs(self, seen: Seen, spot: Spot | None = None) -> Logits:
        del spot
        return seen.logits(self.image, self.text, over=self.over, scale=self.scale)

    def goal(self, seen: Seen, spot: Spot) -> Goal:
        del spot
        return Untargeted(seen.place(self.over))


@dataclass(frozen=True)
class InBatch(Term):
    """The symmetric contrastive loss of CLIP over the batch: the sum of image-to-text and text-to-image cross-entropy.

    With identity targets, so two images of one class repel each other's copy of the same prompt, as in MMCoA's
    released code. Only distinct texts are encoded; `counts` restore exactly the value and the gradient of the
    duplicated batch.

    Args:
        image: the view of the images.
        text: the view of the texts.
    """

    image: str = CLEAN
    text: str = CLEAN

    coupled: ClassVar[bool] = True
    labelled: ClassVar[bool] = True

    def needs(self) -> tuple[Need, ...]:
        return (Need(IMAGE, self.image), Need(TEXT, self.text, over=BATCH))

    def each(self, seen: Seen) -> PerImage:
        return in_batch(seen.logits(self.image, self.text, over=BATCH), seen.own)

    def answers(self, seen: Seen) -> tuple[Logits, Labels]:
        return seen.logits(self.image, self.text, over=BATCH), seen.own


@dataclass(frozen=True)
class KL(Term):
    """The Kullback-Leibler divergence of the student's distribution over classes from a teacher's, KL(teacher ||
    student).

    Args:
        image: the view of the images that the student sees.
        to: who teaches, and which view the teacher sees. With 'student' the gradient goes through both.
        text: the view of the class texts, for both.
        reverse: KL(student || teacher) instead, which seeks a mode of the teacher.
        scale: the factor on the cosines of both; each model's own, if None.
        temperature: divides the logits of both, without the factor of its square.
        softened: a further factor on the logits of the teacher; below 1 its answer is less sure.
    """

    image: str = ADVERSARIAL
    to: tuple[str, str] = (START, ADVERSARIAL)
    text: str = CLEAN
    reverse: bool = False
    scale: float | None = None
    temperature: float = 1.0
    softened: float = 1.0

    def needs(self) -> tuple[Need, ...]:
        who, view = self.to
        return (Need(IMAGE, self.image), Need(TEXT, self.text), Need(IMAGE, view, who), Need(TEXT, self.text, who))

    def each(self, seen: Seen) -> PerImage:
        who, view = self.to
        mine = F.log_softmax(self._logits(seen, self.image, STUDENT), dim=1)
        theirs = F.log_softmax(self._logits(seen, view, who) * self.softened, dim=1)
        first, second = (mine, theirs) if self.reverse else (theirs, mine)
        return (first.exp() * (first - second)).sum(1)

    def answers(self, seen: Seen) -> tuple[Logits, Labels] | None:
        if CLASSES not in seen.places or ":" in self.image:
            return None
        return self._logits(seen, self.image, STUDENT), seen.labels

    def _logits(self, seen: Seen, image: str, who: str) -> Logits:
        return seen.logits(image, self.text, who, scale=self.scale) / self.temperature


@dataclass(frozen=True)
class Far(Term):
    """The squared distance of raw embeddings from a teacher's, summed over the dimensions: the loss of FARE (images)
    and of LEAF (texts). It needs no labels.

    Args:
        view: the view that the student sees.
        to: who teaches, and which view the teacher sees.
        tower: 'image' or 'text'.
        over: which texts, where it is about texts.
    """

    view: str = ADVERSARIAL
    to: tuple[str, str] = (START, CLEAN)
    tower: str = IMAGE
    over: str = CLASSES

    compares: ClassVar[bool] = True

    def needs(self) -> tuple[Need, ...]:
        who, view = self.to
        return (Need(self.tower, self.view, over=self.over), Need(self.tower, view, who, self.over))

    def each(self, seen: Seen) -> PerImage:
        mine, theirs = (seen[need].float() for need in self.needs())
        return (mine - theirs).square().flatten(1).sum(1)


@dataclass(frozen=True)
class Turned(Far):
    """One minus the cosine of embeddings with a teacher's: how far a text or an image has drifted. With the student's
    own clean texts it is what attacks on texts climb by themselves, as `goals.Drift`."""

    def each(self, seen: Seen) -> PerImage:
        mine, theirs = (seen[need].float() for need in self.needs())
        return 1.0 - F.cosine_similarity(mine, theirs, dim=1)


# How far the student's embedding of a text has moved, which attacks on texts climb where nothing else is said.
DRIFTED = Turned(to=(STUDENT, CLEAN), tower=TEXT)


def in_batch(logits: Logits, own: Labels) -> PerImage:
    """Symmetric in-batch cross-entropy from logits of n images with k distinct texts, where image i owns text `own[i]`,
    for each image; the loss of the batch is the mean.

    Image to text: -s_i,own + log sum_k n_k exp(s_ik), with n_k copies of text k in the batch (0 drops a text that
    nobody owns). Text to image: each copy of a text has its own image as target, so summed over copies
    -s_i,own + log sum_j exp(s_j,own(i)).
    """
    counts = torch.bincount(own, minlength=logits.shape[1]).to(logits.dtype)
    matched = logits.gather(1, own[:, None])[:, 0]
    to_text = torch.logsumexp(logits + counts.log(), dim=1) - matched
    to_image = torch.logsumexp(logits, dim=0)[own] - matched
    return to_text + to_image
