"""What classes are called: names in words that a text encoder knows, and what tells that a list of them is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from crossguard import reading
from crossguard.errors import CrossguardError

SPLITS = frozenset({"train", "training", "trainval", "test", "testing", "val", "valid", "validation", "dev"})

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")  # what digits are called

CODES = {
    "WordNet ids": r"n\d{8}",
    "numbers": r"\d+",
    "single letters": r"[^\W\d_]",
    "codes of countries": r"[A-Z]{2}",
}


def spoken(name: str) -> str:
    """A class name as one says it: underscores, which folders and the hub have for spaces, are spaces."""
    return name.replace("_", " ").strip()


def class_list(classes: Sequence[str] | str) -> tuple[str, ...]:
    """Class names given one by one, or as the path of a text file with one name a line."""
    told = classes if isinstance(classes, str) else None
    if isinstance(classes, str):
        classes = reading.lines(
            reading.text(Path(classes).expanduser(), "a class list is a text file in UTF-8 with one class name a line")
        )
    where = "the class list" if told is None else f"the class list {told!r}"
    return tuple(spoken(reading.check_text(name, f"{where}, at label {label},")) for label, name in enumerate(classes))


def check_order(given: Sequence[str], told: Mapping[int, str], where: str) -> None:
    """Raises where a list of class names has a name at another label than the data themselves have it.

    Other words for a class, such as "kitten" for "cat", are no contradiction.

    Args:
        told: The names that the data have, by label.
        where: What tells them, for the error.
    """
    labels = {_alike(name): label for label, name in told.items()}
    for label, name in enumerate(given):
        if label in told and _alike(name) != _alike(told[label]) and _alike(name) in labels:
            raise CrossguardError(
                f"classes names label {label} {name!r}, but {where} names it {told[label]!r} and has {name!r} at label "
                f"{labels[_alike(name)]}; give the names in that order, or leave classes out"
            )


def unspoken(names: Iterable[str]) -> str | None:
    """What class names are that tell a text encoder nothing: "WordNet ids", "numbers" and so on; None where they are
    not all of one such kind."""
    listed = [name.strip() for name in names]
    for what, pattern in CODES.items():
        if listed and all(re.fullmatch(pattern, name) for name in listed):
            return what
    return None


@cache
def known_names(table: str) -> Mapping[str, str]:
    """The names in one of the package's tables (`wordnet`, `countries`, `flowers`) by what folders are called."""
    content = (files("crossguard") / "assets" / "names" / f"{table}.txt").read_text(encoding="utf-8")
    return dict(line.split("\t") for line in content.splitlines())


def split_of(path: str) -> str | None:
    """The split of a data set that a file belongs to by its path: `test` for `data/test-00000-of-00002.parquet`,
    `default/test/0000.parquet` and `cifar10_test.parquet`; None where the path names none."""
    *folders, name = path.split("/")
    numbered = re.fullmatch(r"(.+?)-\d+-of-\d+\..*", name)
    for part in (numbered[1] if numbered else name.rpartition(".")[0], *reversed(folders)):
        words = [word for word in re.split(r"[^a-z]+", part.lower()) if word in SPLITS]
        if words:
            return words[-1]
    return numbered[1] if numbered else None


def _alike(name: str) -> str:
    return " ".join(spoken(name).lower().split())
