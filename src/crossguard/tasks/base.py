"""What a task is: data, the victim that answers, the score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from crossguard.attacks.base import Attack, Queries
from crossguard.budgets import Budget, PixelBudget
from crossguard.data import Labelled, Prompts
from crossguard.models.base import VisionLanguageModel
from crossguard.shapes import Images, Labels, Logits, Seeds


@dataclass(frozen=True)
class Answers:
    """What the model said to one batch, clean and attacked: logits, the images under attack, the size of each
    perturbation, the questions it took."""

    clean: Logits
    adversarial: Logits
    images: Images
    size: Tensor
    queries: Queries


class Trial(ABC):
    """One model on one task under one attack: everything that is prepared once, before the batches come."""

    notes: Sequence[str] = ()
    pixels: PixelBudget | None = None  # the part of the budget that concerns pixels, where the attack spends it

    @property
    @abstractmethod
    def prompts(self) -> tuple[Prompts, Prompts]:
        """The class prompts before and after the attack."""

    @property
    @abstractmethod
    def victim(self) -> Callable[[Images], Logits]:
        """What the model says to images, differentiable: the victim of an attack that knows everything."""

    @abstractmethod
    def answer(self, batch: Labelled, seeds: Seeds) -> Answers:
        """Asks the model about a batch, before and after the attack."""

    @abstractmethod
    def judge(self, images: Images, seeds: Seeds) -> Logits:
        """What the model says to images under attack, wherever they come from."""


class Task(ABC):
    """Data with a victim and a score. A task prepares a trial; it does not know which attack or defense takes part in
    it."""

    @abstractmethod
    def __len__(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def batches(self, size: int, indices: Sequence[int]) -> Iterator[Labelled]:
        """The samples at `indices`, in order."""

    @abstractmethod
    def labels(self) -> Labels:
        """The right answers of all samples."""

    @abstractmethod
    def prepare(
        self,
        model: VisionLanguageModel,
        attack: Attack | None,
        budget: Budget | None,
        surrogate: VisionLanguageModel | None,
    ) -> Trial:
        """Everything that happens once: prompts are encoded and, where the attack is on texts, rewritten."""
