"""What an attack is and what it may ask: victims map inputs to outputs and count the questions; attacks only call
them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from crossguard.answer import Answer
from crossguard.budgets import Budget, PixelBudget, TextBudget, Words, per_image
from crossguard.device import check_gradients
from crossguard.errors import CrossguardError
from crossguard.gallery import Gallery
from crossguard.goals import Drift, Goal, Untargeted
from crossguard.seeds import drawing, fold, inherited, replay
from crossguard.shapes import Embeddings, Images, Labels, Mask, Owners, PerImage, Seeds, TextEmbeddings
from crossguard.words import Word, WordError, show

DRAWS = 5  # answers of a random victim by which an image of one attack is compared with that of another


@dataclass
class Queries:
    """What was asked about each sample of a batch, shared by all victims of the batch.

    Attributes:
        forwards: plain forwards.
        gradients: gradients, a forward and a backward each.
        drew: whether the victim drew noise for an answer.
        broken: whether a number that is not finite came out, a scalar on the victim's device.
    """

    forwards: Labels
    gradients: Labels
    drew: bool = False
    broken: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.bool))

    @staticmethod
    def none(count: int, device: torch.device | None = None) -> Queries:
        """Nothing asked yet. The counters belong on the device of the images: elsewhere each question would wait."""
        nothing = torch.zeros(count, dtype=torch.int64, device=device)
        return Queries(nothing, nothing.clone(), broken=torch.zeros((), dtype=torch.bool, device=device))


@dataclass(frozen=True)
class ImageVictim:
    """Images in, outputs (logits or embeddings) out, for the samples of one batch. Any callable on images makes one.
    Whatever number format the callable answers in, its outputs are read in float32.

    Args:
        answer: the function itself, differentiable or not.
        queries: counts the questions of each sample.
        seeds: one key per sample: a random model draws its noise from them, anew at each question.
        rows: which samples of the batch these are; all, if None.
        draw: instead of being new at each question, the noise is that of this number.
        elsewhere: how many of the questions about each sample of the batch do not count where the noise is numbered,
            because they were asked for another attack; none, if not given.
        aside: what is climbed beside the goal, a value for each image: a second aim, of which the goal knows nothing
            and which decides neither success nor merit. It is asked in the same draw as the answer, and counts as a
            gradient of its own.
    """

    answer: Callable[[Images], Tensor]
    queries: Queries | None = None
    seeds: Seeds | None = None
    rows: Tensor | None = None
    draw: int | None = None
    elsewhere: Labels | None = None
    aside: Callable[[Images], PerImage] | None = None

    def __call__(self, images: Images) -> Tensor:
        """The outputs, without a gradient."""
        with torch.no_grad(), self._asked("forwards", len(images)):
            outputs = self.answer(images).float()
        self.note(outputs.isnan())
        return outputs

    def ascend(self, images: Images, goal: Goal) -> tuple[Images, PerImage, Tensor]:
        """The gradient of the goal's loss with respect to the pixels, the loss and the outputs, all detached.

        The losses are summed, never averaged, and the gradient is taken of the pixels alone: no parameter gets a
        `.grad`.
        """
        pixels = images.detach().requires_grad_(True)
        with torch.enable_grad(), self._asked("gradients", len(images), 1 if self.aside is None else 2):
            again = replay()
            outputs = self.answer(pixels).float()
            losses = goal.loss(outputs)
            if self.aside is not None:
                with again():
                    losses = losses + self.aside(pixels)
            total = losses.sum()
            if not total.requires_grad:
                raise CrossguardError(
                    "no gradient leads from the answer to the pixels: put the step that has none into a Purifier, so "
                    "that gradients go around it (BPDA), or attack with Square(), RayS() or Blind(...)"
                )
            (gradient,) = torch.autograd.grad(total, pixels)
        self.note(~losses.detach().isfinite())
        return gradient, losses.detach(), outputs.detach()

    def heard(self, outputs: Tensor, goal: Goal) -> tuple[Mask, PerImage]:
        """Which of the images that were just asked about have won, by their outputs, and their merit."""
        return goal.won(outputs), goal.merit(outputs)

    def judge(self, images: Images, goal: Goal) -> tuple[Mask, PerImage]:
        """Whether these images have won, and their merit.

        A victim that draws noise is asked `DRAWS` times, with the same draws whatever the images are, so that the
        results of several searches can be compared: an image has won where most answers say so, and its merit is the
        mean. What a search says of its own best image is of no use there, since the more draws a search has seen, the
        luckier is its luckiest.
        """
        wins, merits = torch.zeros(len(images), device=images.device), torch.zeros(len(images), device=images.device)
        count = 0
        while count == 0 or (count < DRAWS and not self.steady):
            outputs = replace(self, draw=count)(images)
            wins, merits, count = wins + goal.won(outputs), merits + goal.merit(outputs), count + 1
        return 2 * wins > count, merits / count

    def check(self) -> None:
        """Raises if a number was not finite. Reading that makes the program wait for an accelerator."""
        if self.queries is not None:
            _refuse(self.queries.broken)

    @property
    def steady(self) -> bool:
        """Whether it is known to answer the same question alike: it was lent noise and has used none so far."""
        return self.seeds is not None and self.queries is not None and not self.queries.drew

    def at(self, keep: Tensor) -> ImageVictim:
        """The same victim for some of the samples (a mask or indices)."""
        count = len(self.queries.forwards) if self.queries is not None else 0 if self.seeds is None else len(self.seeds)
        if not count:
            return self
        rows = torch.arange(count, device=keep.device) if self.rows is None else self.rows
        return replace(self, rows=rows[keep])

    def drawing_from(self, seeds: Seeds) -> ImageVictim:
        """The same victim with noise of its own for each sample, unless it has that already, on the device of these
        keys; and with counters, unless it has some."""
        own = seeds if self.seeds is None else self.seeds.to(seeds.device)
        return replace(self, seeds=own, queries=self.queries or Queries.none(len(own), own.device))

    def keys(self) -> Seeds:
        """The keys of the noise of the next question, one for each sample; only where there are seeds and counters."""
        assert self.seeds is not None and self.queries is not None
        seeds = self.seeds if self.rows is None else self.seeds[self.rows]
        if self.draw is not None:
            return fold(fold(seeds, _COMMON), self.draw)
        asked = self.asked()
        asked = asked if self.rows is None else asked[self.rows.to(asked.device)]
        return fold(seeds, asked.to(seeds.device))

    def asked(self) -> Labels:
        """The number of the next question about each sample of the batch, from which its noise follows; only where
        there are counters."""
        assert self.queries is not None
        asked = self.queries.forwards + self.queries.gradients
        return asked if self.elsewhere is None else asked - self.elsewhere

    def numbered(self, asked: Labels) -> ImageVictim:
        """The same victim, where the next question about each sample of the batch has this number, and those that
        follow count on from it."""
        assert self.queries is not None
        return replace(self, elsewhere=self.queries.forwards + self.queries.gradients - asked)

    def note(self, broken: Tensor) -> None:
        """Remembers whether anything is broken, for `check`; without counters there is no later, so it is checked."""
        if self.queries is None:
            _refuse(broken.any())
        else:
            self.queries.broken = self.queries.broken.to(broken.device) | broken.any()

    @contextmanager
    def _asked(self, kind: str, count: int, questions: int = 1) -> Iterator[None]:
        """Counts questions about `count` images, or several views of each, and lends their noise to the model."""
        if self.queries is None:
            yield
            return
        counter: Tensor = getattr(self.queries, kind)
        samples = len(counter) if self.rows is None else len(self.rows)
        if count != samples and (samples == 0 or count == 0 or count % samples):
            raise CrossguardError(
                f"the victim of {samples} samples was asked about {count} images; ask about all of them or the same "
                "number of views of each, or take a part of the victim first: victim.at(rows)"
            )
        times = questions * (count // samples if samples else 1)
        if self.rows is None:
            counter += times
        else:
            counter[self.rows.to(counter.device)] += times
        if self.seeds is None:
            yield
            return
        with drawing(self.keys()) as lent:
            yield
        self.queries.drew |= lent.used


def _refuse(broken: Tensor) -> None:
    if bool(broken):
        raise CrossguardError("the victim answered with numbers that are not finite (NaN or infinity)")


_COMMON = 5000  # sets the draws that all images are compared by apart from those of a search


@runtime_checkable
class TextVictim(Protocol):
    """Strings in, raw embeddings out, shape (n, d), in as few forwards as memory allows."""

    def __call__(self, texts: Sequence[str], /) -> Embeddings: ...


@dataclass(frozen=True)
class PairVictim:
    """What an attack may ask where images meet texts, for the samples of one batch.

    `before` answers images against the clean texts, `after` against the texts as the attack rewrote them; `encode`
    gives the images' raw embeddings. All share one counter. `classes` gives the embeddings of the rewritten texts, one
    for each class; few attacks ask for them.
    """

    before: ImageVictim
    after: ImageVictim
    encode: ImageVictim
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
        seen: what the gallery is to another answer of the model, such as that without its defenses.
    """

    encode: ImageVictim
    texts: TextVictim
    gallery: Gallery
    rows: Labels
    captions: Owners
    owners: Owners
    goal: str = "rank"
    seen: Callable[[Answer], Gallery] | None = None

    def without(self, defenses: int | None = None) -> MatchVictim:
        """The same without so many defenses, from the outside in (all, if None): images and gallery as they are to the
        model inside."""
        answer = self.encode.answer
        if not isinstance(answer, Answer) or answer.inner is None or self.seen is None:
            return self
        bare = answer.without(defenses)
        return replace(self, encode=replace(self.encode, answer=bare), gallery=self.seen(bare))

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
        """What an attack on the images of the batch climbs while the captions have these embeddings. Nobody leaves,
        since who has lost the first place can still lose the fifth and the tenth."""
        goal: Goal = Drift(self.clean_images)
        if self.goal != "drift":
            goal = self.gallery.lost_images(self.rows, captions, self.owners)
        return goal.lasting()

    def against_texts(self, images: Embeddings) -> Goal:
        """What an attack on the captions of the batch climbs while the images have these embeddings."""
        if self.goal == "drift":
            return Drift(self.clean_texts)
        return self.gallery.lost_texts(self.rows[self.owners], images[self.owners])


@dataclass(frozen=True)
class Made:
    """What a search hands back: the images, and what it knows of them, so that nobody has to ask again.

    Args:
        won: which of them have reached the goal; None, where the search has not asked the victim about these very
            images, with this goal, at full precision.
        merit: what makes one stronger than another of equal success (`Goal.merit`); None as well.
    """

    images: Images
    won: Mask | None = None
    merit: PerImage | None = None


@dataclass
class Found:
    """The strongest image of each sample so far: of those that have won the one of most merit, or else of the others.

    Args:
        ends: who has won is done: what it has is kept, however long it goes on to be asked about.
    """

    images: Images
    won: Mask
    merit: PerImage
    ends: bool

    @staticmethod
    def nothing(clean: Images, ends: bool) -> Found:
        count = len(clean)
        won = torch.zeros(count, dtype=torch.bool, device=clean.device)
        return Found(clean.clone(), won, clean.new_full((count,), -torch.inf), ends)

    def open(self) -> Tensor:
        """The samples that are still worth attacking, in ascending order."""
        return (~self.won).nonzero()[:, 0] if self.ends else torch.arange(len(self.won), device=self.won.device)

    def starts(self, count: int, seeds: Seeds) -> Iterator[tuple[int, Tensor, Seeds]]:
        """For each of `count` starts its number, the samples that are still worth attacking, and their noise."""
        for start in range(count):
            rows = self.open()
            if len(rows) == 0:
                return
            yield start, rows, (fold(seeds, start) if start else seeds)[rows]

    def offer(self, rows: Tensor, images: Images, won: Mask, merit: PerImage) -> Mask:
        """Keeps, of these candidates for the samples at `rows` (ascending), those that are stronger than what there
        is; says which. Nothing here waits for an accelerator."""
        here: Tensor | slice = slice(None) if len(rows) == len(self.won) else rows
        before = self.won[here]
        better = (won & ~before) | ((merit > self.merit[here]) & (won == before))
        if self.ends:
            better = better & ~before
        if here is rows:
            self.images[rows] = torch.where(per_image(better), images, self.images[rows])
        else:  # in place: a copy of a whole batch of large images is worth avoiding
            torch.where(per_image(better), images, self.images, out=self.images)
        self.merit[here] = torch.where(better, merit, self.merit[here])
        self.won[here] = before | (won & better)
        return better

    def take(self, rows: Tensor, made: Made, victim: ImageVictim, goal: Goal) -> Mask:
        """Offers what a search made for the samples at `rows`; says what was kept. The victim (of these samples, as
        the goal is) is asked only where the search knows nothing, and where the victim draws noise."""
        won, merit = made.won, made.merit
        if won is None or merit is None or not victim.steady:
            won, merit = victim.judge(made.images, goal)
        return self.offer(rows, made.images, won, merit)

    def made(self) -> Made:
        return Made(self.images, self.won, self.merit)


WHITE, GRAY = "white box", "gray box"
_SEES = {"gradients": WHITE, "scores": "black box, scores", "decisions": "black box, decisions"}


def known(attacks: Sequence[Attack]) -> str:
    """What is known where several attacks are tried: what the one that knows most does, and all its ways."""
    said = [attack.knows for attack in attacks]
    for level in (WHITE, GRAY, *_SEES.values()):
        ways = [one.removeprefix(level).removeprefix(", ") for one in said if one.startswith(level)]
        if ways:
            return ", ".join([level, *dict.fromkeys(way for way in ways if way)])
    raise ValueError(f"none of {said} is a way of knowing")


_BUDGETS: dict[tuple[str, ...], str] = {("image",): "'Linf(8/255)'", ("text",): "'Words(1)'"}  # what to try


class Attack(Word, ABC):
    """How an adversary searches. Where classes have prompts, a task calls `rewrite` once for all its texts and
    `perturb` for every batch of images; where images have captions, `match` for every batch of both. What an attack
    does not touch comes back as it was. `on` says which parts of a budget it spends, `sees` what of the victim it asks
    for."""

    on: ClassVar[tuple[str, ...]] = ()
    sees: ClassVar[str] = "gradients"  # of the victim; or "scores", or "decisions" alone

    @property
    def needs_classes(self) -> bool:
        """Whether its images must be of classes, not of captions."""
        return False

    @property
    def knows(self) -> str:
        """What its adversary knows of the model, for the report: what its parts know, or what it `sees`."""
        return known(self._parts) if self._parts else _SEES[self.sees]

    @property
    def _parts(self) -> list[Attack]:
        """The attacks that it is made of, those on images if there are any."""
        held = [getattr(self, item.name) for item in fields(self)] if is_dataclass(self) else []
        flat = [one for item in held for one in (item if isinstance(item, tuple) else (item,))]
        parts = [one for one in flat if isinstance(one, Attack)]
        return [one for one in parts if isinstance(one, ImageAttack)] or parts

    def rewrite(
        self,
        victim: TextVictim,
        texts: Sequence[str],
        budget: Budget,
        rivals: Sequence[AbstractSet[str]],
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

    @property
    def hears(self) -> bool:
        """Whether it asks its victim who has won (`ImageVictim.heard`), and lets those go if the goal ends there."""
        return False

    @property
    def draws(self) -> bool:
        """Whether it draws noise of its own, so that a second run of it, with other keys, may find something else. One
        that is made of attacks does where one of them does."""
        parts = [part for part in self._parts if isinstance(part, ImageAttack)]
        return not parts or any(part.draws for part in parts)

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
        goal: Goal | Labels,
        budget: PixelBudget,
        seeds: Seeds | None = None,
    ) -> Images:
        """Adversarial images, detached, of the shape of `clean`.

        Args:
            victim: any callable on images.
            clean: float32 in [0, 1].
            goal: labels alone stand for `Untargeted(labels)`.
            seeds: one key per sample for its noise; if not given, by position in the batch, or inside a defense that
                was lent keys, of these.
        """
        return self.craft(victim, clean, goal, budget, seeds).images

    def craft(
        self,
        victim: ImageVictim | Callable[[Images], Tensor],
        clean: Images,
        goal: Goal | Labels,
        budget: PixelBudget,
        seeds: Seeds | None = None,
    ) -> Made:
        """The adversarial images, with what the search knows of them."""
        case = self.ready(victim, clean, goal, budget, seeds)
        made = self.search(case.victim, case.clean, case.goal, budget, case.seeds)
        if isinstance(made, Tensor):  # an attack of somebody's own, which knows nothing else
            made = Made(made)
        case.victim.check()
        return replace(made, images=made.images.detach())

    def ready(
        self,
        victim: ImageVictim | Callable[[Images], Tensor],
        clean: Images,
        goal: Goal | Labels,
        budget: PixelBudget,
        seeds: Seeds | None,
    ) -> Case:
        """What a search needs, or one sentence about what cannot be: a budget that this attack cannot spend, images
        that are none, a goal for another number of them."""
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
        check_gradients()
        check_images(clean)
        if not isinstance(victim, ImageVictim):
            victim = ImageVictim(victim)
        _check_mode(victim.answer)
        if not isinstance(goal, Goal):
            goal = Untargeted(_labels(goal, clean.device))
        _check_counts(goal, len(clean), "images")
        clean = clean.clone() if clean.is_inference() else clean.detach()
        seeds = inherited(len(clean), type(self).__name__, self.draws) if seeds is None else seeds
        return Case(victim.drawing_from(seeds.to(clean.device)), clean, goal, seeds.to(clean.device))

    @abstractmethod
    def search(self, victim: ImageVictim, clean: Images, goal: Goal, budget: PixelBudget, seeds: Seeds) -> Made:
        """The attack itself; in place of `Made(images)` the images alone will do. It may be told by `goal.ends` that
        who has won is done; `Found` keeps the strongest."""


@dataclass(frozen=True)
class Case:
    """What a search is given: everything on one device, and checked."""

    victim: ImageVictim
    clean: Images
    goal: Goal
    seeds: Seeds


class TextAttack(Attack):
    """An attack on strings: `attack(victim, clean, goal, budget)` returns strings inside the budget."""

    on = ("text",)

    def redrawn(self, number: int) -> TextAttack:
        """The same attack with other random draws; itself, where it draws nothing. A training asks for it with a number
        of each step."""
        del number
        return self

    def rewrite(
        self,
        victim: TextVictim,
        texts: Sequence[str],
        budget: Budget,
        rivals: Sequence[AbstractSet[str]],
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
        rivals: Sequence[AbstractSet[str]] | None = None,
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
        rivals: Sequence[AbstractSet[str]],
    ) -> list[str]: ...


def altered(
    answer: Callable[[Images], Tensor], change: Callable[[Callable[[Images], Tensor]], Callable[[Images], Tensor]]
) -> Callable[[Images], Tensor]:
    """The function asked in another way (`Answer.altered`); what it knows of its defenses stays."""
    return answer.altered(change) if isinstance(answer, Answer) else change(answer)


def check_images(clean: object) -> None:
    """Refuses what is no batch of images: float32 of shape (n, 3, h, w) in [0, 1]."""
    wanted = "attacks need a torch tensor of shape (n, 3, h, w), float32, in [0, 1]"
    if not isinstance(clean, Tensor):
        raise CrossguardError(f"{wanted}, not a {type(clean).__name__}; torch.from_numpy(...) makes one of an array")
    if clean.ndim != 4:
        raise CrossguardError(f"{wanted}, not of shape {tuple(clean.shape)}; a single image is images[None]")
    if clean.dtype != torch.float32:
        how = ".float()" if clean.dtype.is_floating_point else ".float() / 255"
        raise CrossguardError(f"{wanted}, not {str(clean.dtype).removeprefix('torch.')}; give images{how}")
    if clean.numel():
        low, high = (float(bound) for bound in clean.detach().aminmax())
        if not (low >= -1e-6 and high <= 1.0 + 1e-6):
            raise CrossguardError(
                f"{wanted}, and these pixels go from {low:.6g} to {high:.6g}; divide images of 0 to 255 by 255, and "
                "leave normalization to the victim"
            )


def _labels(given: object, device: torch.device) -> Labels:
    """Labels as goals want them; refuses what is none."""
    wanted = "labels are a torch tensor of whole numbers, one for each image"
    if not isinstance(given, Tensor):
        how = "" if isinstance(given, int | str | None) else ": torch.as_tensor(labels)"
        raise CrossguardError(
            f"{wanted}{how}, not a {type(given).__name__}; else give a goal such as Targeted(classes)"
        )
    if given.ndim != 1:
        how = "; of scores or one-hot rows they are scores.argmax(1)" if given.ndim == 2 else ""
        raise CrossguardError(f"{wanted}, not of shape {tuple(given.shape)}{how}")
    if given.dtype.is_floating_point or given.dtype.is_complex or given.dtype == torch.bool:
        raise CrossguardError(f"{wanted}, not {str(given.dtype).removeprefix('torch.')}; give labels.long()")
    return given.to(device, torch.int64)


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
    """Refuses labels that are too few: they would be an index out of range in the middle of a search."""
    for given in goal.counts():
        if given != count:
            raise CrossguardError(f"{type(goal).__name__} has {given} entries for {count} {what}; give it one for each")


def spelled(word: Attack | Budget) -> str:
    """The word as a user would write it; what is no word (a class of one's own) as Python shows it."""
    try:
        return show(word, short=True)
    except WordError:
        return str(word)
