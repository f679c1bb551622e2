"""Image-text retrieval: images find their captions among all captions, captions their image among all images."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossguard.answer import Answer, Said
from crossguard.attacks.base import Attack, ImageVictim, MatchVictim, Queries, spelled
from crossguard.attacks.candidates import doubts
from crossguard.budgets import Budget, TextBudget
from crossguard.data import Batch, Dataset, Pairs
from crossguard.errors import CrossguardError
from crossguard.gallery import Gallery, image_ranks, text_ranks
from crossguard.goals import Goal
from crossguard.models.base import VisionLanguageModel
from crossguard.processes import ALONE, Processes
from crossguard.report import Ranks
from crossguard.seeds import drawing, fold
from crossguard.shapes import Embeddings, Images, Labels, Owners, Seeds, TextEmbeddings
from crossguard.tasks.base import ATTACKED, JUDGED, Answers, Task, Trial, embedded, finite, opened, twins
from crossguard.words import within


@dataclass(frozen=True)
class Retrieval(Task):
    """Find the captions of each image and the image of each caption, over the whole gallery that is asked about.

    Each image is attacked once, together with all its captions. The report gives recall at 1, 5 and 10 in both
    directions: an image is right if any of its captions is among the first k texts, a caption if its image is among the
    first k images; whoever is as similar as the right answer counts as before it. A smaller `limit` is a smaller
    gallery and an easier task.

    Args:
        captions: at most so many captions of each image, the first ones; all, if None. Flickr30k and COCO are reported
            with 5.
        goal: what attacks climb that bring no goal of their own: 'rank' (ours, the strongest: that others come first in
            the clean gallery) or 'drift' (away from the clean embedding, the label-free goal of Co-Attack's baselines).
            `SepAttack`, `CoAttack` and `SGA` have their own.
        gallery: what a query is ranked among: 'adversarial', all images and captions under attack as in the papers, or
            'clean', where only the query and its right answers are.
    """

    data: Dataset
    captions: int | None = None
    goal: str = "rank"
    gallery: str = "adversarial"

    def __post_init__(self) -> None:
        if self.captions is not None and self.captions < 1:
            raise CrossguardError(f"Retrieval(captions={self.captions}) is not possible; give 1 or more, or None")
        if self.goal not in ("rank", "drift"):
            raise CrossguardError(f"Retrieval(goal={self.goal!r}) is unknown; give 'rank' or 'drift'")
        if self.gallery not in ("adversarial", "clean"):
            raise CrossguardError(f"Retrieval(gallery={self.gallery!r}) is unknown; give 'adversarial' or 'clean'")

    def batches(self, size: int, indices: Sequence[int]) -> Iterator[Pairs]:
        left = list(indices)
        for batch in self.data.batches(size, indices):
            here, left = left[: len(batch)], left[len(batch) :]
            yield Pairs(batch.ids, batch.images, tuple(self.texts(index) for index in here))

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions of a sample; raises where there is none, or one without a word."""
        texts = self.data.captions(index)[: self.captions]
        if not texts:
            raise CrossguardError(
                f"sample {self.data.id(index)!r} has no caption, and Retrieval needs one each; for images with class "
                "labels there is ZeroShot"
            )
        if not all(text.strip() for text in texts):
            raise CrossguardError(f"sample {self.data.id(index)!r} has an empty caption; fill it or leave it out")
        return texts

    def prepare(
        self,
        model: VisionLanguageModel,
        attack: Attack | None,
        budget: Budget | None,
        surrogate: VisionLanguageModel | None,
        indices: Sequence[int] | None = None,
        seed: int = 0,
        group: Processes = ALONE,
    ) -> Trial:
        rows = list(range(len(self)) if indices is None else indices)
        if len(rows) < 2:
            raise CrossguardError(f"a retrieval among {len(rows)} image has nothing to find; ask about 2 or more")
        if attack is not None:
            if budget is None:
                raise CrossguardError(f"{attack} needs a budget, such as 'Linf(8/255)'")
            _check_attack(attack)
        listed = [self.texts(index) for index in rows]
        ids = [self.data.id(index) for index in rows]
        owners = torch.tensor([place for place, texts in enumerate(listed) for _ in texts])
        texts = [text for one in listed for text in one]
        crafting = model if surrogate is None else surrogate
        judging = seen = _seen(model, self, rows, texts, owners, seed, group)
        if crafting is not model:
            seen = _seen(crafting, self, rows, texts, owners, seed, group)
        places = {name: place for place, name in enumerate(ids)}

        def embed(answer: Answer) -> Embeddings:
            return embedded(answer, crafting.device, self, rows, seed).images

        return _RetrievalTrial(self, model, attack, budget, crafting, judging, seen, embed, places, texts)


def _check_attack(attack: Attack) -> None:
    """Refuses, before anything is embedded, an attack with a part that needs classes."""
    for part in within(attack, Attack):
        if part.needs_classes:
            raise CrossguardError(
                f"{spelled(part)} attacks a classification, and Retrieval has no classes; give PGD(), APGD(), Square() "
                "or a joint attack of these"
            )
        for name in ("collisions", "protect"):
            choice = getattr(part, name, None)
            if choice in ("forbid", "class", "template"):
                raise CrossguardError(
                    f"{name}={choice!r} is about the names of classes, and Retrieval has none; leave it out"
                )


@dataclass(frozen=True)
class _Seen:
    """A retrieval as a model sees it when nobody attacks.

    Args:
        answer: images to embeddings.
        copies: how many of the images have a copy among the others.
        opened: of each image, whether each gate of the model opened.
    """

    answer: Answer
    gallery: Gallery
    copies: int
    opened: Sequence[Mapping[str, bool]]


def _seen(
    model: VisionLanguageModel,
    task: Retrieval,
    rows: Sequence[int],
    texts: Sequence[str],
    owners: Owners,
    seed: int,
    group: Processes,
) -> _Seen:
    captions = encoded(model, texts, group)
    answer = model.answer(captions)
    images = embedded(answer, model.device, task, rows, seed, group)
    gallery = Gallery(images.images, captions, owners.to(model.device), model.logits)
    return _Seen(answer, gallery, images.copies, images.opened)


def encoded(model: VisionLanguageModel, texts: Sequence[str], group: Processes = ALONE) -> TextEmbeddings:
    """The embeddings of texts, each distinct one computed once, by one of the processes, so that equal texts are equal
    to the bit."""

    def embed(some: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return finite(model.encode_text(list(some)), "embeddings").cpu()

    places: dict[str, int] = {}
    rows = [places.setdefault(text, len(places)) for text in texts]
    distinct = list(places)
    parts = group.each([distinct[at : at + _TEXTS] for at in range(0, len(distinct), _TEXTS)], embed)
    found = torch.cat(parts).to(model.device)
    return found[torch.tensor(rows, device=found.device)]


_TEXTS = 1024  # that are embedded together


@dataclass
class _RetrievalTrial(Trial):
    task: Retrieval
    model: VisionLanguageModel
    attack: Attack | None
    budget: Budget | None
    crafting: VisionLanguageModel
    judging: _Seen
    seen: _Seen  # the same as the crafting model sees it
    embed: Callable[[Answer], Embeddings]  # the clean images, by another answer of that
    places: Mapping[str, int]  # of the samples in the gallery
    texts: Sequence[str]  # all clean captions
    words: TextBudget | None = None

    def __post_init__(self) -> None:
        if self.attack is not None and self.budget is not None:
            self.pixels, self.words = self.attack.spends(self.budget)
        self.clean = self.judging.gallery
        self.inside: dict[int, Gallery] = {}  # what the crafting model sees without defenses, by how many are left
        self.known = {text: place for place, text in enumerate(self.texts)}
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), self.clean.owners.cpu().bincount().cumsum(0)])
        self.starts = starts.tolist()  # where the captions of each image begin
        self.notes: Sequence[str] = [*self.task.data.notes, *doubts(self.attack, self.texts)]
        cut = self.model.cut(self.texts)
        if cut:
            self.notes = [
                *self.notes,
                f"{cut} of {len(self.texts)} captions are longer than the model reads; their ends are not seen",
            ]
        if self.judging.copies:
            self.notes = [
                *self.notes,
                f"{self.judging.copies} of the {len(self.places)} images have the same pixels as another one: where "
                "their captions are not the same, neither can come first, so recall is bounded below 100 %; make one "
                "sample of each image, with all its captions",
            ]
        distinct = list(self.known)
        deaf = twins(self.clean.texts[[self.known[text] for text in distinct]])
        if deaf:
            one, other = (distinct[place] for place in deaf[0])
            self.notes = [
                *self.notes,
                f"{len(deaf)} of {len(distinct)} different captions have the embedding of another one ({one!r} and "
                f"{other!r}): the model cannot tell them apart; look at its tokenizer and at how long a text may be",
            ]
        shared = len(self.texts) - len(set(self.texts))
        if shared:
            self.notes = [
                *self.notes,
                f"{shared} of {len(self.texts)} captions are word for word another one; where that is one of another "
                "image, neither can come first, so recall is bounded below 100 %",
            ]

    def climb(self, batch: Batch) -> tuple[Callable[[Images], Embeddings], Goal]:
        rows, captions, owners = self._places(batch)
        return self.judging.answer, self.clean.lost_images(rows, self.clean.texts[captions], owners)

    def answer(self, batch: Batch, seeds: Seeds) -> Answers:
        assert isinstance(batch, Pairs)
        images, texts = batch.images.to(self.model.device), batch.texts
        queries = Queries.none(len(batch), self.model.device)
        rows, captions, owners = self._places(batch)
        adversarial, made = images, texts
        if self.attack is not None and self.budget is not None:
            victim = MatchVictim(
                ImageVictim(self.seen.answer, queries, fold(seeds, ATTACKED)),
                self.crafting.encode_text,
                self.seen.gallery,
                rows,
                captions,
                owners,
                self.task.goal,
                self._gallery,
            )
            adversarial, made = self.attack.match(victim, images, texts, self.budget, seeds)
            adversarial = adversarial.to(self.model.device)
        size = torch.zeros(len(batch))
        if self.pixels is not None:
            size = self.pixels.check(adversarial, images).cpu()
        sizes = [0] * len(texts) if self.words is None else self.words.check(made, texts)
        said = None if adversarial is images else self._said(adversarial, seeds)
        seen = self.clean.images[rows] if said is None else finite(said.embeddings, "embeddings")
        after = self._embedded(made)
        parts = np.cumsum([len(one) for one in batch.captions])[:-1].tolist()
        columns: dict[str, list[Any]] = {
            "embedding": [_packed(one) for one in seen],
            "texts": _split(made, parts),
            "clean_texts": [list(one) for one in batch.captions],
            "text_size": _split(sizes, parts),
            "size": size.tolist(),
            "gradients": queries.gradients.tolist(),
            "forwards": queries.forwards.tolist(),
        }
        if self.judging.answer.gates:
            unharmed = [self.judging.opened[row] for row in rows.tolist()]
            gates = zip(unharmed, unharmed if said is None else opened(said), strict=True)
            columns["gates"] = [{name: [one[name], other[name]] for name in one} for one, other in gates]
        before = self._right(rows, self.clean.images[rows], self.clean.texts[captions], owners)
        return Answers(columns, adversarial, (before, self._right(rows, seen, after, owners)))

    def judge(self, images: Images, seeds: Seeds) -> Embeddings:
        return finite(self._said(images, seeds).embeddings, "embeddings")

    def _said(self, images: Images, seeds: Seeds) -> Said:
        with torch.no_grad(), drawing(fold(seeds, JUDGED)):
            return self.judging.answer.hard(images.to(self.model.device))

    def again(self, batch: Batch, answers: Answers, images: Images, seeds: Seeds) -> Mapping[str, list[Any]]:
        return {"embedding": [_packed(one) for one in self.judge(images, seeds)]}

    def remarks(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        made = [text for row in rows for text in row["texts"]]
        same = sum(new == old for new, old in zip(made, self.texts, strict=True))
        kept = f"{same} of {len(made)} captions stayed as they were: the attack found nothing stronger for them"
        return [*([kept] if self.words is not None and same else []), *self._collisions(made)]

    def score(self, rows: Sequence[Mapping[str, Any]]) -> Ranks:
        clean, device = self.clean, self.clean.images.device
        made = [text for row in rows for text in row["texts"]]
        images = torch.stack([_unpacked(row["embedding"]) for row in rows]).to(device)
        texts = self._embedded(made)
        owners, logits = clean.owners, self.model.logits
        among = clean if self.task.gallery == "clean" else None
        before = torch.cat(
            [
                image_ranks(clean.images, clean.texts, owners, logits),
                text_ranks(clean.images, clean.texts, owners, logits),
            ]
        )
        after = torch.cat(
            [
                image_ranks(images, texts, owners, logits, None if among is None else among.texts),
                text_ranks(images, texts, owners, logits, None if among is None else among.images),
            ]
        )
        nothing = [0] * len(made)
        names = [f"{row['id']}#{number}" for row in rows for number in range(len(row["texts"]))]
        return Ranks(
            id=[*(row["id"] for row in rows), *names],
            image=[*range(len(rows)), *owners.cpu().tolist()],
            text=[0] * len(rows) + [1] * len(made),
            clean=before.numpy(),
            adversarial=after.numpy(),
            size=[*(row["size"] for row in rows), *(float(size) for row in rows for size in row["text_size"])],
            gradients=[*(row["gradients"] for row in rows), *nothing],
            forwards=[*(row["forwards"] for row in rows), *nothing],
        )

    def _gallery(self, answer: Answer) -> Gallery:
        """What another answer of the crafting model sees when nobody attacks."""
        if answer.layers not in self.inside:
            self.inside[answer.layers] = replace(self.seen.gallery, images=self.embed(answer))
        return self.inside[answer.layers]

    def _embedded(self, made: Sequence[str]) -> TextEmbeddings:
        """Captions as the model sees them now. What is a clean caption is embedded as that, equal to the bit: computed
        in other company it would differ by rounding."""
        clean = self.clean.texts
        found = clean[torch.tensor([self.known.get(text, 0) for text in made], device=clean.device)]
        new = [place for place, text in enumerate(made) if text not in self.known]
        if new:
            found[new] = encoded(self.model, [made[place] for place in new])
        return found

    def _collisions(self, made: Sequence[str]) -> list[str]:
        """What makes a number ill-posed: captions that now say of one image what is true of another."""
        owners = self.clean.owners.tolist()
        whose: dict[str, set[int]] = {}
        for text, owner in zip(self.texts, owners, strict=True):
            whose.setdefault(text.lower(), set()).add(owner)
        struck = [
            (new, old)
            for new, old, owner in zip(made, self.texts, owners, strict=True)
            if new != old and owner not in whose.get(new.lower(), {owner})
        ]
        if not struck:
            return []
        new, old = struck[0]
        return [
            f"{len(struck)} of {len(made)} adversarial captions are word for word a caption of another image ({old!r} "
            f"became {new!r}): to find that image is no mistake, so the number is ill-posed"
        ]

    def _places(self, batch: Batch) -> tuple[Labels, Owners, Owners]:
        """Where the images and captions of a batch are in the gallery, and whose the captions are in the batch."""
        assert isinstance(batch, Pairs)
        device = self.model.device
        rows = [self.places[one] for one in batch.ids]
        captions = [place for row in rows for place in range(self.starts[row], self.starts[row + 1])]
        return torch.tensor(rows, device=device), torch.tensor(captions, device=device), batch.owners.to(device)

    def _right(self, rows: Labels, images: Embeddings, texts: TextEmbeddings, owners: Owners) -> list[bool]:
        """Which images have one of their captions before all the clean ones of others."""
        goal = self.clean.lost_images(rows, texts, owners)
        with torch.no_grad():
            return (~goal.image_lost(images)).tolist()


def _split(values: Sequence[Any], ends: Sequence[int]) -> list[list[Any]]:
    return [list(values[start:end]) for start, end in zip([0, *ends], [*ends, len(values)], strict=True)]


def _packed(embedding: Tensor) -> str:
    return base64.b64encode(embedding.detach().float().cpu().numpy().astype("<f4").tobytes()).decode("ascii")


def _unpacked(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())
