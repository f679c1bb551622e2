"""Zero-shot classification: an image is what its most similar class prompt says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from crossguard.attacks.base import Attack, ImageVictim, PairVictim, Queries
from crossguard.attacks.text import collisions
from crossguard.budgets import Budget
from crossguard.data import Dataset, Labelled, Prompts
from crossguard.errors import CrossguardError
from crossguard.goals import Endless, Goal, Untargeted
from crossguard.models.base import VisionLanguageModel
from crossguard.models.wrapper import Unrolled, Wrapper
from crossguard.seeds import drawing, fold
from crossguard.shapes import Images, Labels, Logits, Seeds
from crossguard.tasks.base import Answers, Task, Trial


@dataclass(frozen=True)
class ZeroShot(Task):
    """Classify the images of `data` by the class prompts of `data`.

    An attack on texts rewrites the prompts of all classes once, the same for every image, as in the MMCoA paper; an
    attack on images sees each image with its label.

    Args:
        templates: prompt templates with `{}` for the class name; several make an ensemble; the data's own, if empty.
    """

    data: Dataset
    templates: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, size: int, indices: Sequence[int]) -> Iterator[Labelled]:
        return self.data.batches(size, indices)

    def labels(self) -> Labels:
        return self.data.labels()

    def prepare(
        self,
        model: VisionLanguageModel,
        attack: Attack | None,
        budget: Budget | None,
        surrogate: VisionLanguageModel | None,
    ) -> Trial:
        prompts = self.data.prompts(self.templates or None)
        labels = self.labels()
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(prompts.names):
            wrong = int(labels.max()) if int(labels.max()) >= len(prompts.names) else int(labels.min())
            raise CrossguardError(f"label {wrong} is outside the list of {len(prompts.names)} class names")
        notes = _doubts(prompts)
        if attack is None:
            return _ZeroShotTrial(prompts, prompts, model, None, None, False, notes)
        if budget is None:
            raise CrossguardError(f"{attack} needs a budget, such as 'Linf(8/255)'")
        _, words = attack.spends(budget)
        crafting = model if surrogate is None else surrogate
        rivals = prompts.rivals()
        flat = attack.rewrite(crafting.encode_text, prompts.flat, budget, rivals)
        if words is not None:
            words.check(flat, prompts.flat)
            notes += _text_notes(flat, prompts, rivals)
        return _ZeroShotTrial(
            prompts, prompts.rewritten(flat), model, attack, budget, surrogate is not None, notes, crafting
        )


@dataclass
class _ZeroShotTrial(Trial):
    before: Prompts
    after: Prompts
    model: VisionLanguageModel
    attack: Attack | None
    budget: Budget | None
    elsewhere: bool  # crafted on a surrogate, judged on the model
    notes: Sequence[str] = ()
    crafting: VisionLanguageModel | None = None

    def __post_init__(self) -> None:
        same = self.before.texts == self.after.texts
        self.clean = self.model.classifier(self.before)
        self.rewritten = self.clean if same else self.model.classifier(self.after)
        crafting = self.crafting or self.model
        self.craft_before, self.craft_after = self.clean, self.rewritten
        if crafting is not self.model:
            self.craft_before = crafting.classifier(self.before)
            self.craft_after = self.craft_before if same else crafting.classifier(self.after)
        words = None
        if self.attack is not None and self.budget is not None:
            self.pixels, words = self.attack.spends(self.budget)
        self.changed = torch.zeros(len(self.before.names))  # how much of each class's prompts changed, at most
        if words is not None and self.pixels is None:
            self.changed = torch.tensor(
                [
                    float(max(words.size(new, old) for new, old in zip(after, before, strict=True)))
                    for after, before in zip(self.after.texts, self.before.texts, strict=True)
                ]
            )

    @property
    def prompts(self) -> tuple[Prompts, Prompts]:
        return self.before, self.after

    @property
    def victim(self) -> Callable[[Images], Logits]:
        return self.rewritten

    def answer(self, batch: Labelled, seeds: Seeds) -> Answers:
        device = self.model.device
        images, labels = batch.images.to(device), batch.labels.to(device)
        queries = Queries.none(len(batch))
        with torch.no_grad(), drawing(fold(seeds, _CLEAN)) as lent:
            clean = _finite(self.clean(images))
        adversarial, size = images, self.changed[batch.labels]
        if self.attack is not None and self.budget is not None:
            # Who is judged by another model, or by another draw of a random one, must not stop at the first success.
            goal: Goal = Untargeted(labels)
            goal = Endless(goal) if self.elsewhere or lent.used else goal
            adversarial = self.attack.perturb(self._victim(queries, seeds), images, goal, self.budget, seeds).to(device)
            if self.pixels is not None:
                size = self.pixels.check(adversarial, images).cpu()
        same = adversarial is images and self.rewritten is self.clean
        answer = clean.cpu() if same else self.judge(adversarial, seeds)
        return Answers(clean.cpu(), answer, adversarial, size, queries)

    def judge(self, images: Images, seeds: Seeds) -> Logits:
        with torch.no_grad(), drawing(fold(seeds, _JUDGED)):
            return _finite(self.rewritten(images.to(self.model.device))).cpu()

    def _victim(self, queries: Queries, seeds: Seeds) -> PairVictim:
        crafting = self.crafting or self.model
        noise = fold(seeds, _ATTACKED)
        return PairVictim(
            ImageVictim(self.craft_before, queries, noise),
            ImageVictim(self.craft_after, queries, noise),
            ImageVictim(crafting.encode_image, queries, noise),
            ImageVictim(crafting.gate, queries, noise) if isinstance(crafting, Wrapper | Unrolled) else None,
        )


_CLEAN, _ATTACKED, _JUDGED = -1, -2, -3  # the noise a random model draws is another for each


def _finite(logits: Logits) -> Logits:
    if not bool(torch.isfinite(logits).all()):
        raise CrossguardError(
            "the model answered with logits that are not finite; its weights or its input are damaged"
        )
    return logits.float()


def _doubts(prompts: Prompts) -> list[str]:
    twice = prompts.duplicates
    if not twice:
        return []
    return [
        f"{len(twice)} class name(s) occur more than once ({', '.join(twice[:3])}): those classes cannot be told "
        "apart, so accuracy is bounded below 100 %; give them different names"
    ]


def _text_notes(flat: list[str], prompts: Prompts, rivals: Sequence[frozenset[str]]) -> list[str]:
    clean, notes = prompts.flat, []
    struck = collisions(flat, clean, rivals)
    if any(struck):
        first = struck.index(True)
        notes.append(
            f"{sum(struck)} of {len(flat)} adversarial prompts name another class ({clean[first]!r} became "
            f"{flat[first]!r}): the right answer to them is arguable, so the number is ill-posed; forbid them with "
            "Substitute(collisions='forbid')"
        )
    same = len(flat) - len(set(flat)) - (len(clean) - len(set(clean)))
    if same > 0:
        notes.append(
            f"{same} of {len(flat)} adversarial prompts equal that of another class, so no model can tell those "
            "classes apart; a smaller word budget or another candidate source avoids it"
        )
    unchanged = sum(new == old for new, old in zip(flat, clean, strict=True))
    if unchanged:
        notes.append(f"{unchanged} of {len(flat)} prompts stayed as they were: the attack found no candidate for them")
    return notes
