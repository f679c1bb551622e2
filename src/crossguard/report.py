"""What was asked, word for word, and the outcome of every sample. A report knows words and numbers only."""

from __future__ import annotations

import hashlib
import html
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from crossguard import files
from crossguard.errors import CrossguardError
from crossguard.words import build, show

SCHEMA = 1
WORDS = ("task", "model", "attack", "budget", "surrogate")  # the parts of a question that are words


class ReportError(CrossguardError):
    """A file that is not a whole report."""


@dataclass(frozen=True)
class Rate:
    """How many of `n` samples something is true of, with its Wilson interval."""

    successes: int
    n: int

    @property
    def value(self) -> float:
        return self.successes / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.successes, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


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
        object.__setattr__(self, "id", tuple(self.id))
        if not self.id:
            raise CrossguardError("a report needs at least one sample, and there is none")
        for name, kind in _COLUMNS.items():
            column = np.asarray(getattr(self, name))
            if column.shape != (len(self.id),):
                raise CrossguardError(f"the outcomes have {len(self.id)} ids, and {name} has the shape {column.shape}")
            if kind is int and column.dtype.kind not in "iu":
                raise CrossguardError(f"the outcomes need whole numbers in {name}, and it holds {column.dtype}")
            object.__setattr__(self, name, column.astype(np.int64 if kind is int else np.float64))

    def __len__(self) -> int:
        return len(self.id)


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


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """The answer to one question: who attacked what, knowing what, how far, and what became of every sample.

    A sample counts as robust if it is answered rightly both clean and under attack, as in AutoAttack (Croce
    and Hein 2020): an attack that stumbles from a wrong answer into the right one earns the model nothing.

    Args:
        question: task, model, attack, budget, surrogate as full words; knowledge, seed, limit; all strings.
        notes: doubts about the result, each a sentence with its remedy.
        short: the words of the question without their defaults, for people; derived, if not given.
    """

    question: Mapping[str, str]
    outcomes: Outcomes
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    seconds: float = 0.0
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    short: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [key for key, value in self.question.items() if not isinstance(value, str)]
        if wrong:
            raise CrossguardError(f"the question of a report holds strings only, and {wrong[0]!r} is none")
        object.__setattr__(self, "notes", tuple(self.notes))
        if not self.short:
            object.__setattr__(self, "short", {k: _shortened(self.question[k]) for k in WORDS if k in self.question})

    @property
    def n(self) -> int:
        return len(self.outcomes)

    @property
    def correct(self) -> np.ndarray:
        """Which samples are answered rightly without an attack."""
        return np.asarray(self.outcomes.clean) == self.outcomes.label

    @property
    def standing(self) -> np.ndarray:
        """Which samples are answered rightly under attack, whatever the clean answer was."""
        return np.asarray(self.outcomes.adversarial) == self.outcomes.label

    @property
    def clean(self) -> Rate:
        return Rate(int(self.correct.sum()), self.n)

    @property
    def robust(self) -> Rate:
        """Right both clean and under attack: the headline."""
        return Rate(int((self.correct & self.standing).sum()), self.n)

    @property
    def adversarial(self) -> Rate:
        """Right under attack, whatever the clean answer was; at least `robust`."""
        return Rate(int(self.standing.sum()), self.n)

    @property
    def clean_accuracy(self) -> float:
        return self.clean.value

    @property
    def robust_accuracy(self) -> float:
        return self.robust.value

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Wilson intervals of 95 % by name of the rate."""
        return {name: rate.interval for name, rate in self._rates().items()}

    @property
    def key(self) -> str:
        """The hash of the question, which names the file of its answer in an experiment."""
        return key(self.question)

    def save(self, path: str | Path) -> None:
        """Writes the report as JSON, as a whole or not at all."""
        rates = {
            name: {"value": rate.value, "successes": rate.successes, "interval": rate.interval}
            for name, rate in self._rates().items()
        }
        content = {
            "schema": SCHEMA,
            "question": dict(self.question),
            "short": dict(self.short),
            "summary": {"n": self.n, **rates},
            "notes": self.notes,
            "versions": dict(self.versions),
            "seconds": self.seconds,
            "created": self.created,
            "outcomes": {"id": self.outcomes.id} | {name: _plain(getattr(self.outcomes, name)) for name in _COLUMNS},
        }
        files.write(Path(path), json.dumps(content, allow_nan=False) + "\n")

    @staticmethod
    def load(path: str | Path) -> Report:
        """Reads a report; raises `ReportError` if the file is broken, half-written or something else."""
        path = Path(path)
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ReportError(f"there is no report {path}") from None
        except OSError as error:
            raise ReportError(f"the report {path} cannot be read: {files.reason(error)}") from None
        except (ValueError, RecursionError):
            raise ReportError(f"{path} is broken: it is not whole JSON; delete it and ask again") from None
        if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
            raise ReportError(f"{path} is not a report")
        if content["schema"] != SCHEMA:
            raise ReportError(
                f"{path} is a report of schema {content['schema']}, and this crossguard reads schema {SCHEMA}"
            )
        try:
            columns = content["outcomes"]
            outcomes = Outcomes(
                [str(one) for one in columns["id"]],
                *(_column(columns[name], kind) for name, kind in _COLUMNS.items()),
            )
            return Report(
                question=_strings(content["question"]),
                outcomes=outcomes,
                notes=tuple(str(note) for note in content["notes"]),
                versions=_strings(content["versions"]),
                seconds=float(content["seconds"]),
                created=str(content["created"]),
                short=_strings(content["short"]) or dict(content["question"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise ReportError(f"{path} is broken: {what}; delete it and ask again") from None

    def _rates(self) -> dict[str, Rate]:
        return {"clean": self.clean, "robust": self.robust, "adversarial": self.adversarial}

    def lines(self) -> list[tuple[str, str]]:
        """The report in short, as names and values: what a number needs beside it to mean something."""
        said = [(name, self.short.get(name, value)) for name, value in self.question.items()]
        rates = [("clean accuracy", str(self.clean)), ("robust accuracy", str(self.robust))]
        return [*said, ("n", str(self.n)), *rates, ("seconds", f"{self.seconds:.1f}")]

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}: {value}" for name, value in self.lines())
        return f"<Report {inside}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self.lines()
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return f"<table>{rows}</table>" + (f"<ul>{notes}</ul>" if notes else "")


def key(question: Mapping[str, str]) -> str:
    """The hash of a question; the same for equal questions, whatever the order of their parts."""
    canonical = json.dumps(dict(question), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:20]


def interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
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


def _shortened(text: str) -> str:
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
