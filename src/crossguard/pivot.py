"""Numbers laid out as a table: which parts of the questions make the rows, which the columns, and which are best.

Numbers that must not be compared stand in tables of their own: every part of a question that is in neither rows nor
columns is the same for all numbers of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from crossguard.compare import LEVEL, Average, Difference, difference, mean
from crossguard.errors import CrossguardError
from crossguard.limits import at_least, shortly
from crossguard.report import Outcomes, Ranks, Rate, Report

CLEAN = "clean"  # stands for the attack where nobody attacks
AXES = ("task", "model", "attack", "budget", "surrogate", "seed", "limit", "score", "class")
_ADVERSARY = ("budget", "surrogate", "seed")  # what a clean evaluation has not
_MEAN = "mean over tasks"


@dataclass(frozen=True)
class Layout:
    """How numbers are laid out and written.

    Args:
        rows: the parts of a question that make the rows, such as ('model',).
        columns: those that make the columns.
        mean: beside the tasks, the mean over all of them.
        digits: behind the point.
        intervals: whether each number has its interval beside it.
        bold: whether the best model is marked, where it is above each other one by more than chance.
    """

    rows: tuple[str, ...] = ("model",)
    columns: tuple[str, ...] = ("attack", "budget")
    mean: bool = False
    digits: int = 1
    intervals: bool = True
    bold: bool = False

    def __post_init__(self) -> None:
        at_least("digits", self.digits, 0)
        for place, axes in (("rows", self.rows), ("columns", self.columns)):
            for axis in axes:
                if axis not in AXES:
                    raise CrossguardError(f"there are no {place} of {shortly(axis)}; give one of {', '.join(AXES)}")
        twice = [axis for number, axis in enumerate(self.shown) if axis in self.shown[:number]]
        if twice:
            raise CrossguardError(f"{twice[0]!r} cannot make rows and columns twice; give it to one of them")
        if not self.rows or not self.columns:
            raise CrossguardError("a table has rows and columns; give each something, such as 'model'")
        if self.mean and "class" in self.shown:
            raise CrossguardError("a mean over tasks has no classes; leave out one of them")

    @property
    def shown(self) -> tuple[str, ...]:
        return (*self.rows, *self.columns)

    @property
    def split(self) -> tuple[str, ...]:
        """What makes tables of their own."""
        return tuple(axis for axis in AXES if axis not in self.shown)


@dataclass(frozen=True)
class Published:
    """What somebody else has measured.

    Args:
        value: in percent.
        source: where it stands.
    """

    value: float
    source: str


@dataclass(frozen=True, eq=False)
class Cell:
    """A number of a table.

    Args:
        rate: what was measured here; None where nothing was asked.
        published: what somebody else has measured, beside it.
        best: whether it is above that of each other model by more than chance.
    """

    rate: Rate | Average | None = None
    published: Published | None = None
    best: bool = False

    @property
    def difference(self) -> float | None:
        """What was measured here minus what is published, in points."""
        return None if self.rate is None or self.published is None else 100 * self.rate.value - self.published.value


@dataclass(frozen=True)
class Table:
    """Numbers that may be compared.

    Args:
        header: what holds for every number, by name.
        heads: the headings of the columns, each with as many parts as make the columns.
        rows: the label of a row and a cell for each column.
        corner: what the rows are.
        layout: how numbers are written.
    """

    header: Mapping[str, str]
    heads: tuple[tuple[str, ...], ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    corner: str = "model"
    layout: Layout = field(default_factory=Layout)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(joined(head) or CLEAN for head in self.heads)

    @property
    def cells(self) -> list[list[str]]:
        """The texts of the table without its headings."""
        return [[label, *map(self.text, cells)] for label, cells in self.rows]

    def text(self, cell: Cell, unit: str = " %") -> str:
        """A number as it is printed: with its interval where these are wanted, its n where the cells differ in it, and
        what is published beside it."""
        digits = self.layout.digits
        if cell.rate is None:
            said = "-"
        else:
            low, high = cell.rate.interval
            said = f"{100 * cell.rate.value:.{digits}f}{unit}"
            if self.layout.intervals:
                said += f" [{100 * low:.{digits}f}, {100 * high:.{digits}f}]"
            if self._differ and isinstance(cell.rate, Rate):
                said += f" (n={cell.rate.n})"
        if cell.published is not None:
            source = f" ({mark(self.sources.index(cell.published.source))})" if len(self.sources) > 1 else ""
            apart = "" if cell.difference is None else f", {cell.difference:+.{digits}f}"
            said += f"; published {cell.published.value:.{digits}f}{unit}{source}{apart}"
        return said

    @property
    def _differ(self) -> bool:
        return len({cell.rate.n for cell in self.numbers if isinstance(cell.rate, Rate)}) > 1

    @property
    def numbers(self) -> list[Cell]:
        return [cell for _, cells in self.rows for cell in cells]

    @property
    def sources(self) -> list[str]:
        """Where the published numbers stand."""
        return list(dict.fromkeys(cell.published.source for cell in self.numbers if cell.published))

    @property
    def caption(self) -> str:
        return "; ".join(f"{name}: {value}" for name, value in self.header.items())

    @property
    def legend(self) -> str:
        rated = "recall" if "score" in self.header else "accuracy"
        how = "95 % interval by bootstrap over images" if "score" in self.header else "95 % Wilson interval"
        said = [f"{rated} [{how}]" if self.layout.intervals else rated]
        if any(CLEAN not in head for head in self.heads):
            said.append("robust = right both clean and under attack")
        if any(isinstance(cell.rate, Average) for cell in self.numbers):
            said.append("the mean counts each task alike, its interval by Zou and Donner")
        if any(cell.best for cell in self.numbers):
            said.append("bold = above each other model of the same samples, paired, 95 % for all of them together")
        sources = self.sources
        if sources:
            named = sources if len(sources) == 1 else [f"({mark(number)}) {one}" for number, one in enumerate(sources)]
            said.append(f"published: {', '.join(named)}")
        return "; ".join(said)


def mark(number: int) -> str:
    """What a source is called in a table: a, b, c, ..., z, aa."""
    return (mark(number // 26 - 1) if number >= 26 else "") + chr(ord("a") + number % 26)


def joined(labels: Iterable[str]) -> str:
    return ", ".join(label for label in labels if label)


@dataclass(frozen=True, eq=False)
class Entry:
    """A number with all that it is a number of.

    Args:
        at: the parts of the question as texts that tell apart what must be told apart, for each of `AXES`; empty where
            the part does not matter to a clean number.
        rate: the number.
        behind: where it comes from: a report, and which of its headlines; of a mean, those of each task.
        when: 'clean' or 'robust'.
        rows: which samples of the reports it is about; all, if None.
    """

    at: Mapping[str, str]
    rate: Rate | Average
    behind: tuple[tuple[Report, int], ...]
    when: str
    rows: tuple[int, ...] | None = None

    @property
    def report(self) -> Report:
        return self.behind[0][0]

    @property
    def ids(self) -> list[tuple[str, ...]]:
        """The samples that the number is about."""
        return [tuple(self._outcomes(number).id) for number in range(len(self.behind))]

    def _outcomes(self, number: int) -> Outcomes | Ranks:
        said = self.behind[number][0].judged
        return said if self.rows is None or isinstance(said, Ranks) else said.at(self.rows)

    def minus(self, other: Entry, level: float = LEVEL) -> Difference | None:
        """How much this number is above another, paired; None, where they are not of the same samples."""
        if self.ids != other.ids or self._parts != other._parts:
            return None
        return mean(
            [
                difference(self._outcomes(number), other._outcomes(number), part, (self.when, other.when), level)
                for number, part in enumerate(self._parts)
            ]
        )

    @property
    def _parts(self) -> list[int]:
        return [part for _, part in self.behind]


def entries(reports: Sequence[Report], keys: Callable[[Report, str], str], classes: bool) -> list[Entry]:
    """The numbers of reports, those of clean evaluations first.

    Args:
        keys: the part of a question that belongs to an axis.
        classes: tell the classes apart.
    """
    found: list[Entry] = []
    for report in sorted(reports, key=lambda report: report.attacked):
        asked = {axis: keys(report, axis) for axis in AXES if axis not in ("score", "class")}
        clean = asked | {"attack": CLEAN} | ({} if report.attacked else dict.fromkeys(_ADVERSARY, ""))
        for part, (score, before, after) in enumerate(report.judged.parts):
            for at, rate, when in ((clean, before, "clean"), (asked, after, "robust")):
                if when == "clean" or report.attacked:
                    found.append(Entry(at | {"score": score, "class": ""}, rate, ((report, part),), when))
    return [one for entry in found for one in _classes(entry)] if classes else found


def _classes(entry: Entry) -> Iterator[Entry]:
    """The numbers of each class."""
    said = entry.report.judged
    if isinstance(said, Ranks):
        return
    places: dict[int, list[int]] = {}
    for place, label in enumerate(said.label):
        places.setdefault(int(label), []).append(place)
    for label, rows in sorted(places.items()):
        _, clean, robust = said.at(rows).parts[0]
        rate = clean if entry.when == "clean" else robust
        yield replace(entry, at={**entry.at, "class": str(label)}, rate=rate, rows=tuple(rows))


def means(found: Sequence[Entry]) -> list[Entry]:
    """The means over all tasks of numbers that agree in everything else; of what was not asked in each task there is
    none."""
    tasks: dict[str, set[str]] = {}
    groups: dict[tuple[str, ...], dict[str, Entry]] = {}
    for entry in found:
        tasks.setdefault(entry.at["score"], set()).add(entry.at["task"])
        group = tuple(entry.at[axis] for axis in AXES if axis != "task")
        groups.setdefault(group, {}).setdefault(entry.at["task"], entry)
    made: list[Entry] = []
    for same in groups.values():
        first = next(iter(same.values()))
        if len(same) == len(tasks[first.at["score"]]) > 1:
            rates = tuple(one.rate for one in same.values() if isinstance(one.rate, Rate))
            behind = tuple(one for entry in same.values() for one in entry.behind)
            label = f"{_MEAN} ({len(same)})"
            made.append(Entry({**first.at, "task": label}, Average(rates), behind, first.when))
    return made


def pivot(
    found: Sequence[Entry],
    layout: Layout,
    label: Callable[[Entry, str], str],
    rank: Callable[[Entry, str], int],
    header: Callable[[Sequence[Entry], Sequence[Entry]], Mapping[str, str]],
    published: Mapping[tuple[str, ...], Published],
) -> list[Table]:
    """Lays numbers out.

    Args:
        label: what people call the part of an entry that belongs to an axis.
        rank: the place of an entry along an axis, where the experiment lists its words; the same for all others.
        header: what holds for all numbers of a table: those under attack, and the clean ones.
        published: what others have measured, by `place`.
    """
    if layout.mean:
        found = [*found, *means(found)]
    tables: list[Table] = []
    for group in _groups(found, layout):
        tables.append(_table(group, layout, label, rank, header, published))
    return tables


def place(entry: Entry) -> tuple[str, ...]:
    """What a number is of, whoever asked: clean numbers have no adversary."""
    none = _ADVERSARY if entry.when == "clean" else ()
    return tuple("" if axis in none else entry.at[axis] for axis in AXES)


def _groups(found: Sequence[Entry], layout: Layout) -> list[list[Entry]]:
    """The numbers of each table. A clean evaluation belongs to every table of its task and limit, or makes one of its
    own where there is none; where its model is in some of them it is in those alone."""
    split = layout.split
    if "attack" in split:  # clean numbers have a table of their own
        found = [_without(entry, layout, _ADVERSARY) if entry.when == "clean" else entry for entry in found]
    own = [entry for entry in found if entry.report.attacked or "attack" in split]
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in own:
        groups.setdefault(tuple(entry.at[axis] for axis in split), []).append(entry)
    there = [axis for axis in split if axis not in _ADVERSARY]
    made = list(groups.values())
    for entry in found if "attack" not in split else ():
        if entry.report.attacked:
            continue
        homes = [group for group in made if all(group[0].at[axis] == entry.at[axis] for axis in there)]
        known = [group for group in homes if any(one.at["model"] == entry.at["model"] for one in group)]
        if not homes:
            groups.setdefault(tuple(entry.at[axis] for axis in split), []).append(entry)
        for group in known or homes:
            group.append(entry)
    return list(groups.values())


def _without(entry: Entry, layout: Layout, axes: Iterable[str]) -> Entry:
    """The entry without these parts, but for those that make rows or columns opposite to the attack."""
    gone = [axis for axis in axes if axis in _beside(layout) or axis not in layout.shown]
    return replace(entry, at={**entry.at, **dict.fromkeys(gone, "")})


def _by_trust(clean: Sequence[Entry], attacked: Sequence[Entry]) -> list[Entry]:
    """Clean numbers in the order in which they are taken: of a clean evaluation with the seed of those who attacked,
    from beside an attack, of a clean evaluation with another seed, which of a random model is another draw."""
    seeds = {one.report.question.get("seed") for one in attacked}

    def rank(entry: Entry) -> int:
        if entry.report.attacked:
            return 1
        return 0 if not seeds or entry.report.question.get("seed") in seeds else 2

    return sorted(clean, key=rank)


def _spread(entry: Entry, attacked: Sequence[Entry], layout: Layout) -> list[Entry]:
    """A clean number in every row or column of its model where somebody attacked, since it belongs to all of them."""
    lacking = [axis for axis in _ADVERSARY if axis in layout.shown and axis not in _beside(layout)]
    if entry.report.attacked or not lacking:
        return [entry]
    same = [axis for axis in layout.shown if axis not in (*_ADVERSARY, "attack")]
    homes = dict.fromkeys(_at(one, lacking) for one in attacked if _at(one, same) == _at(entry, same))
    return [replace(entry, at={**entry.at, **dict(zip(lacking, home, strict=True))}) for home in homes] or [entry]


def _beside(layout: Layout) -> tuple[str, ...]:
    """The axes that make headings together with the attack."""
    return layout.rows if "attack" in layout.rows else layout.columns


def _table(
    group: Sequence[Entry],
    layout: Layout,
    label: Callable[[Entry, str], str],
    rank: Callable[[Entry, str], int],
    header: Callable[[Sequence[Entry], Sequence[Entry]], Mapping[str, str]],
    published: Mapping[tuple[str, ...], Published],
) -> Table:
    attacked, clean = ([one for one in group if one.when == when] for when in ("robust", "clean"))
    clean = _by_trust(clean, attacked)
    listed = [one for entry in clean for one in _spread(_without(entry, layout, _ADVERSARY), attacked, layout)]
    rows, columns = (_ordered([*attacked, *listed], axes, rank) for axes in (layout.rows, layout.columns))
    listed = [*listed, *attacked]
    cells: dict[tuple[tuple[str, ...], tuple[str, ...]], Entry] = {}
    for entry in listed:
        cells.setdefault((_at(entry, layout.rows), _at(entry, layout.columns)), entry)
    best = _best(list(cells.values())) if layout.bold else set[int]()

    def cell(row: tuple[str, ...], column: tuple[str, ...]) -> Cell:
        entry = cells.get((row, column))
        if entry is None:
            return Cell()
        return Cell(entry.rate, published.get(place(entry)), id(entry) in best)

    knowledge, of_rows, of_columns = _knowledge(attacked, layout)
    heads = tuple(
        (
            *(label(entry, axis) for axis in layout.columns[:-1]),
            label(entry, layout.columns[-1]) + of_columns.get(column, ""),
        )
        for column, entry in columns.items()
    )
    lines = tuple(
        (
            joined(label(entry, axis) for axis in layout.rows) + of_rows.get(row, ""),
            tuple(cell(row, column) for column in columns),
        )
        for row, entry in rows.items()
    )
    told = {**header(attacked, clean), **({"knowledge": knowledge} if attacked else {})}
    return Table(_sorted(told), heads, lines, joined(layout.rows), layout)


_HEADER = ("task", "model", "class", "attack", "budget", "score", "n", "limit", "surrogate", "knowledge", "seed")


def _sorted(told: Mapping[str, str]) -> dict[str, str]:
    return {name: told[name] for name in (*_HEADER, *(name for name in told if name not in _HEADER)) if name in told}


_Behind = dict[tuple[str, ...], str]  # what stands behind the labels of some rows or columns


def _knowledge(attacked: Sequence[Entry], layout: Layout) -> tuple[str, _Behind, _Behind]:
    """What the adversary knows: what is said of it above the table, behind the labels of rows, and behind those of
    columns. It stands where it holds for all that is told so: first above, then in the rows, then in the columns."""
    several = list(dict.fromkeys(_known(entry) for entry in attacked))
    if len(several) < 2:
        return "".join(several), {}, {}
    for place, axes in (("rows", layout.rows), ("columns", layout.columns)):
        told: dict[tuple[str, ...], set[str]] = {}
        for entry in attacked:
            told.setdefault(_at(entry, axes), set()).add(_known(entry))
        if all(len(said) == 1 for said in told.values()):
            behind = {at: f" ({next(iter(said))})" for at, said in told.items()}
            return f"differs, see the {place}", behind if place == "rows" else {}, behind if place == "columns" else {}
    return f"differs: {' / '.join(several)}", {}, {}


def _known(entry: Entry) -> str:
    return entry.report.question.get("knowledge", "")


def _at(entry: Entry, axes: Sequence[str]) -> tuple[str, ...]:
    return tuple(entry.at[axis] for axis in axes)


def _ordered(
    listed: Sequence[Entry], axes: Sequence[str], rank: Callable[[Entry, str], int]
) -> dict[tuple[str, ...], Entry]:
    """The rows or columns, each with an entry of it: as the experiment lists their words, or else as they come; the
    means behind."""
    found: dict[tuple[str, ...], Entry] = {}
    for entry in listed:
        found.setdefault(_at(entry, axes), entry)
    seen = {axis: list(dict.fromkeys(entry.at[axis] for entry in listed)) for axis in axes}

    def key(entry: Entry) -> list[tuple[bool, int, int]]:
        return [
            (isinstance(entry.rate, Average) and axis == "task", rank(entry, axis), seen[axis].index(entry.at[axis]))
            for axis in axes
        ]

    return dict(sorted(found.items(), key=lambda item: key(item[1])))


def _best(found: Sequence[Entry]) -> set[int]:
    """The entries (by `id`) that are above those of every other model, all else the same: so that the chance of any
    mistake among the comparisons of one is 5 % (Bonferroni)."""
    apart = [axis for axis in AXES if axis != "model"]
    groups = groupby(sorted(found, key=lambda one: _at(one, apart)), key=lambda one: _at(one, apart))
    best: set[int] = set()
    for _, same in groups:
        one, *others = sorted(same, key=lambda entry: -entry.rate.value)
        level = 1 - (1 - LEVEL) / max(len(others), 1)
        above = [one.minus(other, level) for other in others]
        if others and all(found is not None and found.low > 0.0 for found in above):
            best.add(id(one))
    return best
