"""What travels between the wings: batches of labelled images, class prompts, and the datasets they come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from crossguard.errors import CrossguardError
from crossguard.shapes import Images, Labels


@runtime_checkable
class Batch(Protocol):
    """Samples of a task; `ids` name them for reports and for their noise."""

    @property
    def ids(self) -> tuple[str, ...]: ...

    @property
    def images(self) -> Images: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Labelled:
    """A batch of images with their labels."""

    ids: tuple[str, ...]
    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Pairs:
    """A batch of images with their captions, at least one each."""

    ids: tuple[str, ...]
    images: Images
    captions: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def texts(self) -> list[str]:
        """All captions, image by image."""
        return [text for texts in self.captions for text in texts]

    @property
    def owners(self) -> Labels:
        """For each of `texts` the place of its image in the batch."""
        return torch.tensor([place for place, texts in enumerate(self.captions) for _ in texts], dtype=torch.int64)


@dataclass(frozen=True)
class Prompts:
    """The texts that stand for the classes of a set: `texts[c]` are the strings of class `c`, one per template.

    `names` are the class names in label order; `aliases` maps a word of a class name to its true synonyms, so that a
    text attack can tell a synonym from another class.
    """

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.names:
            raise CrossguardError(
                "the class list is empty; a class set needs at least two class names (for captions there is Retrieval)"
            )
        if len(self.names) == 1:
            raise CrossguardError(
                f"there is one class only ({self.names[0]!r}); telling classes apart needs at least two"
            )
        empty = [str(label) for label, name in enumerate(self.names) if not name.strip()]
        if empty:
            raise CrossguardError(f"the class name of label {', '.join(empty)} is empty; give every class a name")
        if len(self.texts) != len(self.names) or len({len(texts) for texts in self.texts}) != 1 or not self.texts[0]:
            raise CrossguardError(f"{len(self.names)} classes need the same number of prompts each, at least one")

    @staticmethod
    def of(
        names: Sequence[str], templates: Sequence[str], aliases: Mapping[str, tuple[str, ...]] | None = None
    ) -> Prompts:
        """Every template with every class name put in for `{}`."""
        if not templates:
            raise CrossguardError("no prompt template was given; try 'a photo of a {}'")
        wrong = [template for template in templates if template.count("{}") != 1]
        if wrong:
            raise CrossguardError(f"the prompt template {wrong[0]!r} must hold {{}} exactly once, for the class name")
        texts = tuple(tuple(template.replace("{}", name) for template in templates) for name in names)
        return Prompts(tuple(names), texts, aliases or {})

    @property
    def flat(self) -> list[str]:
        """All strings, class by class, template by template."""
        return [text for texts in self.texts for text in texts]

    @property
    def duplicates(self) -> tuple[str, ...]:
        """Class names that occur more than once: such classes cannot be told apart by any zero-shot classifier."""
        return tuple(name for name, count in Counter(name.lower() for name in self.names).items() if count > 1)

    def rewritten(self, flat: Sequence[str]) -> Prompts:
        """The same classes with other strings, in the order of `flat`."""
        per_class = len(self.texts[0])
        texts = tuple(tuple(flat[c * per_class : (c + 1) * per_class]) for c in range(len(self.names)))
        return replace(self, texts=texts)

    def rivals(self) -> list[frozenset[str]]:
        """For each string of `flat`: the lower-case words that name another class (or its synonym) and not this one."""
        own = [self._words_of(name) for name in self.names]
        everything = Counter(word for words in own for word in words)
        rivals = [frozenset(word for word in everything if word not in words) for words in own]
        return [rivals[c] for c, texts in enumerate(self.texts) for _ in texts]

    def _words_of(self, name: str) -> frozenset[str]:
        words = name.lower().split()
        return frozenset(words) | {alias for word in words for alias in self.aliases.get(word, ())}


class Dataset(ABC):
    """Images with labels or captions, at the data's own resolution. A dataset is a word: a frozen dataclass that
    opens its source on first use. Everything is addressed by index, so any subset and any order can be asked for."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Class names in label order; empty where the data has captions only."""

    @property
    def templates(self) -> tuple[str, ...]:
        """Prompt templates with `{}` for the class name."""
        return ("a photo of a {}",)

    @property
    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        """True synonyms of words in class names, where the data knows them."""
        return {}

    @abstractmethod
    def id(self, index: int) -> str:
        """A name of the sample that stays the same whatever subset it is drawn in."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """The image as uint8, shape (3, h, w)."""

    @abstractmethod
    def labels(self) -> Labels:
        """The labels of all samples, as int64."""

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of the sample; none by default."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of a number over this data should know of it; every report says it."""
        return ()

    def prompts(self, templates: Sequence[str] | None = None) -> Prompts:
        """The class prompts of this set, from its own templates or the given ones."""
        return Prompts.of(self.names, templates or self.templates, self.aliases)

    def batches(self, size: int, indices: Sequence[int] | None = None) -> Iterator[Labelled]:
        """The samples (or those of `indices`) in order, in batches of at most `size` images of one shape each."""
        if size < 1:
            raise CrossguardError(f"a batch size of {size} is not possible; give 1 or more")
        labels = self.labels()
        held: list[tuple[int, Tensor]] = []
        for index in range(len(self)) if indices is None else indices:
            image = self._stored(index)
            if held and (len(held) == size or held[0][1].shape != image.shape):
                yield self._batch(held, labels)
                held = []
            held.append((index, image))
        if held:
            yield self._batch(held, labels)

    def _stored(self, index: int) -> Tensor:
        """The image in the precision it is stored in: uint8, or float32 in [0, 1] where rounding would change it."""
        return self.image(index)

    def _batch(self, held: list[tuple[int, Tensor]], labels: Labels) -> Labelled:
        indices = [index for index, _ in held]
        images = torch.stack([image for _, image in held])
        images = images.to(torch.float32).div_(255.0) if images.dtype == torch.uint8 else images
        return Labelled(tuple(self.id(index) for index in indices), images, labels[indices])


def spread(total: int, limit: int | None) -> list[int]:
    """`limit` indices spread evenly over `total`: the same ones whatever the seed, and fair to class-sorted data."""
    if limit is None or limit >= total:
        return list(range(total))
    if limit < 1:
        raise CrossguardError(f"a limit of {limit} samples is not possible; give 1 or more")
    return [position * total // limit for position in range(limit)]
