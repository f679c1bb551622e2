"""Datasets made of datasets: several as one, a part of one, the same with other prompts."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crossguard.data import Dataset, Prompts
from crossguard.datasets.pixels import check_size, fitted
from crossguard.errors import CrossguardError
from crossguard.shapes import Labels


@dataclass(frozen=True)
class Concat(Dataset):
    """Several datasets as one, one after the other, to train a CLIP from all of them.

    Classes of the same name are one class, and prompts are made from the templates of the first part; a part whose
    prompts are not made from templates (`Kept`) keeps its own. A sample that has no captions is captioned with the
    templates of its own dataset and its class name. An id is the number of the part and the id in it.

    Args:
        size: Brings every image to `size` x `size` (short side resized, middle square cut out); None keeps all sizes as
            they are, and then a batch ends wherever the size changes. A part with a `size` of its own is quicker, as it
            remembers its images resized.
    """

    parts: tuple[Dataset, ...]
    size: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._numbers)

    @property
    def templates(self) -> tuple[str, ...]:
        return self.parts[0].templates

    @property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        words: dict[str, tuple[str, ...]] = {}
        for part in self.parts:
            for word, aliases in part.aliases.items():
                words[word] = tuple(dict.fromkeys((*words.get(word, ()), *aliases)))
        return words

    @property
    def skipped(self) -> int:
        return sum(part.skipped for part in self.parts)

    @property
    def labelled(self) -> bool:
        return all(part.labelled for part in self.parts)

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for part in self.parts for note in part.notes))

    @property
    def fingerprint(self) -> str:
        told = [part.fingerprint for part in self.parts]
        return " ".join(told) if any(told) else ""

    def __len__(self) -> int:
        return self._ends[-1]

    def id(self, index: int) -> str:
        part, inner = self._find(index)
        return f"{part}/{self.parts[part].id(inner)}"

    def image(self, index: int) -> Tensor:
        part, inner = self._find(index)
        return resized(self.parts[part].image(inner), self.size)

    def stored(self, index: int) -> Tensor:
        part, inner = self._find(index)
        image = self.parts[part].stored(inner)
        # Images are resized in 8 bits; one that has its size already keeps its precision.
        return image if self.size is None or image.shape[1:] == (self.size, self.size) else self.image(index)

    def labels(self) -> Labels:
        return self._labels

    def captions(self, index: int) -> tuple[str, ...]:
        part, inner = self._find(index)
        data = self.parts[part]
        own = data.captions(inner)
        if own:
            return own
        label = int(self._labels[index])
        return tuple(template.replace("{}", self.names[label]) for template in data.templates) if label >= 0 else ()

    def prompts(self, templates: Sequence[str] | None = None) -> Prompts:
        told: dict[str, tuple[str, ...]] = {}
        for part in () if templates else self.parts:
            for name, texts in _told(part).items():
                told.setdefault(name, texts)
        prompts = Prompts.of(self.names, templates or self.templates, self.aliases)
        if not told:
            return prompts
        texts = tuple(told.get(name, made) for name, made in zip(prompts.names, prompts.texts, strict=True))
        counts = sorted({len(one) for one in texts})
        if len(counts) > 1:
            raise CrossguardError(
                f"some classes of {type(self).__name__} have {counts[0]} prompts of their own and others {counts[-1]}; "
                "give all the same templates with Prompted(...)"
            )
        return replace(prompts, texts=texts)

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        if not self.parts:
            raise CrossguardError(
                "there is nothing to put together; give datasets, as in Concat((CIFAR10(), CIFAR100()))"
            )
        check_size(self.size)
        return tuple(accumulate(len(part) for part in self.parts))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {
            name: number
            for number, name in enumerate(dict.fromkeys(name for part in self.parts for name in part.names))
        }

    @cached_property
    def _labels(self) -> Labels:
        # A class that one part lists twice becomes one class as well; label -1 (captions only) stays -1.
        tables = [torch.tensor([*(self._numbers[name] for name in part.names), -1]) for part in self.parts]
        return torch.cat([table[part.labels()] for table, part in zip(tables, self.parts, strict=True)])

    def _find(self, index: int) -> tuple[int, int]:
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)


class Over(Dataset):
    """A dataset seen through another word. What the word does not change itself is what `data` says, so that a word
    overrides one method or two and forgets nothing."""

    data: Dataset

    def __len__(self) -> int:
        return len(self.data)

    def place(self, index: int) -> int:
        """Where in `data` the sample is."""
        return index

    @property
    def names(self) -> tuple[str, ...]:
        return self.data.names

    @property
    def templates(self) -> tuple[str, ...]:
        return self.data.templates

    @property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        return self.data.aliases

    @property
    def skipped(self) -> int:
        return self.data.skipped

    @property
    def labelled(self) -> bool:
        return self.data.labelled

    @property
    def notes(self) -> tuple[str, ...]:
        return self.data.notes

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    def id(self, index: int) -> str:
        return self.data.id(self.place(index))

    def image(self, index: int) -> Tensor:
        return self.data.image(self.place(index))

    def stored(self, index: int) -> Tensor:
        return self.data.stored(self.place(index))

    def labels(self) -> Labels:
        return self.data.labels()

    def captions(self, index: int) -> tuple[str, ...]:
        return self.data.captions(self.place(index))

    def prompts(self, templates: Sequence[str] | None = None) -> Prompts:
        return self.data.prompts(templates)


@dataclass(frozen=True)
class _Part(Over):
    """Some samples of a dataset, with the ids that they have there."""

    data: Dataset
    count: int

    def __len__(self) -> int:
        return len(self._indices)

    def place(self, index: int) -> int:
        return self._indices[index]

    def labels(self) -> Labels:
        return self.data.labels()[self._indices]

    @cached_property
    def _indices(self) -> list[int]:
        return self._picked()

    @abstractmethod
    def _picked(self) -> list[int]:
        """The places of these samples in the dataset."""


@dataclass(frozen=True)
class Subset(_Part):
    """`count` samples of a dataset, with the ids that they have there; all of them, if there are no more.

    They are evenly divided among its classes and the same ones whatever the order of the data (`Dataset.chosen`).
    """

    def _picked(self) -> list[int]:
        return self.data.chosen(self.count)


@dataclass(frozen=True)
class Rest(_Part):
    """What `Subset(data, count)`, or an evaluation with that limit, leaves of a dataset, in its order: images to
    validate on, or to train on where a dataset has no test part, that are not those of the number that is reported."""

    def _picked(self) -> list[int]:
        taken = self.data.chosen(self.count) if self.count else ()
        left = sorted(set(range(len(self.data))).difference(taken))
        if not left:
            raise CrossguardError(
                f"the data have {len(self.data)} samples, of which Rest(count={self.count}) leaves none; give less"
            )
        return left


@dataclass(frozen=True)
class Prompted(Over):
    """A dataset with other prompt templates than its own."""

    data: Dataset
    templates: tuple[str, ...] = ("a photo of a {}",)  # pyright: ignore[reportIncompatibleMethodOverride]

    def prompts(self, templates: Sequence[str] | None = None) -> Prompts:
        return self.data.prompts(templates or self.templates)


def _told(part: Dataset) -> Mapping[str, tuple[str, ...]]:
    """The prompts of each class of a dataset, where they are others than its templates make."""
    if len(part.names) < 2:  # captions only, or one class, which has no prompts alone
        return {}
    own = part.prompts()
    made = Prompts.of(part.names, part.templates)
    return {} if own.texts == made.texts else dict(zip(own.names, own.texts, strict=True))


def resized(image: Tensor, size: int | None) -> Tensor:
    """A uint8 image (3, h, w) with its short side at `size` and the middle square cut out, as a decoded one is."""
    if size is None or image.shape[1:] == (size, size):
        return image
    square = fitted(Image.fromarray(image.permute(1, 2, 0).numpy()), size)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
