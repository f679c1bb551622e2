"""What a step trains on: which samples make its batch, their pixels and their texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock

import torch
from torch import Tensor

from crossguard.data import Dataset, in_floats
from crossguard.defenses.plan import Plan
from crossguard.defenses.terms import BATCH, CLASSES
from crossguard.errors import CrossguardError
from crossguard.processes import Processes
from crossguard.seeds import derive, keys
from crossguard.shapes import Images, Labels, Seeds
from crossguard.threads import workers
from crossguard.words import show

_LOOKED_AT = 1000  # captions that are looked at before the first step


@dataclass(frozen=True)
class Texts:
    """Distinct texts of a step, the same on every process.

    Args:
        texts: the strings.
        rivals: for each the words that would make it the text of another class.
        whole: for each image of the whole batch the row of its text; None where the images have no labels.
        place: the same for the images of this process.
    """

    texts: list[str]
    rivals: list[AbstractSet[str]]
    whole: Labels | None
    place: Labels | None


@dataclass(frozen=True)
class Batch:
    """The share of one step's batch that this process has.

    Args:
        images: pixels in [0, 1].
        seeds: the noise of each image.
        indices: where each image is in the data.
        texts: one for each class (over 'classes'), and those of the batch (over 'batch'); nothing, where no loss sees
            texts.
    """

    images: Images
    seeds: Seeds
    indices: list[int]
    texts: Mapping[str, Texts] = field(default_factory=dict)


class Feed:
    """The batches of a training, each a function of (seed, step) alone. While a step is taken, threads read the images
    of the next ones.

    Args:
        overs: which texts the losses see, of 'classes' and 'batch'; none, where they see none.
        labelled: whether a loss asks for labels.
        name: what the recipe calls it. Each feed is shuffled in an order of its own, so that a source and a target that
            show the same things do not meet in pairs.

    Raises:
        CrossguardError: the data cannot be trained on by this recipe; it says what would do.
    """

    def __init__(
        self,
        recipe: Plan,
        data: Dataset,
        group: Processes,
        device: torch.device,
        overs: AbstractSet[str] = frozenset(),
        labelled: bool = False,
        name: str = "",
    ) -> None:
        self.name = name
        self.recipe, self.data, self.group, self.device = recipe, data, group, device
        self.overs, self.total = overs, 1
        self.labels: Labels | None = None
        if labelled or recipe.shots is not None:
            if labelled and not data.labelled:
                raise CrossguardError(
                    f"{type(recipe).__name__} learns from labels, and nobody can ask for those of "
                    f"{show(data, short=True)}; train with a recipe that needs none, such as FARE, SelfTraining or "
                    "DisentangledDistillation, or give Domains(source, target) with a labelled source"
                )
            if not data.labelled:
                raise CrossguardError(
                    f"{type(recipe).__name__}(shots={recipe.shots}) takes so many images of each class, and nobody can "
                    f"ask for the labels of {show(data, short=True)}; leave shots out, or train on less with Subset"
                )
            self.labels = data.labels()
            _check_labels(recipe, data, self.labels)
        self._ranked = None if recipe.shots is None or self.labels is None else _ranked(recipe, data, self.labels)
        self._orders: dict[int, list[int]] = {}
        self._shuffling = Lock()  # steps are taken in one thread and read ahead in another
        self._pictures: Generator[Tensor, None, None] | None = None
        self._next = -1  # the step whose images come next out of there
        count = len(self.samples(0))
        if count < 2:
            raise CrossguardError(f"{show(data, short=True)} has {count} training images; at least 2 are needed")
        self.size = min(recipe.batch, count)
        if self.size % group.world:
            raise CrossguardError(f"a batch of {self.size} cannot be shared by {group.world} processes")
        self.per_epoch = count // self.size
        self.prompts = None if recipe.captions or not overs else data.prompts()
        self._rivals = [] if self.prompts is None else self.prompts.rivals()

    def length(self, epochs: float, steps: int | None) -> int:
        """So many steps are that many epochs, unless their number is given."""
        return steps or max(1, round(epochs * self.per_epoch))

    def close(self) -> None:
        """Ends the reading ahead."""
        if self._pictures is not None:
            self._pictures.close()
        self._pictures, self._next = None, -1

    def strings(self) -> list[str]:
        """The texts that the training will read: all class prompts, or the captions of some random samples."""
        if not self.overs:
            return []
        if self.prompts is not None:
            return list(dict.fromkeys(self.prompts.flat))
        some = self._order(0)[:_LOOKED_AT]
        return list(dict.fromkeys(text for index in some for text in self.data.captions(index)))

    @property
    def classes(self) -> list[str]:
        """The first prompt of each class; none where captions are trained on."""
        return [] if self.prompts is None else [texts[0] for texts in self.prompts.texts]

    def chosen(self, step: int) -> list[int]:
        """The samples of the batch, over all processes."""
        epoch, place = divmod(step, self.per_epoch)
        return self._order(epoch)[place * self.size : (place + 1) * self.size]

    def batch(self, step: int) -> Batch:
        chosen = self.chosen(step)
        mine = self._share(chosen)
        images = in_floats(self._read(step, len(mine)).to(self.device))
        seeds = keys((self.data.id(index) for index in mine), self.recipe.seed, step)
        if self.recipe.augment is not None:
            images = self.recipe.augment(images, seeds)
        return Batch(images, seeds, mine, self.texts(step))

    def still(self, step: int, missing: AbstractSet[int] | None = None) -> Iterator[Batch]:
        """Images as they are, without augmentation, in groups that are the same whenever they are asked for: those of
        the samples of this step's epoch that hold one of the missing, or all. Their noise belongs to the image
        alone."""
        samples = self.samples(step // self.per_epoch)
        for first in range(0, len(samples), self.size):
            group = samples[first : first + self.size]
            if missing is None or not missing.isdisjoint(group):
                images = in_floats(self._stacked([self.data.image(index) for index in group]).to(self.device))
                yield Batch(images, keys((self.data.id(index) for index in group), self.recipe.seed, "once"), group)

    @property
    def comes_again(self) -> bool:
        """Whether this process meets the very same images in several epochs."""
        return self.recipe.augment is None and self.group.world == 1 and self.total > self.per_epoch

    def pictures(self, indices: Sequence[int]) -> Images:
        """The images of these samples as they are, without augmentation."""
        return in_floats(self._stacked(self.data.load(indices)).to(self.device))

    def _share(self, chosen: list[int]) -> list[int]:
        """This process's part of a batch; the parts follow each other, as the gathered embeddings do."""
        share = len(chosen) // self.group.world
        return chosen[share * self.group.rank : share * (self.group.rank + 1)]

    def samples(self, epoch: int) -> list[int]:
        """The samples of an epoch: all, or `shots` of each class, with `fresh_shots` the next ones in each epoch."""
        if self._ranked is None:
            return list(range(len(self.data)))
        shots = self.recipe.shots or 0
        first = epoch * shots if self.recipe.fresh_shots else 0
        return sorted(ranked[(first + shot) % len(ranked)] for ranked in self._ranked for shot in range(shots))

    def _order(self, epoch: int) -> list[int]:
        """The samples of an epoch, shuffled."""
        with self._shuffling:
            if epoch not in self._orders:
                samples = self.samples(epoch)
                order = ("order", epoch, self.name) if self.name else ("order", epoch)
                generator = torch.Generator().manual_seed(derive(self.recipe.seed, *order))
                places = torch.randperm(len(samples), generator=generator).tolist()
                self._orders = {known: rows for known, rows in self._orders.items() if abs(epoch - known) < 4}
                self._orders[epoch] = [samples[place] for place in places]
            return self._orders[epoch]

    def _read(self, step: int, count: int) -> Tensor:
        """The images of this process in one tensor, while those of the next step are read."""
        if self._pictures is None or step != self._next:
            self.close()
            self._pictures = self._ahead(step, count)
        self._next = step + 1
        return next(self._pictures)

    def _ahead(self, step: int, count: int) -> Generator[Tensor, None, None]:
        """The images of this step and of those that follow: while one is taken, threads decode those of the next two,
        and another one puts those of the next into one tensor, on a CPU as floats."""
        rest = (index for later in range(step, self.total) for index in self._share(self.chosen(later)))
        with closing(self.data.stream(rest, 2 * count)) as pictures:

            def together() -> Tensor:
                images = self._stacked(list(islice(pictures, count)))
                return in_floats(images) if self.device.type == "cpu" else images

            if not workers():
                while True:
                    yield together()
            thread = ThreadPoolExecutor(1, "crossguard")
            try:
                coming = deque([thread.submit(together)])
                for _ in range(step + 1, self.total):
                    coming.append(thread.submit(together))
                    yield coming.popleft().result()  # nothing here holds the images of a step that is taken
                yield coming.popleft().result()
            finally:
                thread.shutdown(wait=True, cancel_futures=True)  # it may be at the pictures

    def _stacked(self, pictures: Sequence[Tensor]) -> Tensor:
        if len({picture.shape for picture in pictures}) > 1:
            raise CrossguardError(
                f"the images of {show(self.data, short=True)} have different sizes; "
                "give the dataset a size, such as size=224"
            )
        return torch.stack(list(pictures))

    def texts(self, step: int) -> dict[str, Texts]:
        """The distinct texts of the step, by what they are over."""
        if not self.overs:
            return {}
        if self.prompts is None:
            captions = [self._caption(step, index) for index in self.chosen(step)]
            texts = list(dict.fromkeys(captions))
            place = {text: row for row, text in enumerate(texts)}
            whole = torch.tensor([place[caption] for caption in captions])
            return dict.fromkeys(self.overs, self._placed(texts, [frozenset[str]()] * len(texts), whole))
        templates = len(self.prompts.texts[0])
        template = derive(self.recipe.seed, step, "template") % templates
        classes = [texts[template] for texts in self.prompts.texts]
        rivals = self._rivals[template::templates]
        label = None if self.labels is None else self.labels[self.chosen(step)]
        found = {CLASSES: self._placed(classes, rivals, label)}
        if BATCH in self.overs and label is not None:
            present, own = torch.unique(label, return_inverse=True)
            kept = present.tolist()
            found[BATCH] = self._placed([classes[c] for c in kept], [rivals[c] for c in kept], own)
        return {over: found[over] for over in self.overs}

    def _placed(self, texts: list[str], rivals: list[AbstractSet[str]], whole: Labels | None) -> Texts:
        """The texts with the places of all images in them, and of those of this process."""
        if whole is None:
            return Texts(texts, rivals, None, None)
        share = len(whole) // self.group.world
        place = whole[share * self.group.rank : share * (self.group.rank + 1)]
        return Texts(texts, rivals, whole.to(self.device), place.to(self.device))

    def _caption(self, step: int, index: int) -> str:
        options = self.data.captions(index)
        if not options:
            raise CrossguardError(
                f"sample {self.data.id(index)!r} has no caption, and captions=True needs one each; captions=False "
                "matches images with the prompts of their classes, where data have classes"
            )
        return options[derive(self.recipe.seed, step, "caption", self.data.id(index)) % len(options)]


def _check_labels(recipe: Plan, data: Dataset, labels: Labels) -> None:
    """A label outside the classes would be an index from the end of their list: another class, in silence."""
    name, source = type(recipe).__name__, show(data, short=True)
    wrong = (labels < 0) | (labels >= len(data.names))
    if not bool(wrong.any()) or (recipe.captions and recipe.shots is None):
        return
    if recipe.captions:
        raise CrossguardError(
            f"{name}(shots={recipe.shots}) takes so many images of each class, but {int(wrong.sum())} of the "
            f"{len(data)} samples of {source} have none; leave shots out, or train on less with Subset"
        )
    if bool(wrong.all()):
        raise CrossguardError(
            f"{source} has captions and no classes, and {name} matches images with class prompts; give it captions=True"
        )
    label = int(labels[wrong][0])
    raise CrossguardError(
        f"{int(wrong.sum())} of the {len(data)} samples of {source} have a label that is no class (such as {label}; "
        f"there are {len(data.names)} classes); leave them out, or give captions=True if all samples have captions"
    )


def _ranked(recipe: Plan, data: Dataset, labels: Labels) -> list[list[int]]:
    """The samples of each class in a random order that does not depend on the order of the data."""
    assert recipe.shots is not None
    classes: dict[int, list[tuple[int, int]]] = {}
    for index, label in enumerate(labels.tolist()):
        classes.setdefault(label, []).append((derive(recipe.seed, "shots", data.id(index)), index))
    short = [label for label, members in classes.items() if len(members) < recipe.shots]
    if short:
        raise CrossguardError(f"class {data.names[short[0]]!r} has fewer than {recipe.shots} images; lower shots")
    return [[index for _, index in sorted(members)] for members in classes.values()]
