"""What a task is: data, the victim that answers, the score."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crossguard.answer import Answer, Said
from crossguard.attacks.base import Attack
from crossguard.budgets import Budget, PixelBudget
from crossguard.data import Batch, Dataset, Prompts
from crossguard.errors import CrossguardError
from crossguard.goals import Goal
from crossguard.models.base import VisionLanguageModel
from crossguard.processes import ALONE, Processes
from crossguard.report import Outcomes, Ranks
from crossguard.seeds import drawing, fold, keys, normal
from crossguard.shapes import Embeddings, Images, Seeds
from crossguard.telling import tell
from crossguard.words import Word

CLEAN, ATTACKED, JUDGED = -1, -2, -3  # the noise a random model draws is another for each
AT_ONCE = 128  # images that are embedded together before the batches come
_EQUAL = 1e-5  # embeddings of unit length that differ by less are the same but for rounding
_NEIGHBORS = 3  # in the order along a direction: how many of them are compared


@dataclass(frozen=True)
class Answers:
    """What became of one batch.

    Args:
        columns: what `Trial.score` needs to know of each sample, in numbers and strings that JSON can hold.
        images: the images under attack.
        right: of each sample, whether it is answered rightly clean and under attack.
    """

    columns: Mapping[str, list[Any]]
    images: Images
    right: tuple[list[bool], list[bool]]


class Trial(ABC):
    """One model on one task under one attack: everything that is prepared once, before the batches come."""

    notes: Sequence[str] = ()
    pixels: PixelBudget | None = None  # the part of the budget that concerns pixels, where the attack spends it

    @property
    def prompts(self) -> tuple[Prompts, Prompts] | None:
        """The class prompts before and after the attack, where the task has classes."""
        return None

    @abstractmethod
    def climb(self, batch: Batch) -> tuple[Callable[[Images], Tensor], Goal]:
        """What the model says to the images of a batch, differentiable, and what an attack on them climbs: the
        strongest there is, with everything known."""

    @abstractmethod
    def answer(self, batch: Batch, seeds: Seeds) -> Answers:
        """Asks the model about a batch, before and after the attack."""

    @abstractmethod
    def judge(self, images: Images, seeds: Seeds) -> Tensor:
        """What the model says to images under attack, wherever they come from."""

    @abstractmethod
    def again(self, batch: Batch, answers: Answers, images: Images, seeds: Seeds) -> Mapping[str, list[Any]]:
        """The columns of the answers that change with these images in place of those under attack."""

    def remarks(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """What a reader should know of the answers to all samples, beside the notes."""
        del rows
        return []

    @abstractmethod
    def score(self, rows: Sequence[Mapping[str, Any]]) -> Outcomes | Ranks:
        """The outcomes, from the columns of all samples in the order of the task."""


class Task(Word, ABC):
    """Data with a victim and a score. A task prepares a trial; it does not know which attack or defense takes part in
    it."""

    data: Dataset

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self.data)

    def id(self, index: int) -> str:
        """The name of a sample, which stays the same whatever the order of the data."""
        return self.data.id(index)

    def chosen(self, limit: int | None) -> list[int]:
        """The indices of the samples that a limit asks about (`Dataset.chosen`)."""
        return self.data.chosen(limit)

    @abstractmethod
    def batches(self, size: int, indices: Sequence[int]) -> Iterator[Batch]:
        """The samples at `indices`, in order."""

    @abstractmethod
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
        """Everything that happens once: prompts are encoded and, where the attack is on texts, rewritten.

        Args:
            indices: which samples will be asked about; all, if None.
            seed: of the noise of random models.
            group: the processes that share this work; each gets the same trial.
        """


class Embedded(NamedTuple):
    """Images as a model embeds them, and for each the place of the first one with the same pixels."""

    images: Embeddings
    first: list[int]
    opened: list[dict[str, bool]]  # for each, whether each gate of the model opened

    @property
    def copies(self) -> int:
        """How many of the images have a copy among the others."""
        return sum(count for count in Counter(self.first).values() if count > 1)


def embedded(
    answer: Answer,
    device: torch.device,
    task: Task,
    indices: Sequence[int],
    seed: int,
    group: Processes = ALONE,
) -> Embedded:
    """The clean images of a task as an answer with embeddings sees them; each batch is embedded by one of the
    processes. Unless the model draws noise, equal images are equal to the bit: in another batch they would differ by
    rounding."""

    seen = 0

    def embed(rows: Sequence[int]) -> tuple[Tensor, list[bytes], list[dict[str, bool]], bool]:
        nonlocal seen
        found, digests, gates, drew = [], list[bytes](), list[dict[str, bool]](), False
        for batch in task.batches(AT_ONCE, rows):
            with torch.no_grad(), drawing(fold(keys(batch.ids, seed), CLEAN)) as lent:
                said = answer.hard(batch.images.to(device))
                found.append(finite(said.embeddings, "embeddings").cpu())
            gates += opened(said)
            drew |= lent.used
            seen += len(batch) * group.world
            tell("{} of {} images embedded", min(seen, len(indices)), len(indices))
            digests += [hashlib.sha256(image.tobytes()).digest() for image in batch.images.cpu().numpy()]
        return torch.cat(found), digests, gates, drew

    parts = group.each([indices[start : start + AT_ONCE] for start in range(0, len(indices), AT_ONCE)], embed)
    places: dict[bytes, int] = {}
    first = [places.setdefault(digest, place) for place, digest in enumerate(d for _, one, *_ in parts for d in one)]
    images = torch.cat([one for one, *_ in parts]).to(device)
    drew = any(drew for *_, drew in parts)
    gates = [gate for _, _, some, _ in parts for gate in some]
    return Embedded(images if drew else images[torch.tensor(first, device=images.device)], first, gates)


def opened(said: Said) -> list[dict[str, bool]]:
    """For each image, whether each gate of the defenses opened."""
    gates = {name: (gate > 0.0).tolist() for name, gate in said.gates.items()}
    return [{name: one[row] for name, one in gates.items()} for row in range(len(said.embeddings))]


def twins(embeddings: Embeddings) -> list[tuple[int, int]]:
    """Pairs of rows that point the same way, but for rounding: each row that has an equal one before it, with that."""
    unit = F.normalize(embeddings.detach().double().cpu(), dim=1)
    # Equal rows are neighbors in the order along any direction, so there is no need to compare all pairs.
    order = (unit @ normal(torch.tensor([1]), (unit.shape[1],))[0].double()).argsort()
    pairs: dict[int, int] = {}
    for apart in range(1, _NEIGHBORS + 1):
        one, other = order[:-apart], order[apart:]
        near = (unit[one] - unit[other]).abs().amax(1) < _EQUAL
        for pair in zip(one[near].tolist(), other[near].tolist(), strict=True):
            pairs[max(pair)] = min(*pair, pairs.get(max(pair), len(unit)))
    return sorted((low, high) for high, low in pairs.items())


def finite(outputs: Tensor, what: str = "logits") -> Tensor:
    """The outputs in float32; raises where one is not a number."""
    if not bool(torch.isfinite(outputs).all()):
        raise CrossguardError(
            f"the model answered with {what} that are not finite; its weights or its input are damaged"
        )
    return outputs.float()
