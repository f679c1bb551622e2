"""Zero-shot classification: an image is what its most similar class prompt says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from crossguard.answer import Gates, Said, embeddings_of
from crossguard.attacks.base import Attack, ImageVictim, PairVictim, Queries
from crossguard.attacks.candidates import doubts
from crossguard.attacks.text import collisions
from crossguard.budgets import Budget
from crossguard.data import Batch, Dataset, Labelled, Prompts
from crossguard.datasets.names import unspoken
from crossguard.errors import CrossguardError
from crossguard.goals import Goal, Mismatch, Untargeted, margin
from crossguard.models.base import VisionLanguageModel
from crossguard.processes import ALONE, Processes
from crossguard.report import Outcomes, Rate
from crossguard.seeds import drawing, fold
from crossguard.shapes import Images, Labels, Logits, Seeds, TextEmbeddings
from crossguard.tasks.base import ATTACKED, CLEAN, JUDGED, Answers, Task, Trial, embedded, finite, twins
from crossguard.words import within


@dataclass(frozen=True)
class ZeroShot(Task):
    """Classify the images of `data` by the class prompts of `data`.

    An attack on texts rewrites the prompts of all classes once, the same for every image, as in the MMCoA paper; an
    attack on images sees each image with its label.

    Args:
        templates: prompt templates with `{}` for the class name; several make an ensemble; the data's own, if empty.
        text_goal: what an attack on prompts climbs: 'drift' from the clean embedding, as in the papers, or 'mismatch',
            the share of the class's own images that another prompt then gets (`Mismatch`): it sees the images that are
            asked about, and needs a single template.
    """

    data: Dataset
    templates: tuple[str, ...] = ()
    text_goal: str = "drift"

    def __post_init__(self) -> None:
        if self.text_goal not in ("drift", "mismatch"):
            raise CrossguardError(f"ZeroShot(text_goal={self.text_goal!r}) is unknown; give 'drift' or 'mismatch'")

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
        indices: Sequence[int] | None = None,
        seed: int = 0,
        group: Processes = ALONE,
    ) -> Trial:
        prompts = self.data.prompts(self.templates or None)
        labels = self.labels()
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(prompts.names):
            wrong = int(labels.max()) if int(labels.max()) >= len(prompts.names) else int(labels.min())
            raise CrossguardError(f"label {wrong} is outside the list of {len(prompts.names)} class names")
        asked = range(len(self)) if indices is None else indices
        notes = [*self.data.notes, *_doubts(prompts, model), *_unasked(self.data, asked)]
        if attack is None:
            return _ZeroShotTrial(prompts, prompts, model, None, None, False, notes)
        if budget is None:
            raise CrossguardError(f"{attack} needs a budget, such as 'Linf(8/255)'")
        _, words = attack.spends(budget)
        crafting = model if surrogate is None else surrogate
        rivals = [] if words is None else prompts.rivals()  # an attack on images asks for none
        goal = None
        if words is not None and self.text_goal == "mismatch":
            goal = self._mismatch(crafting, prompts, indices, seed, group)
        flat = prompts.flat
        if words is not None:
            flat = _rewritten(attack, crafting, prompts, budget, rivals, goal, group)
            words.check(flat, prompts.flat)
            notes += [*_text_notes(attack, flat, prompts, rivals), *doubts(attack, prompts.flat)]
        return _ZeroShotTrial(
            prompts, prompts.rewritten(flat), model, attack, budget, surrogate is not None, notes, crafting
        )

    def _mismatch(
        self,
        model: VisionLanguageModel,
        prompts: Prompts,
        indices: Sequence[int] | None,
        seed: int,
        group: Processes,
    ) -> Mismatch:
        """The goal of prompts that lose the images of their class."""
        if len(prompts.texts[0]) > 1:
            raise CrossguardError(
                f"text_goal='mismatch' needs one template, and there are {len(prompts.texts[0])}; give templates=(...,)"
            )
        rows = range(len(self)) if indices is None else indices
        answer = replace(model.answer(prompts), tell=embeddings_of)
        images = embedded(answer, model.device, self, rows, seed, group).images
        with torch.no_grad():
            texts = model.encode_text(prompts.flat)
        return Mismatch.of(images, self.labels()[list(rows)].to(texts.device), texts)


def _rewritten(
    attack: Attack,
    model: VisionLanguageModel,
    prompts: Prompts,
    budget: Budget,
    rivals: Sequence[AbstractSet[str]],
    goal: Goal | None,
    group: Processes,
) -> list[str]:
    """The prompts after an attack on texts, made once and known to all processes.

    What becomes of a prompt does not depend on the others, so each process rewrites its share; but where the attack
    compares the prompts of all classes, the first process rewrites them all.
    """
    flat = prompts.flat
    apart = goal is None and all(getattr(part, "protect", "none") == "none" for part in within(attack, Attack))
    count = min(group.world, len(flat)) if apart else 1

    def rewrite(share: slice) -> list[str]:
        return attack.rewrite(model.encode_text, flat[share], budget, rivals[share], goal)

    parts = group.each([slice(number, None, count) for number in range(count)], rewrite)
    return [parts[place % count][place // count] for place in range(len(flat))]


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
        self.clean = self.model.answer(self.before)
        self.rewritten = self.clean if same else self.model.answer(self.after)
        crafting = self.crafting or self.model
        self.craft_before, self.craft_after = self.clean, self.rewritten
        if crafting is not self.model:
            self.craft_before = crafting.answer(self.before)
            self.craft_after = self.craft_before if same else crafting.answer(self.after)
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

    @cached_property
    def classes(self) -> TextEmbeddings:
        return (self.crafting or self.model).class_embeddings(self.after)

    def climb(self, batch: Batch) -> tuple[Callable[[Images], Logits], Goal]:
        return self.rewritten, Untargeted(_labels(batch).to(self.model.device))

    def answer(self, batch: Batch, seeds: Seeds) -> Answers:
        device = self.model.device
        labels = _labels(batch)
        images = batch.images.to(device)
        queries = Queries.none(len(batch), device)
        with torch.no_grad(), drawing(fold(seeds, CLEAN)) as lent:
            said = self.clean.hard(images)
            clean = finite(self.clean.tell(said))
        adversarial, size = images, self.changed[labels]
        if self.attack is not None and self.budget is not None:
            # Who is judged by another model, or by another draw of a random one, must not stop at the first success.
            redrawn = lent.used and not self.elsewhere
            goal = Untargeted(labels.to(device), ends=not (self.elsewhere or redrawn), redrawn=redrawn)
            adversarial = self.attack.perturb(self._victim(queries, seeds), images, goal, self.budget, seeds).to(device)
            if self.pixels is not None:
                size = self.pixels.check(adversarial, images).cpu()
        same = adversarial is images and self.rewritten is self.clean
        clean = clean.cpu()
        answer, after = (clean, said) if same else self._judged(adversarial, seeds)
        columns: dict[str, Tensor] = {
            "label": labels,
            "clean": clean.argmax(1),
            "adversarial": answer.argmax(1),
            "clean_margin": margin(clean, labels),
            "adversarial_margin": margin(answer, labels),
            "size": size,
            "gradients": queries.gradients,
            "forwards": queries.forwards,
        }
        rows: dict[str, list[Any]] = {name: column.detach().cpu().tolist() for name, column in columns.items()}
        if said.gates:
            rows["gates"] = _acted(said.gates, after.gates)
        return Answers(
            rows,
            adversarial,
            ((columns["clean"] == labels).tolist(), (columns["adversarial"] == labels).tolist()),
        )

    def judge(self, images: Images, seeds: Seeds) -> Logits:
        return self._judged(images, seeds)[0]

    def _judged(self, images: Images, seeds: Seeds) -> tuple[Logits, Said]:
        with torch.no_grad(), drawing(fold(seeds, JUDGED)):
            said = self.rewritten.hard(images.to(self.model.device))
            return finite(self.rewritten.tell(said)).cpu(), said

    def again(self, batch: Batch, answers: Answers, images: Images, seeds: Seeds) -> Mapping[str, list[Any]]:
        answer = self.judge(images, seeds)
        return {
            "adversarial": answer.argmax(1).tolist(),
            "adversarial_margin": margin(answer, _labels(batch)).tolist(),
        }

    def remarks(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        classes = len(self.before.names)
        clean = Rate(sum(row["clean"] == row["label"] for row in rows), len(rows))
        if clean.interval[0] > 1 / classes:
            return []
        return [
            f"the clean accuracy cannot be told from chance, which is {100 / classes:.3g} % for {classes} classes: "
            "look at the weights, the class names and their order, or ask about more samples"
        ]

    def score(self, rows: Sequence[Mapping[str, Any]]) -> Outcomes:
        return Outcomes([row["id"] for row in rows], *([row[name] for row in rows] for name in _COLUMNS))

    def _victim(self, queries: Queries, seeds: Seeds) -> PairVictim:
        noise = fold(seeds, ATTACKED)
        return PairVictim(
            ImageVictim(self.craft_before, queries, noise),
            ImageVictim(self.craft_after, queries, noise),
            ImageVictim(replace(self.craft_before, tell=embeddings_of), queries, noise),
            lambda: self.classes,
        )


_COLUMNS = (
    "label",
    "clean",
    "adversarial",
    "clean_margin",
    "adversarial_margin",
    "size",
    "gradients",
    "forwards",
)


def _acted(clean: Gates, attacked: Gates) -> list[dict[str, list[bool]]]:
    """Of each image whether each gate was open, clean and under attack."""
    both = {name: [(one[name] > 0).tolist() for one in (clean, attacked)] for name in clean}
    count = len(next(iter(both.values()))[0])
    return [{name: [before[row], after[row]] for name, (before, after) in both.items()} for row in range(count)]


def _labels(batch: Batch) -> Labels:
    assert isinstance(batch, Labelled)
    return batch.labels


def _doubts(prompts: Prompts, model: VisionLanguageModel) -> list[str]:
    twice, cut = prompts.duplicates, model.cut(prompts.flat)
    found = []
    if cut:
        found = [f"{cut} of {len(prompts.flat)} prompts are longer than the model reads; their ends are not seen"]
    texts = list(dict.fromkeys(one[0] for one in prompts.texts))  # one template does: equal names are equal in all
    with torch.no_grad():
        deaf = twins(finite(model.encode_text(texts), "embeddings"))
    if deaf:
        one, other = (texts[place] for place in deaf[0])
        found.append(
            f"{len(deaf)} of {len(texts)} different prompts have the embedding of another class ({one!r} and "
            f"{other!r}): the model cannot tell these classes apart; look at its tokenizer and at how long texts may be"
        )
    code = unspoken(prompts.names)
    if code:
        found.append(
            f"the class names are {code} ({', '.join(prompts.names[:3])}): where they stand for names, give these "
            "with classes=(...), for a model to know what is meant"
        )
    if not twice:
        return found
    return [
        *found,
        f"{len(twice)} class name(s) occur more than once ({', '.join(twice[:3])}): those classes cannot be told "
        "apart, so accuracy is bounded below 100 %; give them different names",
    ]


def _unasked(data: Dataset, indices: Sequence[int]) -> list[str]:
    missing = data.missing(indices)
    if not missing:
        return []
    return [
        f"{len(missing)} of {len(data.names)} classes have no sample among the {len(indices)} that were asked about "
        f"({', '.join(missing[:3])}{', ...' * (len(missing) > 3)}): the number says nothing about them"
    ]


def _text_notes(attack: Attack, flat: list[str], prompts: Prompts, rivals: Sequence[AbstractSet[str]]) -> list[str]:
    clean, notes = prompts.flat, []
    (search,) = [part for part in within(attack, Attack) if hasattr(part, "collisions")][:1] or [None]
    name, choice = type(search).__name__, getattr(search, "collisions", "")
    struck = collisions(flat, clean, rivals)
    if any(struck):
        first = struck.index(True)
        notes.append(
            f"{sum(struck)} of {len(flat)} adversarial prompts name another class ({clean[first]!r} became "
            f"{flat[first]!r}): the right answer to them is arguable, so the number is ill-posed"
            + (f"; forbid them with {name}(collisions='forbid')" if choice == "report" else "")
        )
    same = len(flat) - len(set(flat)) - (len(clean) - len(set(clean)))
    if same > 0:
        notes.append(
            f"{same} of {len(flat)} adversarial prompts equal that of another class, so no model can tell those "
            "classes apart"
            + "; collisions='forbid' keeps out the names of other classes, and not what these become"
            * (choice == "forbid")
            + f"; {name}(protect='class') changes only the words around the names" * hasattr(search, "protect")
        )
    unchanged = sum(new == old for new, old in zip(flat, clean, strict=True))
    if unchanged:
        notes.append(f"{unchanged} of {len(flat)} prompts stayed as they were: the attack found no candidate for them")
    return notes
