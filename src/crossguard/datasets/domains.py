"""Data of two domains: a source with labels, and a target that training may look at and has no labels of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from crossguard.data import Dataset
from crossguard.datasets.combined import Over
from crossguard.errors import CrossguardError
from crossguard.shapes import Labels
from crossguard.words import show


@dataclass(frozen=True)
class Unlabelled(Over):
    """A dataset without what people have said of its images: asking for their labels raises, and there are no captions.
    The names of its classes stay, and with them the prompts.

    Nothing that is done with it follows the labels in secret: of a limit, the images are chosen by the hashes of their
    ids, whatever their class.
    """

    data: Dataset

    @property
    def labelled(self) -> bool:
        return False

    def labels(self) -> Labels:
        raise CrossguardError(
            f"the labels of {show(self.data, short=True)} were asked for, and {type(self).__name__} says that nobody "
            "may look at them; train on it without labels, or give the data themselves"
        )

    def captions(self, index: int) -> tuple[str, ...]:
        del index
        return ()


@dataclass(frozen=True)
class Domains(Over):
    """A source and a target of unsupervised domain adaptation: images of the same classes that look otherwise, as
    photographs and sketches do.

    To whoever asks for images and labels this is the source; `unlabelled` is the target, whose labels cannot be asked
    for. So training never sees them, and a report over the target alone tells what they are.

    Raises:
        CrossguardError: The two do not have the same classes in the same order, or the target has no images; it is said
            when the data are first asked for.
    """

    source: Dataset
    target: Dataset

    @cached_property
    def data(self) -> Dataset:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The source, once both are known to fit together."""
        mine, theirs = self.source.names, self.target.names
        both = f"{show(self.source, short=True)} and {show(self.target, short=True)}"
        if not mine:
            raise CrossguardError(f"the source and the target of Domains need classes, and {both} have none")
        if mine != theirs:
            pairs = enumerate(zip(mine, theirs, strict=False))
            label = next((label for label, (one, other) in pairs if one != other), None)
            what = (
                f"there are {len(mine)} and {len(theirs)}"
                if label is None
                else f"label {label} is {mine[label]!r} in the source and {theirs[label]!r} in the target"
            )
            raise CrossguardError(
                f"{both} do not have the same classes in the same order ({what}); give both the same list, as with "
                "classes=(...)"
            )
        if not len(self.target):
            raise CrossguardError(f"the target {show(self.target, short=True)} has no images to adapt to; give some")
        return self.source

    @cached_property
    def unlabelled(self) -> Unlabelled:
        """The images of the target, without their labels."""
        _ = self.data
        return Unlabelled(self.target)

    @property
    def fingerprint(self) -> str:
        return " ".join(filter(None, dict.fromkeys((self.source.fingerprint, self.target.fingerprint))))
