"""Datasets made of datasets: several as one, a part of one, the same with other prompts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crossguard.data import Dataset, spread
from crossguard.datasets.pixels import check_size, fitted, given
from crossguard.errors import CrossguardError
from crossguard.shapes import Labels


@dataclass(frozen=True)
class Concat(Dataset):
    """Several datasets as one, one after the other, to train a CLIP from all of them.

    Classes of the same name are one class; a sample that has no captions is captioned with the templates of
    its own dataset and its class name. An id is the number of the part and the id in it.

    Args:
        size: Brings every image to `size` x `size` (short side resized, middle square cut out); None keeps
            all sizes as they are, and then a batch ends wherever the size changes. A part with a `size` of
            its own is quicker, as it remembers its images resized.
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

    def __len__(self) -> int:
        return self._ends[-1]

    def id(self, index: int) -> str:
        part, inner = self._find(index)
        return f"{part}/{self.parts[part].id(inner)}"

    def image(self, index: int) -> Tensor:
        part, inner = self._find(index)
        return resized(self.parts[part].image(inner), self.size)

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

    def __getstate__(self) -> dict[str, Any]:
        return given(self)

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


@dataclass(frozen=True)
class Subset(Dataset):
    """`count` samples of a dataset, spread evenly over it, with the ids that they have there.

    They are the same ones whatever the seed, and fair to data sorted by class.
    """

    data: Dataset
    count: int

    @property
    def names(self) -> tuple[str, ...]:
        return self.data.names

    @property
    def templates(self) -> tuple[str, ...]:
        return self.data.templates

    @property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        return self.data.aliases

    def __len__(self) -> int:
        return len(self._indices)

    def id(self, index: int) -> str:
        return self.data.id(self._indices[index])

    def image(self, index: int) -> Tensor:
        return self.data.image(self._indices[index])

    def labels(self) -> Labels:
        return self.data.labels()[self._indices]

    def captions(self, index: int) -> tuple[str, ...]:
        return self.data.captions(self._indices[index])

    def __getstate__(self) -> dict[str, Any]:
        return given(self)

    @cached_property
    def _indices(self) -> list[int]:
        return spread(len(self.data), self.count)


@dataclass(frozen=True)
class Prompted(Dataset):
    """A dataset with other prompt templates than its own."""

    data: Dataset
    templates: tuple[str, ...] = ("a photo of a {}",)  # pyright: ignore[reportIncompatibleMethodOverride]

    @property
    def names(self) -> tuple[str, ...]:
        return self.data.names

    @property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        return self.data.aliases

    def __len__(self) -> int:
        return len(self.data)

    def id(self, index: int) -> str:
        return self.data.id(index)

    def image(self, index: int) -> Tensor:
        return self.data.image(index)

    def labels(self) -> Labels:
        return self.data.labels()

    def captions(self, index: int) -> tuple[str, ...]:
        return self.data.captions(index)


def resized(image: Tensor, size: int | None) -> Tensor:
    """A uint8 image (3, h, w) with its short side at `size` and the middle square cut out, as a decoded one
    is."""
    if size is None or image.shape[1:] == (size, size):
        return image
    square = fitted(Image.fromarray(image.permute(1, 2, 0).numpy()), size)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
