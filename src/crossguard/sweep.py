"""A number that runs through values: a word with its name in it stands for one word for each value."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crossguard import words
from crossguard.errors import CrossguardError
from crossguard.limits import shortly

MOST = 1000  # values: each makes a cell for every other word of the grid

Number = int | float


@dataclass(frozen=True)
class Sweep:
    """A name and its values, and what became of the words with this name in them: points of lines.

    Args:
        name: what stands in words in place of the number.
        values: the numbers.
        points: for each part of a question, by the label of a word that came of it: the label that the line of these
            words has, and the value.
    """

    name: str
    values: tuple[Number, ...]
    points: dict[str, dict[str, tuple[str, Number]]] = field(default_factory=dict)

    @staticmethod
    def read(name: str, given: object) -> Sweep:
        """The values as people write them: '0:1:0.125' (first, last and the step between), '0, 1/4, 1', or a list of
        numbers.

        Raises:
            CrossguardError: the name is that of a word, or the values are none.
        """
        if not name.isidentifier() or name in words.names():
            raise CrossguardError(
                f"a sweep cannot be over {shortly(name)}; take a name that no word has, such as alpha"
            )
        listed = _listed(name, given)
        values = tuple(dict.fromkeys(listed))
        if len(values) < 2:
            raise CrossguardError(
                f"a sweep over {name} needs two values or more, and {shortly(given)} is {len(values)}"
            )
        return Sweep(name, values)

    def line(self, kind: str, label: str) -> str:
        """What the words of a line have in common, of the label of one of them; any other label is its own."""
        return self.points.get(kind, {}).get(label, (label, None))[0]

    def at(self, labels: Mapping[str, str]) -> set[Number]:
        """The values of the words that make a cell: none, where nothing in it depends on the name; several, where it is
        none of this sweep.

        Args:
            labels: of the words, by the part of the question.
        """
        found = (self.points.get(kind, {}).get(label) for kind, label in labels.items())
        return {one[1] for one in found if one is not None}

    def spelled(self, value: Number) -> str:
        """One of the values, in as few digits as tell all of them apart, and six at least."""
        for digits in range(6, 18):
            if len({f"{one:.{digits}g}" for one in self.values}) == len(self.values):
                return f"{value:.{digits}g}"
        return str(value)  # whole numbers of more digits than a float has

    def mentions(self, text: str, others: Collection[str] = ()) -> bool:
        """Whether a text is a word with the name of the sweep in it, or one of these."""
        try:
            names = {node.id for node in ast.walk(words.parse(text)) if isinstance(node, ast.Name)}
        except CrossguardError:  # which is said where the word is read
            return False
        return not names.isdisjoint({self.name, *others})


class Point(NamedTuple):
    """Where a cell is in the picture of a sweep.

    Args:
        line: what tells it from other lines.
        attack: what people call the attack.
        value: of the number; None for a cell that does not depend on it.
    """

    line: str
    attack: str
    value: Number | None


class Names(NamedTuple):
    """What words may use by a name of their own.

    Args:
        each: the objects by their names, for each value of the sweep; once, where there is none.
        depend: those that are others for each value.
    """

    each: Sequence[Mapping[str, Any]]
    depend: Collection[str] = ()


def laid_out(kind: str, label: str | None, text: str, names: Names, sweep: Sweep | None) -> dict[str, Any]:
    """The words that a text stands for, by what people call them: one, or one for each value of the sweep, whose points
    they become.

    Args:
        kind: the part of a question: 'model', 'attack' and so on.
        label: what people call it; the word itself, if None.
    """
    if sweep is None or not sweep.mentions(words.expanded(kind, text, names.each[0]), names.depend):
        word = words.read(kind, text, names.each[0])
        return {words.show(word, short=True) if label is None else label: word}
    found: dict[str, Any] = {}
    for value, named in zip(sweep.values, names.each, strict=True):
        word = words.read(kind, text, named)
        own = words.show(word, short=True) if label is None else f"{label}, {sweep.name}={sweep.spelled(value)}"
        found[own] = word
        sweep.points.setdefault(kind, {})[own] = (text.strip() if label is None else label, value)
    return found


def _listed(name: str, given: object) -> Sequence[Number]:
    if isinstance(given, str) and ":" in given:
        parts = [_number(name, part) for part in given.split(":")]
        if len(parts) != 3:
            raise CrossguardError(f"a sweep over {name} is written first:last:step, such as 0:1:0.125, not {given!r}")
        first, last, step = parts
        if not step > 0 or not last > first:
            raise CrossguardError(
                f"a sweep over {name} goes up from first to last by a positive step, such as 0:1:0.125, not {given!r}"
            )
        count = int((last - first) / step + 1e-9) + 1
        if count > MOST:
            raise CrossguardError(f"a sweep over {name} has {count} values in {given!r}, and {MOST} are the most")
        # Rounded to what people mean: 3 * 0.1 is 0.3.
        found = [first + place * step for place in range(count)]
        return [one if isinstance(one, int) else float(f"{one:.12g}") for one in found]
    items = given.split(",") if isinstance(given, str) else given
    if not isinstance(items, Sequence) or len(items) > MOST:
        raise CrossguardError(
            f"a sweep over {name} is first:last:step, such as 0:1:0.125, or a list of numbers, not {shortly(given)}"
        )
    return [_number(name, item) for item in items]


def _number(name: str, item: object) -> Number:
    try:
        found: Any = words.build(item) if isinstance(item, str) else item
    except CrossguardError:
        found = None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise CrossguardError(
            f"a sweep over {name} runs through numbers such as 0.5 or 4/255, and {shortly(item)} is none"
        )
    return found
