"""What travels between the wings: batches of labelled images, class prompts, and the datasets they come from."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from crossguard.errors import CrossguardError
from crossguard.limits import at_least
from crossguard.shapes import Images, Labels
from crossguard.threads import ahead
from crossguard.words import Reads, Word

T = TypeVar("T")


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

    def rivals(self) -> list[AbstractSet[str]]:
        """For each string of `flat`: the lower-case words that name another class (or its synonym) and not this one."""
        own = [self._words_of(name) for name in self.names]
        everything = frozenset[str]().union(*own)
        rivals = [Rivals(everything, words) for words in own]
        return [rivals[c] for c, texts in enumerate(self.texts) for _ in texts]

    def _words_of(self, name: str) -> frozenset[str]:
        words = name.lower().split()
        return frozenset(words) | {alias for word in words for alias in self.aliases.get(word, ())}


class Rivals(AbstractSet[str]):
    """The words of all classes but those of one. All classes share the first set, so that the rivals of many classes
    take no more memory than their names.

    Args:
        everything: the words that name any class.
        own: those of them that name this one.
    """

    __slots__ = ("everything", "own")

    def __init__(self, everything: frozenset[str], own: frozenset[str]) -> None:
        self.everything, self.own = everything, own

    def __contains__(self, word: object) -> bool:
        return word in self.everything and word not in self.own

    def __iter__(self) -> Iterator[str]:
        return (word for word in self.everything if word not in self.own)

    def __len__(self) -> int:
        return len(self.everything) - len(self.own)

    @classmethod
    def _from_iterable(cls, it: Iterable[T]) -> frozenset[T]:  # what `&` and `|` make is a plain set
        return frozenset(it)


def all_rivals(rivals: Sequence[AbstractSet[str]]) -> frozenset[str]:
    """The words that are a rival of any of these."""
    found: set[str] = set()
    shared: dict[int, tuple[frozenset[str], frozenset[str]]] = {}  # of those that share a set: what all of them own
    for one in rivals:
        if isinstance(one, Rivals):
            key = id(one.everything)
            everything, own = shared.get(key, (one.everything, one.own))
            shared[key] = everything, own & one.own
        else:
            found.update(one)
    return frozenset(found.union(*(everything - own for everything, own in shared.values())))


class Dataset(Reads, Word, ABC):
    """Images with labels or captions, at the data's own resolution.

    A dataset is a word: a frozen dataclass that opens its source on first use and keeps what it has opened; a new word
    sees what has changed since. Everything is addressed by index, so any subset and any order can be asked for, from
    several threads at once.
    """

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

    @property
    def skipped(self) -> int:
        """How many broken images were left out."""
        return 0

    @abstractmethod
    def id(self, index: int) -> str:
        """A name of the sample that stays the same whatever subset it is drawn in."""

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """The image as uint8, shape (3, h, w)."""

    def stored(self, index: int) -> Tensor:
        """The image in the precision it is stored in, shape (3, h, w): uint8, or float32 in [0, 1] where rounding to
        8 bits would change it."""
        return self.image(index)

    @property
    def labelled(self) -> bool:
        """Whether `labels` may be asked for."""
        return True

    @abstractmethod
    def labels(self) -> Labels:
        """The labels of all samples, as int64; -1 for a sample that has captions only.

        Raises:
            CrossguardError: The data are not `labelled`.
        """

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

    def chosen(self, limit: int | None) -> list[int]:
        """The indices of `limit` samples, ascending; all of them, if None or if there are no more.

        Every class has its share of them, rounded up or down, and which samples of a class these are follows from the
        hashes of their ids: the same samples whatever the order of the data. A smaller limit chooses some of those
        that a larger one does. Where the data are not `labelled`, all of it counts as one class.
        """
        if limit is not None:
            limit = at_least("a limit of samples", limit, 1)
        if limit is None or limit >= len(self):
            return list(range(len(self)))
        return np.sort(self._turns[:limit]).tolist()

    @cached_property
    def _turns(self) -> np.ndarray:
        """All indices in the order in which a growing limit takes them."""
        ids = (self.id(index).encode("utf-8", "surrogatepass") for index in range(len(self)))
        digests = b"".join(hashlib.sha256(one).digest()[:16] for one in ids)
        rank, start = np.frombuffer(digests, dtype=">u8").reshape(-1, 2).T.astype(np.uint64)
        labels = self.labels().numpy() if self.labelled else np.zeros(len(self), dtype=np.int64)
        order = np.lexsort((rank, labels))  # class by class, and by hash inside each
        _, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
        place = np.arange(len(order)) - first.repeat(sizes)
        # The samples of a class take their turns at even distances, beginning at a random part of the first: so every
        # class has its share, rounded up or down, of those that have had their turn by any time.
        begin = (start[order[first]] / 2.0**64).repeat(sizes)
        return order[np.lexsort((rank[order], (place + begin) / sizes.repeat(sizes)))]

    def missing(self, indices: Sequence[int]) -> tuple[str, ...]:
        """The names of the classes that have no sample among these."""
        there = set(self.labels()[list(indices)].tolist())
        return tuple(name for label, name in enumerate(self.names) if label not in there)

    def load(self, indices: Sequence[int], workers: int | None = None) -> list[Tensor]:
        """The images at `indices` as they are `stored`, decoded by several threads at once."""
        return list(self.stream(indices, len(indices), workers))

    def stream(self, indices: Iterable[int], waiting: int, workers: int | None = None) -> Generator[Tensor, None, None]:
        """The images at `indices` as they are `stored`, one after the other, while threads decode the next ones.

        Args:
            waiting: how many images may wait for their turn, decoded or nearly so.
            workers: threads; by default as many as CROSSGUARD_WORKERS says, else one a processor and at most 4; 0
                decodes without threads.
        """
        len(self)  # opens the source, once and not in several threads
        return ahead(self.stored, indices, waiting, workers)

    def batches(
        self, size: int, indices: Sequence[int] | None = None, workers: int | None = None
    ) -> Iterator[Labelled]:
        """The samples (or those of `indices`) in order, in batches of at most `size` images of one shape each.

        While a batch is used, threads decode the next two.

        Args:
            workers: see `stream`.
        """
        size = at_least("a batch size", size, 1)
        labels = self._checked_labels()
        order = range(len(self)) if indices is None else indices
        held: list[tuple[int, Tensor]] = []
        # What is still to come is given up when a reader stops early.
        with closing(self.stream(order, 2 * size, workers)) as images:
            for index, image in zip(order, images, strict=True):
                if held and held[0][1].shape != image.shape:
                    yield self._batch(held, labels)
                    held = []
                held.append((index, image))
                if len(held) == size:
                    yield self._batch(held, labels)
                    held = []
            if held:
                yield self._batch(held, labels)

    def _checked_labels(self) -> Labels:
        labels, classes = self.labels(), len(self.names)
        if labels.dtype != torch.int64 or labels.shape != (len(self),):
            raise CrossguardError(
                f"the labels of {type(self).__name__} are {_told(labels)}; they must be int64, one for each of its "
                f"{len(self)} samples"
            )
        wrong = ((labels < -1) | (labels >= classes)).nonzero()[:, 0] if classes else labels[:0]
        if len(wrong):
            raise CrossguardError(
                f"the label {int(labels[wrong[0]])} of the sample {self.id(int(wrong[0]))!r} is outside the list of "
                f"{classes} class names"
            )
        return labels

    def _batch(self, held: list[tuple[int, Tensor]], labels: Labels) -> Labelled:
        indices = [index for index, _ in held]
        images = in_floats(torch.stack([self._checked(index, image) for index, image in held]))
        return Labelled(tuple(self.id(index) for index in indices), images, labels[indices])

    def _checked(self, index: int, image: Tensor) -> Tensor:
        if image.dtype not in (torch.uint8, torch.float32) or image.ndim != 3 or len(image) != 3:
            raise CrossguardError(
                f"the image {self.id(index)!r} of {type(self).__name__} is {_told(image)}; it must be uint8, or "
                "float32 in [0, 1], of shape (3, h, w)"
            )
        return image

    def __getstate__(self) -> dict[str, Any]:
        """The fields of the word alone: a copy in another process opens its source itself."""
        state = self.__dict__
        return {item.name: state[item.name] for item in fields(self)} if is_dataclass(self) else dict(state)


def in_floats(images: Tensor) -> Images:
    """Images as float32 in [0, 1], on the device they are on; those stored in 8 bits are divided by 255."""
    if images.dtype != torch.uint8:
        return images
    # Divided by a tensor: by a number, a GPU would multiply with its rounded inverse and come to other floats than a
    # CPU does.
    return images.to(torch.float32).div_(torch.full((1,), 255.0, device=images.device))


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
