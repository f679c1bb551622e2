"""What an attack is and what it may ask: victims map inputs to outputs and count the questions; attacks only call
them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from crossguard.budgets import Budget, PixelBudget, TextBudget, Words
from crossguard.errors import CrossguardError
from crossguard.gallery import Gallery
from crossguard.goals import Drift, Endless, Goal
from crossguard.seeds import by_position, drawing, fold
from crossguard.shapes import Embeddings, Images, Labels, Mask, Owners, PerImage, Seeds, TextEmbeddings
from crossguard.words import WordError, show


@dataclass(frozen=True)
class Queries:
    """How often each sample of a batch was asked about: plain forwards, and gradients (a forward and a backward
    each); and whether the victim drew noise for an answer."""

    forwards: Labels
    gradients: Labels
    drew: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))

    @staticmethod
    def none(count: int) -> Queries:
        return Queries(torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))


@dataclass(frozen=True)
class ImageVictim:
    """Images in, outputs (logits or embeddings) out, for the samples of one batch. Any callable on images makes one.

    Args:
        answer: the function itself, differentiable or not.
        queries: counts the questions of each sample.
        seeds: one key per sample: a random model draws its noise from them, anew at each question.
        rows: which samples of the batch these are; all, if None.
    """

    answer: Callable[[Images], Tensor]
    queries: Queries | None = None
    seeds: Seeds | None = None
    rows: Tensor | None = None

    def __call__(self, images: Images) -> Tensor:
        """The outputs, without a gradient."""
        with torch.no_grad(), self._asked("forwards", len(images)):
            return self.answer(images)

    def ascend(self, images: Images, goal: Goal) -> tuple[Images, PerImage, Tensor]:
        """The gradient of the goal's loss with respect to the pixels, the loss and the outputs, all detached.

        The losses are summed, never averaged, and the gradient is taken of the pixels alone: no parameter gets a
            `.grad`.
        """
        pixels = images.detach().requires_grad_(True)
        with torch.enable_grad(), self._asked("gradients", len(images)):
            outputs = self.answer(pixels)
            losses = goal.loss(outputs)
            (gradient,) = torch.autograd.grad(losses.sum(), pixels)
        if not bool(torch.isfinite(losses).all()):
            raise CrossguardError("the victim answered with numbers that are not finite (NaN or infinity)")
        return gradient, losses.detach(), outputs.detach()

    @property
    def steady(self) -> bool:
        """Whether it is known to answer the same question alike: it was lent noise and has used none so far."""
        return self.seeds is not None and self.queries is not None and not bool(self.queries.drew)

    def at(self, keep: Tensor) -> ImageVictim:
        """The same victim for some of the samples (a mask or indices)."""
        count = len(self.queries.forwards) if self.queries is not None else 0 if self.seeds is None else len(self.seeds)
        if not count:
            return self
        rows = torch.arange(count) if self.rows is None else self.rows
        return replace(self, rows=rows[keep.cpu()])

    def drawing_from(self, seeds: Seeds) -> ImageVictim:
        """The same victim with noise of its own for each sample, unless it has that already."""
        if self.seeds is not None:
            return self
        return replace(self, seeds=seeds, queries=self.queries or Queries.none(len(seeds)))

    @contextmanager
    def _asked(self, kind: str, count: int) -> Iterator[None]:
        """Counts a question about `count` images and lends its noise to the model."""
        if self.queries is None:
            yield
            return
        rows = torch.arange(len(self.queries.forwards)) if self.rows is None else self.rows
        rows = rows[:count]
        counter: Tensor = getattr(self.queries, kind)
        counter[rows] += 1
        if self.seeds is None:
            yield
            return
        asked = self.queries.forwards[rows] + self.queries.gradients[rows]
        with drawing(fold(self.seeds[rows], asked)) as lent:
            yield
        if lent.used:
            self.queries.drew.fill_(True)


@runtime_checkable
class TextVictim(Protocol):
    """Strings in, raw embeddings out, shape (n, d), in as few forwards as memory allows."""

    def __call__(self, texts: Sequence[str], /) -> Embeddings: ...


@dataclass(frozen=True)
class PairVictim:
    """What an attack may ask where images meet texts, for the samples of one batch.

    `before` answers images against the clean texts, `after` against the texts as the attack rewrote them; `encode`
    gives the images' raw embeddings, `gate` how far the defense is from doing nothing, where it has a gate. All share
    one counter. `classes` gives the embeddings of the rewritten texts, one for each class; few attacks ask for them.
    """

    before: ImageVictim
    after: ImageVictim
    encode: ImageVictim
    gate: ImageVictim | None = None
    classes: Callable[[], TextEmbeddings] | None = None


@dataclass(frozen=True)
class MatchVictim:
    """What an attack may ask where images and captions find each other, for the images of one batch and their captions.

    Args:
        encode: images to raw embeddings.
        texts: strings to raw embeddings.
        gallery: what all images and captions of the retrieval are when nobody attacks.
        rows: the place of each image of the batch in the gallery.
        captions: the place of each caption of the batch in the gallery.
        owners: the place of each caption's image in the batch.
        goal: what is climbed by attacks that have no goal of their own: 'rank' or 'drift'.
    """

    encode: ImageVictim
    texts: TextVictim
    gallery: Gallery
    rows: Labels
    captions: Owners
    owners: Owners
    goal: str = "rank"

    def at(self, keep: Labels) -> MatchVictim:
        """The same victim for some of the images, with all their captions, in the order they had."""
        place = torch.full_like(self.rows, -1).scatter(0, keep, torch.arange(len(keep), device=keep.device))
        owners = place[self.owners]
        left = owners >= 0
        return replace(
            self,
            encode=self.encode.at(keep),
            rows=self.rows[keep],
            captions=self.captions[left],
            owners=owners[left],
        )

    @property
    def clean_images(self) -> Embeddings:
        return self.gallery.images[self.rows]

    @property
    def clean_texts(self) -> TextEmbeddings:
        return self.gallery.texts[self.captions]

    def embedded(self, texts: Sequence[str]) -> TextEmbeddings:
        """The captions of the batch as they are now, without a gradient."""
        with torch.no_grad():
            return self.texts(texts)

    def against_images(self, captions: TextEmbeddings) -> Goal:
        """What an attack on the images of the batch climbs while the captions have these embeddings: without an end,
        since who has lost the first place can still lose the fifth and the tenth."""
        goal: Goal = Drift(self.clean_images)
        if self.goal != "drift":
            goal = self.gallery.lost_images(self.rows, captions, self.owners)
        return Endless(goal)

    def against_texts(self, images: Embeddings) -> Goal:
        """What an attack on the captions of the batch climbs while the images have these embeddings."""
        if self.goal == "drift":
            return Drift(self.clean_texts)
        return self.gallery.lost_texts(self.rows[self.owners], images[self.owners])


@dataclass
class Found:
    """The strongest image of each sample so far: one that reached the goal, or else the one of the highest loss."""

    images: Images
    losses: PerImage
    won: Mask

    @staticmethod
    def nothing(clean: Images) -> Found:
        count = len(clean)
        return Found(
            clean.clone(),
            torch.full((count,), -torch.inf, device=clean.device),
            torch.zeros(count, dtype=torch.bool, device=clean.device),
        )

    def open(self, stop: bool = True) -> Tensor:
        """The samples that are still worth attacking."""
        return (~self.won).nonzero()[:, 0] if stop else torch.arange(len(self.won), device=self.won.device)

    def starts(self, count: int, stop: bool, seeds: Seeds) -> Iterator[tuple[int, Tensor, Seeds]]:
        """For each of `count` starts its number, the samples that are still worth attacking, and their noise."""
        for start in range(count):
            rows = self.open(stop)
            if len(rows) == 0:
                return
            yield start, rows, (fold(seeds, start) if start else seeds)[rows.cpu()]

    def offer(self, rows: Tensor, images: Images, losses: PerImage, won: Mask) -> Mask:
        """Keeps, of these candidates for the samples at `rows`, the ones that are stronger than what there is; says
        which."""
        better = (won & ~self.won[rows]) | ((won == self.won[rows]) & (losses > self.losses[rows]))
        chosen = rows[better]
        self.images[chosen] = images[better]
        self.losses[chosen] = losses[better]
        self.won[chosen] = won[better]
        return better


_BUDGETS: dict[tuple[str, ...], str] = {("image",): "'Linf(8/255)'", ("text",): "'Words(1)'"}  # what to try


class Attack(ABC):
    """How an adversary searches. Where classes have prompts, a task calls `rewrite` once for all its texts and
    `perturb` for every batch of images; where images have captions, `match` for every batch of both. What an attack
    does not touch comes back as it was. `on` says which parts of a budget it spends."""

    on: ClassVar[tuple[str, ...]] = ()

    @property
    def needs_classes(self) -> bool:
        """Whether its images must be of classes, not of captions."""
        return False

    def rewrite(
        self,
        victim: TextVictim,
        texts: Sequence[str],
        budget: Budget,
        rivals: Sequence[frozenset[str]],
        goal: Goal | None = None,
    ) -> list[str]:
        """The texts after the attack; unchanged, unless the attack is on texts. Without a goal, they drift."""
        del victim, budget, rivals, goal
        return list(texts)

    def perturb(self, victim: PairVictim, images: Images, goal: Goal, budget: Budget, seeds: Seeds) -> Images:
        """The images after the attack; unchanged, unless the attack is on images."""
        del victim, goal, budget, seeds
        return images

    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]:
        """The images of a batch and their captions after the attack."""
        del victim, budget, seeds
        return images, list(texts)

    def spends(self, budget: Budget) -> tuple[PixelBudget | None, TextBudget | None]:
        """The parts of the budget this attack uses; raises where one that it needs is missing."""
        image = budget.image if "image" in self.on else None
        text = budget.text if "text" in self.on else None
        hint = _BUDGETS.get(self.on, "'Both(Linf(8/255), Words(1))'")
        if "image" in self.on and image is None:
            raise CrossguardError(
                f"{spelled(self)} changes pixels, but {spelled(budget)} allows no change of pixels; try {hint}"
            )
        if "text" in self.on and text is None:
            raise CrossguardError(
                f"{spelled(self)} changes texts, but {spelled(budget)} allows no change of texts; try {hint}"
            )
        return image, text


class ImageAttack(Attack):
    """An attack on pixels: `attack(victim, clean, goal, budget)` returns images inside the budget. `norms` are the
    kinds of budgets it is made for."""

    on = ("image",)
    norms: ClassVar[tuple[type[PixelBudget], ...]] = (PixelBudget,)

    def perturb(self, victim: PairVictim, images: Images, goal: Goal, budget: Budget, seeds: Seeds) -> Images:
        pixels, _ = self.spends(budget)
        assert pixels is not None
        return self(victim.before, images, goal, pixels, seeds)

    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]:
        pixels, _ = self.spends(budget)
        assert pixels is not None
        goal = victim.against_images(victim.clean_texts)
        return self(victim.encode, images, goal, pixels, seeds), list(texts)

    def __call__(
        self,
        victim: ImageVictim | Callable[[Images], Tensor],
        clean: Images,
        goal: Goal,
        budget: PixelBudget,
        seeds: Seeds | None = None,
    ) -> Images:
        """Adversarial images, detached, of the shape of `clean`.

        Args:
            seeds: one key per sample for its noise; by position in the batch, if not given.
        """
        victim, seeds = self.ready(victim, clean, budget, seeds, goal)
        return self.search(victim, clean.detach(), goal, budget, seeds).detach()

    def ready(
        self,
        victim: ImageVictim | Callable[[Images], Tensor],
        clean: Images,
        budget: PixelBudget,
        seeds: Seeds | None,
        goal: Goal | None = None,
    ) -> tuple[ImageVictim, Seeds]:
        """The victim as the search may ask it, and the keys of its noise; raises for a budget this attack cannot
        spend and for a goal that is for another number of images."""
        if not isinstance(budget, PixelBudget):
            raise CrossguardError(
                f"{spelled(self)} changes pixels, but {budget!r} is no budget of pixels; try 'Linf(8/255)'"
            )
        if not isinstance(budget, self.norms):
            names = " or ".join(norm.__name__ for norm in self.norms)
            raise CrossguardError(
                f"{spelled(self)} is an attack for {names} and cannot spend {spelled(budget)}; give an {names} budget, "
                "or try PGD, which knows every norm"
            )
        if not isinstance(victim, ImageVictim):
            victim = ImageVictim(victim)
        _check_mode(victim.answer)
        if goal is not None:
            _check_counts(goal, len(clean), "images")
        seeds = by_position(len(clean)) if seeds is None else seeds
        return victim.drawing_from(seeds), seeds

    @abstractmethod
    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Images: ...


class TextAttack(Attack):
    """An attack on strings: `attack(victim, clean, goal, budget)` returns strings inside the budget."""

    on = ("text",)

    def rewrite(
        self,
        victim: TextVictim,
        texts: Sequence[str],
        budget: Budget,
        rivals: Sequence[frozenset[str]],
        goal: Goal | None = None,
    ) -> list[str]:
        _, words = self.spends(budget)
        return self(victim, texts, goal, words, rivals)

    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]:
        del seeds
        _, words = self.spends(budget)
        return images, self(victim.texts, texts, victim.against_texts(victim.clean_images), words)

    def __call__(
        self,
        victim: TextVictim,
        clean: Sequence[str],
        goal: Goal | None = None,
        budget: TextBudget | None = None,
        rivals: Sequence[frozenset[str]] | None = None,
    ) -> list[str]:
        """Adversarial strings, one for each clean one.

        Args:
            goal: what to climb; drift from the clean embeddings, if not given.
            budget: how much may change; one word, if not given.
            rivals: for each string the words that would turn it into another class (`Prompts.rivals`).
        """
        texts = list(clean)
        if not texts:
            return []
        budget = Words(1) if budget is None else budget
        if not isinstance(budget, TextBudget):
            raise CrossguardError(
                f"{spelled(self)} changes texts, but {budget!r} is no budget of texts; try 'Words(1)'"
            )
        if rivals is not None and len(rivals) != len(texts):
            raise CrossguardError(f"{len(rivals)} sets of rival words were given for {len(texts)} texts")
        with torch.no_grad():
            if goal is None:
                goal = Drift(victim(texts))
            _check_counts(goal, len(texts), "texts")
            return self.search(victim, texts, goal, budget, rivals or [frozenset()] * len(texts))

    @abstractmethod
    def search(
        self,
        victim: TextVictim,
        clean: list[str],
        goal: Goal,
        budget: TextBudget,
        rivals: Sequence[frozenset[str]],
    ) -> list[str]: ...


def _check_mode(answer: Callable[[Images], Tensor]) -> None:
    """Batch normalization in training mode would tie every answer to the batch, and learn from the attack."""
    if isinstance(answer, nn.Module) and any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in answer.modules()
    ):
        raise CrossguardError(
            "the victim's batch normalization is in training mode, so its answers depend on the batch; call .eval() "
            "first"
        )


def _check_counts(goal: Goal, count: int, what: str) -> None:
    """Labels that are too few would be an index out of range in the middle of a search."""
    for given in goal.counts():
        if given != count:
            raise CrossguardError(f"{type(goal).__name__} has {given} entries for {count} {what}; give it one for each")


def spelled(word: Attack | Budget) -> str:
    """The word as a user would write it; what is no word (a class of one's own) as Python shows it."""
    try:
        return show(word, short=True)
    except WordError:
        return str(word)
