"""What was asked, word for word, and the outcome of every sample. A report knows words and numbers only."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from crossguard import files, reading
from crossguard.errors import CrossguardError
from crossguard.limits import at_least, shortly
from crossguard.printing import one_line, plain
from crossguard.words import build, show

SCHEMA = 1
WORDS = ("task", "model", "attack", "budget", "surrogate")  # the parts of a question that are words


class ReportError(CrossguardError):
    """A file that is not a whole report."""


class NoReportError(ReportError):
    """A file of something else."""


@dataclass(frozen=True)
class Rate:
    """How many of `n` samples something is true of, with its Wilson interval.

    Args:
        bounds: another interval, where samples hang together.
    """

    successes: int
    n: int
    bounds: tuple[float, float] | None = None

    @property
    def value(self) -> float:
        return self.successes / self.n if self.n else 0.0

    def __float__(self) -> float:
        return self.value

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.successes, self.n) if self.bounds is None else self.bounds

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"

    def __format__(self, spec: str) -> str:
        """With its interval, or its value alone as a format says: `f"{report.robust:.3f}"`."""
        return format(self.value, spec) if spec else str(self)


@dataclass(frozen=True, eq=False, repr=False)
class Outcomes:
    """One column per quantity, one entry per sample. Lists will do; they become arrays.

    A clean evaluation has the clean answer as its adversarial one, sizes of 0 and no questions asked.

    Args:
        id: names of the samples, the same in every subset.
        clean: the answer on the unperturbed sample (a class index).
        adversarial: the answer under attack.
        clean_margin: logit of the label minus the best other logit.
        size: norm of the perturbation of the image, in the unit of the budget.
        gradients: how many gradients of the victim the attack took.
        forwards: how many plain forwards it took.
    """

    id: Sequence[str]
    label: Sequence[int] | np.ndarray
    clean: Sequence[int] | np.ndarray
    adversarial: Sequence[int] | np.ndarray
    clean_margin: Sequence[float] | np.ndarray
    adversarial_margin: Sequence[float] | np.ndarray
    size: Sequence[float] | np.ndarray
    gradients: Sequence[int] | np.ndarray
    forwards: Sequence[int] | np.ndarray

    def __post_init__(self) -> None:
        _check_columns(self, _COLUMNS)

    def __len__(self) -> int:
        return len(self.id)

    @property
    def correct(self) -> np.ndarray:
        return np.asarray(self.clean) == self.label

    @property
    def standing(self) -> np.ndarray:
        return np.asarray(self.adversarial) == self.label

    @property
    def parts(self) -> tuple[tuple[str, Rate, Rate], ...]:
        """The headline: a name, the clean rate, and that of who is right both clean and under attack."""
        clean = Rate(int(self.correct.sum()), len(self))
        return (("", clean, Rate(int((self.correct & self.standing).sum()), len(self))),)

    @property
    def adversarial_rate(self) -> Rate:
        return Rate(int(self.standing.sum()), len(self))

    def at(self, rows: Sequence[int]) -> Outcomes:
        """The outcomes of some of the samples."""
        places = np.asarray(rows, dtype=np.int64)
        columns = {name: np.asarray(getattr(self, name))[places] for name in _COLUMNS}
        ids: list[str] = [self.id[int(place)] for place in places]
        return Outcomes(ids, **columns)

    def told(self, some: Outcomes) -> Outcomes:
        """These outcomes, with those of some of the samples in their places."""
        places = {name: place for place, name in enumerate(self.id)}
        at = [places[name] for name in some.id]
        columns = {name: np.asarray(getattr(self, name)).copy() for name in _COLUMNS}
        for name, column in columns.items():
            column[at] = getattr(some, name)
        return Outcomes(self.id, **columns)

    def worst(self, others: Sequence[Outcomes | Ranks]) -> Outcomes:
        """What is left of each sample after all of these, which are of the same samples: the answer under attack that
        is wrong, or else the one of smallest margin.

        The clean answers are those of the first: the worst of several draws of a random model would fall with their
        number, though nobody attacked. Where another draw was wrong on the clean image, an adversary who leaves the
        image alone has won, so it counts as one more attack.
        """
        stack = partial(_stacked, others)
        again = (stack("clean") != self.label) & self.correct
        columns = {
            "adversarial": np.concatenate([stack("adversarial"), np.where(again, stack("clean"), self.label)]),
            "adversarial_margin": np.concatenate(
                [stack("adversarial_margin"), np.where(again, stack("clean_margin"), np.inf)]
            ),
            "size": np.concatenate([stack("size"), np.zeros(again.shape)]),
        }
        margins = np.nan_to_num(columns["adversarial_margin"], nan=np.inf)
        rank = np.where(columns["adversarial"] == self.label, margins, -np.inf)
        return Outcomes(
            self.id,
            self.label,
            clean=self.clean,
            clean_margin=self.clean_margin,
            **{name: column[rank.argmin(0), np.arange(len(self))] for name, column in columns.items()},
            **{name: stack(name).sum(0) for name in ("gradients", "forwards")},
        )

    def usual(self, others: Sequence[Outcomes | Ranks]) -> Outcomes:
        """What most of several draws of a random model say to the same images: of each sample the middle answer under
        attack, wrong ones first and then by margin, so that it is wrong where most of them are."""
        stack = partial(_stacked, (self, *others))
        margins = np.nan_to_num(stack("adversarial_margin"), nan=np.inf)
        rank = np.where(stack("adversarial") == self.label, margins, -np.inf)
        middle = rank.argsort(0, kind="stable")[len(rank) // 2], np.arange(len(self))
        return replace(self, **{name: stack(name)[middle] for name in ("adversarial", "adversarial_margin")})

    def lines(self, attacked: bool) -> list[tuple[str, str]]:
        """The rates for people; without an attack the clean one alone."""
        ((_, clean, robust),) = self.parts
        found = [("n", str(len(self))), ("clean accuracy", str(clean))]
        return [*found, ("robust accuracy", str(robust))] if attacked else found

    @property
    def columns(self) -> dict[str, Sequence[str] | np.ndarray]:
        """The columns by name: `pandas.DataFrame(report.outcomes.columns)`."""
        return {"id": self.id} | {name: getattr(self, name) for name in _COLUMNS}

    def __repr__(self) -> str:
        right = f"{int(self.correct.sum())} right clean, {int(self.standing.sum())} right as asked"
        return f"<Outcomes of {len(self)} samples: {right}; columns {', '.join(self.columns)}>"


@dataclass(frozen=True)
class Texts:
    """What the classes of a task were called, and how an attack rewrote their prompts.

    Args:
        names: of the classes, in label order.
        clean: the prompts of each class; empty where no attack was on texts.
        adversarial: the same under attack.
    """

    names: tuple[str, ...]
    clean: tuple[tuple[str, ...], ...] = ()
    adversarial: tuple[tuple[str, ...], ...] = ()

    @property
    def prompts(self) -> int:
        """How many prompts an attack on texts had before it."""
        return sum(map(len, self.adversarial))

    @staticmethod
    def read(content: Mapping[str, Any]) -> Texts:
        """From the content of a file."""
        clean, adversarial = (
            tuple(tuple(str(text) for text in texts) for texts in content[name]) for name in ("clean", "adversarial")
        )
        return Texts(tuple(str(name) for name in content["names"]), clean, adversarial)


DIRECTIONS = ("image to text", "text to image")
RANKS = (1, 5, 10)  # the k of recall at k
_RESAMPLES = 1000


@dataclass(frozen=True, eq=False, repr=False)
class Ranks:
    """The queries of a retrieval, one entry each: first the images, then the captions. Lists will do.

    Intervals are by bootstrap over images, each with its captions, because the captions of an image fall together.
    Where all images say the same, as when every query or none succeeds, a bootstrap has no width; there it is Wilson's
    interval for as many samples as there are images to ask about.

    Args:
        id: names of the queries; a caption is called after its image.
        image: the number of the image that the query is or belongs to.
        text: 1 where the query is a caption, 0 where it is an image.
        clean: the rank of the right answer without an attack, 0 for the first.
        adversarial: its rank under attack.
        size: of the change of the image or caption, in the unit of its budget.
        gradients: how many gradients of the victim the attack on an image took; 0 for captions.
        forwards: how many plain forwards of it; strings that are tried for a caption are not counted, since equal ones
            are read once for all.
    """

    id: Sequence[str]
    image: Sequence[int] | np.ndarray
    text: Sequence[int] | np.ndarray
    clean: Sequence[int] | np.ndarray
    adversarial: Sequence[int] | np.ndarray
    size: Sequence[float] | np.ndarray
    gradients: Sequence[int] | np.ndarray
    forwards: Sequence[int] | np.ndarray

    def __post_init__(self) -> None:
        _check_columns(self, _RANKED)
        if set(np.asarray(self.text).tolist()) - {0, 1}:
            raise CrossguardError("the outcomes say of each query whether it is a caption: text is 0 or 1")
        if min(np.asarray(self.image).min(), np.asarray(self.clean).min(), np.asarray(self.adversarial).min()) < 0:
            raise CrossguardError("the outcomes hold a negative rank or number of an image")

    def __len__(self) -> int:
        return len(self.id)

    @property
    def correct(self) -> np.ndarray:
        return np.asarray(self.clean) == 0

    @property
    def standing(self) -> np.ndarray:
        return np.asarray(self.adversarial) == 0

    @property
    def parts(self) -> tuple[tuple[str, Rate, Rate], ...]:
        """For each direction its name, recall at 1 clean, and the share that is first both clean and under attack."""
        return tuple(
            (f"{direction} R@1", self.recall(1, direction, "clean"), self.recall(1, direction, "robust"))
            for direction in DIRECTIONS
        )

    @property
    def adversarial_rate(self) -> Rate:
        return self.recall(1, DIRECTIONS[0], "adversarial")

    def recall(self, k: int = 1, direction: str = DIRECTIONS[0], when: str = "clean") -> Rate:
        """The share of queries whose right answer is among the first k.

        Args:
            direction: 'image to text' or 'text to image'.
            when: 'clean', 'adversarial' (under attack), or 'robust' (both).
        """
        _check_choice("k", k, RANKS)
        _check_choice("direction", direction, DIRECTIONS)
        _check_choice("when", when, _WHENS)
        return self._rate(self._sums[:, _place(direction, k, when)], _place(direction))

    def resampled(self, k: int = 1, direction: str = DIRECTIONS[0], when: str = "clean") -> np.ndarray:
        """The value of `recall`, and behind it those in the resamples of the bootstrap. Of ranks of the same queries
        the resamples are the same, so the intervals of what is computed from several are paired."""
        whole = self._sums[:, _place(direction)]
        return self._sums[:, _place(direction, k, when)][whole > 0] / whole[whole > 0]

    def success(self, k: int = 1, direction: str = DIRECTIONS[0], kind: str = "difference") -> Rate:
        """How often the attack succeeds.

        Args:
            kind: 'difference', recall clean minus recall under attack, as in the code of Co-Attack (Zhang et al. 2022);
                or 'conditional', the share of the queries that are right clean which become wrong, as in SGA (Lu et al.
                2023). The first also counts what the attack sets right by accident, against itself.
        """
        _check_choice("k", k, RANKS)
        _check_choice("direction", direction, DIRECTIONS)
        _check_choice("kind", kind, ("difference", "conditional"))
        clean, attacked, both = (self._sums[:, _place(direction, k, when)] for when in _WHENS)
        if kind == "conditional":
            return self._rate(clean - both, _place(direction, k, "clean"))
        return self._rate(clean - attacked, _place(direction))

    def worst(self, others: Sequence[Outcomes | Ranks]) -> Ranks:
        """What is left of each query after all of these, which are of the same queries: the last rank under attack.
        The clean ranks are those of the first; a later one of another draw counts as one more attack (see
        `Outcomes.worst`)."""
        stack = partial(_stacked, others)
        again = np.where(stack("clean") > self.clean, stack("clean"), -1)
        columns = {
            "adversarial": np.concatenate([stack("adversarial"), again]),
            "size": np.concatenate([stack("size"), np.zeros(again.shape)]),
        }
        last = columns["adversarial"].argmax(0), np.arange(len(self))
        return Ranks(
            self.id,
            self.image,
            self.text,
            self.clean,
            **{name: column[last] for name, column in columns.items()},
            **{name: stack(name).sum(0) for name in ("gradients", "forwards")},
        )

    def usual(self, others: Sequence[Outcomes | Ranks]) -> Ranks:
        """Of each query the middle rank under attack over several draws of a random model."""
        ranks = np.sort(_stacked((self, *others), "adversarial"), 0)
        return replace(self, adversarial=ranks[(len(ranks) - 1) // 2])

    @property
    def images(self) -> int:
        """How many of the queries are images; the others are captions."""
        return int((np.asarray(self.text) == 0).sum())

    def lines(self, attacked: bool) -> list[tuple[str, str]]:
        """The rates for people; without an attack the clean ones alone."""
        found = [("n", f"{self.images} images, {len(self) - self.images} captions")]
        for direction in DIRECTIONS:
            for k in RANKS:
                clean, under = (self.recall(k, direction, when) for when in ("clean", "adversarial"))
                if not attacked:
                    found.append((f"{direction} R@{k}", str(clean)))
                    continue
                difference, conditional = (self.success(k, direction, kind) for kind in ("difference", "conditional"))
                both = f", {self.recall(k, direction, 'robust')} both" if k == 1 else ""  # what tables show
                found.append((f"{direction} R@{k}", f"{clean} clean, {under} under attack{both}"))
                found.append(("  attack success", f"{difference} (difference), {conditional} (of those right clean)"))
        return found

    @property
    def columns(self) -> dict[str, Sequence[str] | np.ndarray]:
        """The columns by name: `pandas.DataFrame(report.outcomes.columns)`."""
        return {"id": self.id} | {name: getattr(self, name) for name in _RANKED}

    def __repr__(self) -> str:
        first = f"{int(self.correct.sum())} come first clean, {int(self.standing.sum())} as asked"
        queries = f"{self.images} images and {len(self) - self.images} captions"
        return f"<Ranks of {queries}: {first}; columns {', '.join(self.columns)}>"

    @cached_property
    def _held(self) -> np.ndarray:
        """How many queries of each kind each image has."""
        group = np.unique(np.asarray(self.image), return_inverse=True)[1]
        count = int(group.max()) + 1
        held = np.zeros((count, len(DIRECTIONS) * (1 + len(RANKS) * len(_WHENS))))
        clean, attacked = np.asarray(self.clean), np.asarray(self.adversarial)
        for number, direction in enumerate(DIRECTIONS):
            asked = np.asarray(self.text) == number
            np.add.at(held[:, _place(direction)], group, asked)
            for k in RANKS:
                for when, hit in zip(_WHENS, (clean < k, attacked < k, (clean < k) & (attacked < k)), strict=True):
                    np.add.at(held[:, _place(direction, k, when)], group, asked & hit)
        return held

    @cached_property
    def _sums(self) -> np.ndarray:
        """How many queries of each kind there are, in the data (row 0) and in its resamples: images are drawn with
        replacement."""
        held = self._held
        count = len(held)
        generator = np.random.default_rng(0)
        rows = [held.sum(0)]
        for _ in range(_RESAMPLES):
            drawn = np.bincount(generator.integers(0, count, count), minlength=count)
            rows.append(drawn @ held)
        return np.stack(rows)

    def _rate(self, part: np.ndarray, column: int) -> Rate:
        """The ratio of these sums to those of a column, with its interval from the resamples."""
        whole = self._sums[:, column]
        if whole[0] == 0:
            return Rate(0, 0)
        drawn = part[1:][whole[1:] > 0] / whole[1:][whole[1:] > 0]
        low, high = (float(end) for end in np.quantile(drawn, (0.025, 0.975)))
        if low == high:
            images = int((self._held[:, column] > 0).sum())
            near, far = interval(abs(low) * images, images)
            low, high = (near, far) if low >= 0 else (-far, -near)
        return Rate(int(part[0]), int(whole[0]), (low, high))


def _stacked(outcomes: Sequence[Outcomes | Ranks], name: str) -> np.ndarray:
    """A column of several outcomes, one row each."""
    return np.stack([np.asarray(getattr(one, name)) for one in outcomes])


_WHENS = ("clean", "adversarial", "robust")


def _place(direction: str, k: int = 0, when: str = "clean") -> int:
    """The column of `Ranks._sums`; without k that of the number of queries."""
    first = DIRECTIONS.index(direction) * (1 + len(RANKS) * len(_WHENS))
    return first if k == 0 else first + 1 + RANKS.index(k) * len(_WHENS) + _WHENS.index(when)


def _check_choice(name: str, given: object, choices: tuple[object, ...]) -> None:
    if given not in choices:
        raise CrossguardError(f"{name}={given!r} is not reported; give one of {', '.join(map(str, choices))}")


def _check_columns(outcomes: Outcomes | Ranks, columns: Mapping[str, type]) -> None:
    """Makes arrays of the columns; raises where one does not fit the ids."""
    object.__setattr__(outcomes, "id", tuple(outcomes.id))
    if not outcomes.id:
        raise CrossguardError("a report needs at least one sample, and there is none")
    for name, kind in columns.items():
        column = np.asarray(getattr(outcomes, name))
        if column.shape != (len(outcomes.id),):
            raise CrossguardError(f"the outcomes have {len(outcomes.id)} ids, and {name} has the shape {column.shape}")
        if kind is int and column.dtype.kind not in "iu":
            raise CrossguardError(f"the outcomes need whole numbers in {name}, and it holds {column.dtype}")
        object.__setattr__(outcomes, name, column.astype(np.int64 if kind is int else np.float64))


_COLUMNS: dict[str, type] = {
    "label": int,
    "clean": int,
    "adversarial": int,
    "clean_margin": float,
    "adversarial_margin": float,
    "size": float,
    "gradients": int,
    "forwards": int,
}
_RANKED: dict[str, type] = {
    "image": int,
    "text": int,
    "clean": int,
    "adversarial": int,
    "size": float,
    "gradients": int,
    "forwards": int,
}


def _columns(outcomes: Outcomes | Ranks) -> Mapping[str, type]:
    return _RANKED if isinstance(outcomes, Ranks) else _COLUMNS


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """The answer to one question: who attacked what, knowing what, how far, and what became of every sample.

    A sample counts as robust if it is answered rightly both clean and under attack, as in AutoAttack (Croce
    and Hein 2020): an attack that stumbles from a wrong answer into the right one earns the model nothing. Of a
    retrieval, `clean` and `robust` are recall at 1 from images to texts, and `ranks` has the rest.

    Args:
        question: task, model, attack, budget, surrogate as full words; knowledge, seed, limit; all strings.
        notes: doubts about the result, each a sentence with its remedy.
        seconds: that asking took, the attack included.
        loading: seconds that it took to open the networks before that.
        texts: the names of the classes and what an attack made of their prompts, where the task has classes.
        short: the words of the question without their defaults, for people; derived, if not given.
        drawn: the outcomes, where each image under attack is judged by several draws of a random model
            (`evaluate(draws=...)`): what most of them say.
        gates: for each gate of a defense (`Answer.gates`) on how many of the images that were asked about it acted,
            clean and under attack.
        asked: the ids of the samples that were asked about, where these are fewer (`evaluate(after=...)`); the others
            had fallen to an adversary before, and their outcomes are what became of them there.
        pictures: shows the first samples (`show`), as long as the report has not been to a file.
    """

    question: Mapping[str, str]
    outcomes: Outcomes | Ranks
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    seconds: float = 0.0
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    short: Mapping[str, str] = field(default_factory=dict)
    loading: float = 0.0
    texts: Texts | None = None
    drawn: Outcomes | Ranks | None = None
    gates: Mapping[str, tuple[Rate, Rate]] = field(default_factory=dict)
    asked: tuple[str, ...] | None = None
    pictures: Callable[[Report, int, bool], None] | None = None

    def __post_init__(self) -> None:
        wrong = [key for key, value in self.question.items() if not isinstance(value, str)]
        if wrong:
            raise CrossguardError(f"the question of a report holds strings only, and {wrong[0]!r} is none")
        object.__setattr__(self, "notes", tuple(self.notes))
        if not self.short:
            object.__setattr__(self, "short", {k: shortened(self.question[k]) for k in WORDS if k in self.question})

    @property
    def n(self) -> int:
        return len(self.outcomes)

    @property
    def attacked(self) -> bool:
        """Whether anybody attacked: without, the outcomes under attack are the clean ones and say nothing."""
        return self.question.get("attack", "None") != "None"

    @property
    def correct(self) -> np.ndarray:
        """Which samples are answered rightly without an attack."""
        return self.outcomes.correct

    @property
    def standing(self) -> np.ndarray:
        """Which samples are answered rightly under attack, whatever the clean answer was."""
        return self.outcomes.standing

    @property
    def judged(self) -> Outcomes | Ranks:
        """The outcomes: by most draws, where there are several."""
        return self.drawn or self.outcomes

    @property
    def broken(self) -> np.ndarray:
        """Which samples fell to this attack: right clean, asked about, and wrong by most draws where there are
        several."""
        said = self.judged
        fell = said.correct & ~said.standing
        return fell if self.asked is None else fell & np.isin(np.asarray(said.id), self.asked)

    @property
    def ranks(self) -> Ranks:
        """The outcomes of a retrieval; raises for another task."""
        if not isinstance(self.outcomes, Ranks):
            raise CrossguardError("this report is not of a retrieval, so it has no ranks")
        return self.outcomes

    @property
    def parts(self) -> tuple[tuple[str, Rate, Rate], ...]:
        """The headlines, each with its name (empty where there is one only), clean and robust."""
        return self.outcomes.parts

    @property
    def clean(self) -> Rate:
        return self.parts[0][1]

    @property
    def robust(self) -> Rate:
        """Right both clean and under attack: the headline."""
        return self.parts[0][2]

    @property
    def adversarial(self) -> Rate:
        """Right under attack, whatever the clean answer was; at least `robust`."""
        return self.outcomes.adversarial_rate

    @property
    def clean_accuracy(self) -> float:
        return self.clean.value

    @property
    def robust_accuracy(self) -> float:
        return self.robust.value

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Intervals of 95 % by name of the rate."""
        return {name: rate.interval for name, rate in self.rates.items()}

    @property
    def key(self) -> str:
        """The hash of the question, which names the file of its answer in an experiment."""
        return key(self.question)

    @property
    def headline(self) -> str:
        """The rates in a line: clean and, where somebody attacked, robust, by most draws where there are several; of a
        retrieval in both directions."""
        return "; ".join(
            f"{name}{': ' * bool(name)}clean {clean}" + (f", robust {robust}" if self.attacked else "")
            for name, clean, robust in self.judged.parts
        )

    def show(self, count: int = 3, changed: bool = False) -> None:
        """Shows the first samples clean and under attack: with their images in a notebook, in lines of text elsewhere.

        The images of the first few samples stay in memory; `evaluate(keep=FOLDER)` keeps all, for `crossguard show`.

        Args:
            changed: those first that the attack turned from right to wrong.
        """
        if self.pictures is None:
            why = "nobody attacked" if not self.attacked else "its images are no longer in memory"
            raise CrossguardError(
                f"this report has nothing to show, since {why}; evaluate(..., keep=FOLDER) keeps the images, and "
                "'crossguard show FOLDER' shows them"
            )
        self.pictures(self, at_least("count", count, 1), changed)

    def frame(self) -> Any:
        """The outcomes as a DataFrame of pandas, a row for each sample or query; with the names of its classes, where
        it has any.

        Raises:
            CrossguardError: pandas is not installed.
        """
        try:
            import pandas  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise CrossguardError(
                "a frame needs pandas ('pip install pandas'); report.outcomes.columns has the same as arrays"
            ) from error
        columns: dict[str, Any] = {name: list(column) for name, column in self.outcomes.columns.items()}
        if self.texts is not None and isinstance(self.outcomes, Outcomes):
            names = self.texts.names
            for column in ("label", "clean", "adversarial"):
                columns[f"{column}_name"] = [names[one] for one in columns[column]]
        return pandas.DataFrame(columns)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes the report as JSON, as a whole or not at all.

        Args:
            overwrite: also over the report of another question, which is refused otherwise.
        """
        check_place(Path(path), self.question, overwrite)
        rates = {
            name: {"value": rate.value, "successes": rate.successes, "interval": rate.interval}
            for name, rate in self.rates.items()
        }
        content = {
            "schema": SCHEMA,
            "question": dict(self.question),
            "short": dict(self.short),
            "summary": {"n": self.n, **rates},
            "notes": self.notes,
            "versions": dict(self.versions),
            "seconds": self.seconds,
            "loading": self.loading,
            "created": self.created,
            "texts": None if self.texts is None else asdict(self.texts),
            "outcomes": _held(self.outcomes),
        } | ({} if self.drawn is None else {"drawn": _held(self.drawn)})
        if self.asked is not None:
            content["asked"] = list(self.asked)
        if self.gates:
            content["gates"] = {name: [rate.successes for rate in rates] for name, rates in self.gates.items()}
        files.write(Path(path), json.dumps(content, allow_nan=False) + "\n")

    @staticmethod
    def load(path: str | Path) -> Report:
        """Reads a report; raises `ReportError` if the file is broken, half-written or something else."""
        path = Path(path)
        try:
            content = reading.read_json(path, Any, "delete it and ask again")
        except reading.Missing:
            raise ReportError(f"there is no report {path}") from None
        except CrossguardError as error:
            raise ReportError(str(error)) from None
        known = isinstance(content, dict) and {"question", "outcomes"} <= content.keys()
        if not known or not isinstance(content.get("schema"), int):
            raise NoReportError(f"{path} is not a report")
        if content["schema"] != SCHEMA:
            raise ReportError(
                f"{path} is a report of schema {shortly(content['schema'])}, and this crossguard reads schema {SCHEMA}"
            )
        try:
            outcomes = _outcomes(content["outcomes"])
            asked = None if content.get("asked") is None else tuple(str(name) for name in content["asked"])
            count = len(outcomes if asked is None else asked)
            return Report(
                question=_strings(content["question"]),
                outcomes=outcomes,
                drawn=None if content.get("drawn") is None else _outcomes(content["drawn"]),
                notes=tuple(str(note) for note in content["notes"]),
                versions=_strings(content["versions"]),
                seconds=float(content["seconds"]),
                created=str(content["created"]),
                short=_strings(content["short"]) or dict(content["question"]),
                loading=float(content.get("loading", 0.0)),
                texts=None if content.get("texts") is None else Texts.read(content["texts"]),
                gates={
                    str(name): (Rate(int(clean), count), Rate(int(attacked), count))
                    for name, (clean, attacked) in content.get("gates", {}).items()
                },
                asked=asked,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else one_line(str(error))[:150]
            raise ReportError(f"{path} is broken: {what}; delete it and ask again") from None

    @property
    def rates(self) -> dict[str, Rate]:
        """Every rate that is reported, by its name; without an attack the clean ones alone."""
        found = {"clean": self.clean}
        if self.attacked:
            found |= {"robust": self.robust, "adversarial": self.adversarial}
        if isinstance(self.outcomes, Ranks):
            for direction in DIRECTIONS:
                for k in RANKS:
                    name = f"{direction} R@{k}"
                    whens = _WHENS if self.attacked else ("clean",)
                    found |= {f"{name} {when}": self.outcomes.recall(k, direction, when) for when in whens}
                    for kind in ("difference", "conditional") if self.attacked else ():
                        found[f"{name} attack success ({kind})"] = self.outcomes.success(k, direction, kind)
        return found

    def lines(self) -> list[tuple[str, str]]:
        """The report in short, as names and values: what a number needs beside it to mean something. What a terminal
        would obey is spelled out."""
        said = [
            (plain(name), plain(self.short.get(name, value)))
            for name, value in self.question.items()
            if name != "after"
        ]
        if self.asked is not None:
            before = len(self.question.get("after", "").split())
            where = f"{before} report{'s' * (before != 1)} before"
            told = f"{len(self.asked)} of {self.n} samples, which stood in {where}; broke {int(self.broken.sum())}"
            said.append(("asked about", told))
        rates = self.outcomes.lines(self.attacked)
        if self.texts is not None and self.texts.prompts:
            name, value = rates.pop()
            rates.append((name, f"{value}, rests on {self.texts.prompts} prompts"))
        if self.drawn is not None:
            for (name, _, _), (_, _, left) in zip(self.parts, self.drawn.parts, strict=True):
                rates.append((f"{name}{' ' * bool(name)}by most draws", str(left)))
        for name, (clean, attacked) in self.gates.items():
            under = f", {attacked} under attack" if self.attacked else ""
            rates.append((f"gate {plain(name)} acts on", f"{clean} clean{under}"))
        loading = f", after {self.loading:.1f} of loading" if self.loading >= 0.05 else ""
        return [*said, *rates, ("seconds", f"{self.seconds:.1f}{loading}")]

    def __str__(self) -> str:
        """The lines and, below them, the notes."""
        lines = self.lines()
        width = max(len(name) for name, _ in lines)
        said = [f"{name:<{width}}  {value}" for name, value in lines]
        return "\n".join([*said, *(f"- {plain(note)}" for note in self.notes)])

    def __repr__(self) -> str:
        inside = ", ".join(f"{name.strip()}: {value}" for name, value in self.lines())
        notes = "".join(f"; note: {plain(note)}" for note in self.notes)
        return f"<Report {inside}{notes}>"

    def _repr_html_(self) -> str:
        from crossguard.pages import render

        return render("report.html", lines=self.lines(), notes=map(plain, self.notes))


def _held(outcomes: Outcomes | Ranks) -> dict[str, Any]:
    """The columns as JSON can hold them."""
    return {"id": outcomes.id} | {name: _plain(getattr(outcomes, name)) for name in _columns(outcomes)}


def _outcomes(columns: Mapping[str, Any]) -> Outcomes | Ranks:
    """The outcomes from what `_held` gave."""
    make, kinds = (Ranks, _RANKED) if "text" in columns else (Outcomes, _COLUMNS)
    held = {name: _column(columns[name], kind) for name, kind in kinds.items()}
    return make(id=[str(one) for one in columns["id"]], **held)


def check_place(path: Path, question: Mapping[str, str], overwrite: bool = False) -> None:
    """Raises where a report of this question would replace that of another, or a file that is no report.

    Args:
        overwrite: nothing is refused.
    """
    if overwrite or not path.is_file():
        return
    try:
        there = Report.load(path).question
    except ReportError as error:
        raise ReportError(f"{error}; nothing was written over it: give another file, or overwrite this one") from None
    if dict(there) != dict(question):
        raise CrossguardError(
            f"{path} holds the report of another question ({differs(there, question)}); give another file, or "
            "overwrite this one"
        )


def differs(there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """How two questions differ, in words for people: their first part that is not the same."""
    for name in (*there, *here):
        old, new = there.get(name, "None"), here.get(name, "None")
        if old != new:
            old, new = (shortened(one) if name in WORDS else one for one in (old, new))
            return f"{name}: {old} there, {new} here"
    return "no difference"


def key(question: Mapping[str, str]) -> str:
    """The hash of a question; the same for equal questions, whatever the order of their parts."""
    canonical = json.dumps(dict(question), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def interval(successes: int | float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval (Wilson 1927) of a rate of `successes` in `n` trials; (0, 1) for no trials.

    Unlike the normal approximation it has a width at 0 and at n successes, where robust accuracies often are.
    """
    if not 0 <= successes <= n:
        raise CrossguardError(f"{successes} successes in {n} trials are not possible")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate = successes / n
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return low, high


def versions(device: str = "cpu") -> dict[str, str]:
    """What a number may depend on: packages, platform and device. Imports none of the packages."""
    found = {}
    for package in ("crossguard", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            from crossguard import __version__

            found[package] = __version__ if package == "crossguard" else "not installed"
    return {**found, "python": platform.python_version(), "platform": platform.platform(), "device": device}


def shortened(text: str) -> str:
    """The word without its defaults; as it is, if it cannot be built here (a class of somebody's script)."""
    try:
        return show(build(text), short=True)
    except CrossguardError:
        return text


def _plain(column: np.ndarray) -> list[Any]:
    """A column for JSON, which has no NaN and no infinity: null stands for both."""
    return [None if isinstance(one, float) and not math.isfinite(one) else one for one in column.tolist()]


def _column(values: Any, kind: type) -> np.ndarray:
    if not isinstance(values, list):
        raise TypeError("a column of the outcomes is not a list")
    if kind is int:
        if not all(type(value) is int for value in values):
            raise TypeError("a column of whole numbers holds something else")
        return np.asarray(values, dtype=np.int64)
    return np.asarray([math.nan if value is None else float(value) for value in values])


def _strings(values: Any) -> dict[str, str]:
    if not all(isinstance(value, str) for value in values.values()):
        raise TypeError("something that should be text is none")
    return dict(values)
