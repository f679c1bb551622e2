"""Attacks on images and texts together, composed of the attacks they are given."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.attacks.base import (
    Attack,
    Found,
    ImageAttack,
    ImageVictim,
    Made,
    MatchVictim,
    PairVictim,
    TextAttack,
    TextVictim,
    altered,
)
from crossguard.attacks.gradient import PGD
from crossguard.attacks.text import Substitute
from crossguard.budgets import Budget, PixelBudget, TextBudget
from crossguard.errors import CrossguardError
from crossguard.gallery import Away, grouped
from crossguard.goals import Drift, Goal, Targeted, classification
from crossguard.seeds import drawn, fold, normal
from crossguard.shapes import Embeddings, Images, Seeds

_ROUND = 2000  # sets the noise of the n-th round apart from that of restarts and of attacks in turn


class JointAttack(Attack):
    """An attack that changes images and texts, each by an attack of its own.

    Class prompts are rewritten once for all images, so there the text attack comes first and only drifts; captions are
    their image's own, and both sides can answer each other.
    """

    on = ("image", "text")
    image: ImageAttack
    text: TextAttack

    def rewrite(
        self,
        victim: TextVictim,
        texts: Sequence[str],
        budget: Budget,
        rivals: Sequence[AbstractSet[str]],
        goal: Goal | None = None,
    ) -> list[str]:
        return self.text.rewrite(victim, texts, budget, rivals, goal)

    @abstractmethod
    def perturb(self, victim: PairVictim, images: Images, goal: Goal, budget: Budget, seeds: Seeds) -> Images: ...

    @abstractmethod
    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]: ...

    def budgets(self, budget: Budget) -> tuple[PixelBudget, TextBudget]:
        """Both parts of the budget; raises where one is missing."""
        pixels, words = self.spends(budget)
        assert pixels is not None and words is not None
        return pixels, words


@dataclass(frozen=True)
class Independent(JointAttack):
    """Image and text attacked apart, each for the task's own goal, and put together: the "multimodal attack" of the
    MMCoA paper. `SepAttack` is its label-free relative.

    The image is crafted against the clean texts, so it never learns how the texts will change, and the pair can be
    weaker than the image attack alone (in the paper's own Table I, CLIP on CIFAR10: 9.32 under image attack, 11.65
    under both). The image does not stop at the boundary of the clean texts: the one that counts is another.
    """

    image: ImageAttack = field(default_factory=PGD)
    text: TextAttack = field(default_factory=Substitute)

    def perturb(self, victim: PairVictim, images: Images, goal: Goal, budget: Budget, seeds: Seeds) -> Images:
        pixels, _ = self.budgets(budget)
        return self.image(victim.before, images, goal.lasting(), pixels, seeds)

    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]:
        made, _ = self.image.match(victim, images, texts, budget, seeds)
        return made, self.text.match(victim, images, texts, budget, seeds)[1]


@dataclass(frozen=True)
class Joint(JointAttack):
    """The image attacked against the rewritten texts, and the worse of that and the independent pair for each image.

    Ours, not from a paper. No image that `Independent` of the same parts and seed beats on the model it is crafted on
    stands here, under class prompts. Where images have captions the two are compared among the others' clean images
    and captions: a pair that has lost all its first places counts before one that has not, and the larger loss counts
    among equals.
    """

    image: ImageAttack = field(default_factory=PGD)
    text: TextAttack = field(default_factory=Substitute)

    def perturb(self, victim: PairVictim, images: Images, goal: Goal, budget: Budget, seeds: Seeds) -> Images:
        pixels, _ = self.budgets(budget)
        seeds = seeds.to(images.device)
        found, after = Found.nothing(images, goal.ends), victim.after.drawing_from(seeds)
        apart = self.image(victim.before, images, goal.lasting(), pixels, seeds)
        found.take(torch.arange(len(images), device=images.device), Made(apart), after, goal)
        rows = found.open()
        if len(rows):
            asked, left = after.at(rows), goal.at(rows)
            found.take(rows, self.image.craft(asked, images[rows], left, pixels, seeds[rows]), asked, left)
        return found.images

    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]:
        pixels, words = self.budgets(budget)
        made = self.text(victim.texts, texts, victim.against_texts(victim.clean_images), words)
        before, after = (victim.against_images(now) for now in (victim.clean_texts, victim.embedded(made)))
        seeds = seeds.to(images.device)
        found, encode = Found.nothing(images, after.ends), victim.encode.drawing_from(seeds)
        for goal in (after,) if victim.goal == "drift" else (before, after):  # a drift does not see the captions
            image = self.image.craft(encode, images, goal, pixels, seeds)
            found.take(found.open(), image if goal is after else Made(image.images), encode, after)
        return found.images, made


@dataclass(frozen=True)
class SepAttack(JointAttack):
    """Image and text attacked apart, each away from its own clean embedding, without labels: Sep-Attack in the code of
    Co-Attack (Zhang et al. 2022) and the baseline of SGA (Lu et al. 2023).

    Their image attack climbs a Kullback-Leibler divergence of embeddings, which ranks like the cosine here (`Drift`).
    """

    image: ImageAttack = field(default_factory=lambda: PGD(steps=10, step=0.125))
    text: TextAttack = field(default_factory=Substitute)

    def perturb(self, victim: PairVictim, images: Images, goal: Goal, budget: Budget, seeds: Seeds) -> Images:
        pixels, _ = self.budgets(budget)
        return self.image(victim.encode, images, Drift(victim.encode(images)), pixels, seeds)

    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]:
        pixels, words = self.budgets(budget)
        made = self.image(victim.encode, images, Drift(victim.clean_images), pixels, seeds)
        return made, self.text(victim.texts, texts, Drift(victim.clean_texts), words)


@dataclass(frozen=True)
class CoAttack(JointAttack):
    """First the text drifts, then the image is driven away from its clean embedding and, `alpha` times as strongly,
    from the adversarial text: Co-Attack (Zhang et al. 2022) in its form for CLIP, formula and settings from the
    released code.

    The paper has one caption for each image; with several, each has an equal share of `alpha`. Under class prompts the
    text is the prompt of the true class, as in the evaluation of MMCoA: the label is told to the attack.

    With all its quirks the released code is `CoAttack(PGD(steps=10, step=0.125, best=False, stop=False),
    Substitute(coattack_compat=True), divergence=True, last_caption=True, nonnegative_start=True)`.

    Args:
        image: 10 steps of 1.25 / 10 of the budget, as in the released code.
        alpha: weight of the text.
        divergence: climb Kullback-Leibler divergences of softmaxed unit embeddings instead of 1 - cosine.
        last_caption: with several captions, attack the image against the last of them only. The released code attacks
            the image once for each caption and keeps what was written last.
        nonnegative_start: start from noise in [0, eps] instead of [-eps, eps], as the released code does.
    """

    image: ImageAttack = field(default_factory=lambda: PGD(steps=10, step=0.125))
    text: TextAttack = field(default_factory=Substitute)
    alpha: float = 3.0
    divergence: bool = False
    last_caption: bool = False
    nonnegative_start: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha < float("inf"):
            raise CrossguardError(f"CoAttack(alpha={self.alpha}) is not possible; give 0 or more, such as 3")
        if self.nonnegative_start and not isinstance(self.image, PGD):
            raise CrossguardError("CoAttack(nonnegative_start=True) is about the start of PGD; give image=PGD(...)")

    def perturb(self, victim: PairVictim, images: Images, goal: Goal, budget: Budget, seeds: Seeds) -> Images:
        own, there = _of_class(victim, goal, "CoAttack")
        return self._away(victim.encode, victim.encode(images), images, own, there, budget, seeds)

    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]:
        _, words = self.budgets(budget)
        made = self.text(victim.texts, texts, Drift(victim.clean_texts), words)
        own, there = grouped(victim.embedded(made), victim.owners, len(images))
        if self.last_caption:
            last = there.sum(1) - 1
            there = F.one_hot(last, there.shape[1]).bool()
        return self._away(victim.encode, victim.clean_images, images, own, there, budget, seeds), made

    def _away(
        self,
        victim: ImageVictim,
        clean: Embeddings,
        images: Images,
        captions: Tensor,
        there: Tensor,
        budget: Budget,
        seeds: Seeds,
    ) -> Images:
        pixels, _ = self.budgets(budget)
        shares = self.alpha * there / there.sum(1, keepdim=True)
        weights = torch.cat([torch.ones_like(shares[:, :1]), shares], 1)
        goal = Away(torch.cat([clean.float()[:, None], captions.float()], 1), weights, self.divergence)
        attack = self.image
        if self.nonnegative_start and isinstance(attack, PGD):
            attack = replace(attack, nonnegative_start=True)
        return attack(victim, images, goal, pixels, seeds)


@dataclass(frozen=True)
class SGA(JointAttack):
    """Set-level guidance attack (Lu et al. 2023): captions away from their clean image, the image, in several sizes,
    away from all its captions, and the captions, from clean again, away from the adversarial image.

    Settings of the released code: 10 steps of a quarter of the budget from a random start, one word of ten candidates,
    and beside the image itself four views: noise of 0.05, then resized by 0.5, 0.75, 1.25 and 1.5 and back. The noise
    of the views is fresh in every step. With its quirks (the last iterate counts, candidates are those of the word in
    front) that code is `SGA(PGD(best=False, stop=False), Substitute(coattack_compat=True))`, but for one thing: it
    visits first the words whose loss moves the caption most, here those whose loss moves it farthest from the image.

    Class prompts belong to no single image, so there the first and last step are one, drift, and the set of an image is
    the prompt of its class: a reconstruction.

    Args:
        scales: of the views beside the image itself; none makes it one view.
        noise: standard deviation of the noise on them, in pixels of [0, 1].
    """

    image: ImageAttack = field(default_factory=PGD)
    text: TextAttack = field(default_factory=Substitute)
    scales: tuple[float, ...] = (0.5, 0.75, 1.25, 1.5)
    noise: float = 0.05

    def __post_init__(self) -> None:
        if any(not 0.0 < scale <= 8.0 for scale in self.scales):
            raise CrossguardError(f"SGA(scales={self.scales}) is not possible; give factors such as 0.5 or 1.25")
        if not 0.0 <= self.noise <= 1.0:
            raise CrossguardError(f"SGA(noise={self.noise}) is not possible; give 0 to 1, such as 0.05")

    def perturb(self, victim: PairVictim, images: Images, goal: Goal, budget: Budget, seeds: Seeds) -> Images:
        return self._away(victim.encode, images, *_of_class(victim, goal, "SGA"), budget, seeds)

    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]:
        first = self._text(victim, texts, victim.clean_images, budget)
        own, there = grouped(victim.embedded(first), victim.owners, len(images))
        made = self._away(victim.encode, images, own, there, budget, seeds)
        return made, self._text(victim, texts, victim.encode(made), budget)

    def _text(self, victim: MatchVictim, texts: Sequence[str], images: Embeddings, budget: Budget) -> list[str]:
        _, words = self.budgets(budget)
        own = images[victim.owners][:, None]
        return self.text(victim.texts, texts, Away(own, own.new_ones(own.shape[:2])), words)

    def _away(
        self, victim: ImageVictim, images: Images, captions: Tensor, there: Tensor, budget: Budget, seeds: Seeds
    ) -> Images:
        pixels, _ = self.budgets(budget)
        views = replace(victim, answer=altered(victim.answer, self._views)) if self.scales else victim
        return self.image(views, images, Away(captions, there.float()), pixels, seeds)

    def _views(self, encode: Callable[[Images], Embeddings]) -> Callable[[Images], Embeddings]:
        """The embeddings of the image and of its other sizes, side by side."""

        def answer(images: Images) -> Embeddings:
            found, size = [encode(images)], images.shape[-2:]
            seeds = drawn(len(images), "SGA") if self.noise else None
            for number, scale in enumerate(self.scales):
                view = images
                if seeds is not None:
                    view = images + self.noise * normal(fold(seeds, number), images.shape[1:], images.device)
                smaller = [max(1, int(scale * side)) for side in size]
                view = F.interpolate(view, smaller, mode="bicubic", align_corners=False).clamp(0.0, 1.0)
                found.append(encode(F.interpolate(view, size, mode="bicubic", align_corners=False).clamp(0.0, 1.0)))
            return torch.cat(found, 1)

        return answer


@dataclass(frozen=True)
class Alternating(JointAttack):
    """Captions and image answer each other until neither gains: the captions attacked against the image as it is, the
    image against the captions as they are, each for the task's own goal, and the strongest pair of all is kept.

    Ours, not from a paper. Every round starts from the clean image and the clean captions, so that no early choice
    binds a later one; pairs are compared as in `Joint`. Class prompts are rewritten once
    for all images, which leaves nothing to alternate: there it is `Joint`.

    Args:
        rounds: at most so many; for an image it ends when its captions stay as they are.
    """

    image: ImageAttack = field(default_factory=PGD)
    text: TextAttack = field(default_factory=Substitute)
    rounds: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise CrossguardError(f"Alternating(rounds={self.rounds}) does nothing; give 1 or more")

    def perturb(self, victim: PairVictim, images: Images, goal: Goal, budget: Budget, seeds: Seeds) -> Images:
        return Joint(self.image, self.text).perturb(victim, images, goal, budget, seeds)

    def match(
        self, victim: MatchVictim, images: Images, texts: Sequence[str], budget: Budget, seeds: Seeds
    ) -> tuple[Images, list[str]]:
        pixels, words = self.budgets(budget)
        best, found = list(texts), Found.nothing(images, False)
        rows, places = found.open(), list(range(len(best)))  # what still goes on, and where its captions are
        seeds = seeds.to(images.device)
        victim = replace(victim, encode=victim.encode.drawing_from(seeds))
        clean, made = list(texts), self.text(victim.texts, texts, victim.against_texts(victim.clean_images), words)
        for number in range(self.rounds):
            captions, noise = victim.embedded(made), (fold(seeds, number + _ROUND) if number else seeds)[rows]
            goal = victim.against_images(captions)
            image = self.image.craft(victim.encode, images[rows], goal, pixels, noise)
            # The captions once more, against the image that they made: the pair of SGA's last step.
            answer = self.text(victim.texts, clean, victim.against_texts(victim.encode(image.images)), words)
            pairs = (made, image, goal), (answer, Made(image.images), victim.against_images(victim.embedded(answer)))
            owners = victim.owners.tolist()
            for pair, crafted, aim in pairs:
                gained = found.take(rows, crafted, victim.encode, aim).tolist()
                for place, new, own in zip(places, pair, owners, strict=True):
                    best[place] = new if gained[own] else best[place]
            # Each image ends on its own, whatever the others of its batch still do.
            on = {own for new, old, own in zip(answer, made, owners, strict=True) if new != old}
            if not on:
                break
            kept = [caption for caption, own in enumerate(owners) if own in on]
            clean, made = [clean[caption] for caption in kept], [answer[caption] for caption in kept]
            places = [places[caption] for caption in kept]
            keep = torch.tensor(sorted(on), device=rows.device)
            victim, rows = victim.at(keep), rows[keep]
        return found.images, best


def _of_class(victim: PairVictim, goal: Goal, attack: str) -> tuple[Tensor, Tensor]:
    """The rewritten prompt of each image's own class as the set of its captions."""
    if victim.classes is None:
        raise CrossguardError(f"{attack} needs the embeddings of the class prompts, and this victim has none")
    aim = classification(goal, attack)
    if isinstance(aim, Targeted):
        raise CrossguardError("a joint attack away from the true class needs labels, and a targeted goal has none")
    own = victim.classes()[aim.labels][:, None]
    return own, torch.ones(own.shape[:2], dtype=torch.bool, device=own.device)
