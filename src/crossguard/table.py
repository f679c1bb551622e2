"""The reports of a folder as tables, for reading and for machines."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from crossguard import files, reading, words
from crossguard.claims import UNDECIDED, Claim, Judged
from crossguard.compare import Average
from crossguard.errors import CrossguardError
from crossguard.experiment import INDEX
from crossguard.limits import shortly
from crossguard.pivot import CLEAN, Cell, Entry, Layout, Published, Table, entries, joined, pivot, place
from crossguard.printing import one_line, plain
from crossguard.report import NoReportError, Outcomes, Ranks, Rate, Report, ReportError

FORMATS = ("markdown", "csv", "json", "latex")
_LISTED = 3  # files that are not reports; more are counted

# Parts of a question with what their files held: the same word may have read other weights, other data.
_TASK = ("task", "data")
_MODEL = ("model", "weights")  # what makes a row
_SURROGATE = ("surrogate", "surrogate weights")
_ATTACK = ("attack", "attack files")
_BUDGET = ("budget", "budget files")
_FILES: dict[str, str] = dict((_TASK, _MODEL, _SURROGATE, _ATTACK, _BUDGET))
_WORDS = ("task", "model", "attack", "budget", "surrogate")


@dataclass(frozen=True, eq=False)
class Answers:
    """All reports of a folder, the labels of the experiment that asked, and doubts about the folder."""

    reports: tuple[Report, ...]
    labels: Mapping[str, Mapping[str, str]]
    doubts: tuple[str, ...] = ()
    crossed: bool = False  # tables of who was crafted on against who was asked, instead of attacks
    published: Mapping[tuple[str, str], Published] = field(default_factory=dict)  # by the key of a report and its score
    claims: tuple[_Claimed, ...] = ()

    @staticmethod
    def load(folder: str | Path) -> Answers:
        """Reads every report of a folder; what cannot be read is named among the doubts."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CrossguardError(f"there is no folder {folder}; give the one that 'crossguard run' wrote to")
        index = _index(folder / INDEX)
        labels, order = index.labels, index.cells
        found: dict[tuple[str, tuple[str, ...]], Report] = {}  # what two files say alike counts once
        doubts, others = list[str](), list[str]()
        try:
            paths = sorted(path for path in folder.glob("*.json") if path.name != INDEX)
        except OSError as error:
            raise CrossguardError(f"the folder {folder} cannot be read: {files.reason(error)}") from None
        for path in paths:
            try:
                report = Report.load(path)
                found.setdefault((report.key, tuple(report.outcomes.id)), report)
            except NoReportError:
                others.append(path.name)
            except ReportError as error:
                doubts.append(f"left out: {error}.")
        if others:
            more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
            what = "are not reports" if len(others) > 1 else "is not a report"
            doubts.append(f"left out: {', '.join(others[:_LISTED])}{more} in {folder} {what}.")
        if not found:
            broken = f" that can be read ({doubts[0]})" if doubts else ""
            raise CrossguardError(f"there is no report in {folder}{broken}")
        places = {one: place for place, one in enumerate(order)}
        missing = len(places.keys() - {report.key for report in found.values()})
        if missing:
            doubts.append(f"{missing} of {len(order)} cells are not answered yet; run the experiment again to go on.")
        reports = sorted(found.values(), key=lambda report: places.get(report.key, len(places)))
        return Answers(tuple(reports), labels, tuple(doubts), False, index.published, index.claims)

    def pooled(self) -> Answers:
        """The worst case per image over all attacks, surrogates and seeds that met a model within the same budget.

        Carlini et al. 2019 count an image as robust only if no attack breaks it. Reports are pooled where task, model,
        weights, budget and images (by their ids) agree, whatever the limit was; where there are several sets of images,
        each has a worst case of its own.
        """
        limits = self._limits()
        groups: dict[str, dict[tuple[str, ...], list[Report]]] = {}
        pooled, doubts = [], list(self.doubts)
        for report in self.reports:
            ids = tuple(report.outcomes.id)
            same = replace(report, question={**report.question, "limit": limits[_part(report, *_TASK), ids]})
            if report.attacked:
                groups.setdefault(_part(report, *_TASK, *_MODEL, "budget"), {}).setdefault(ids, []).append(same)
            else:
                pooled.append(same)
        for sets in groups.values():
            reports = [_worst(same) for same in sets.values()]
            if len(sets) > 1:
                where = f"{self.label(reports[0], 'model')}, {self.label(reports[0], 'budget')}"
                doubts.append(
                    f"the reports are of {len(sets)} sets of images, which were not pooled with each other [{where}]"
                )
            pooled += reports
        return replace(self, reports=tuple(pooled), doubts=tuple(doubts), published={}, claims=())

    def _limits(self) -> dict[tuple[str, tuple[str, ...]], str]:
        """A limit for each task and set of images: the first that was asked for, with a number if other images have
        it already."""
        limits: dict[tuple[str, tuple[str, ...]], str] = {}
        sets: Counter[str] = Counter()
        for report in self.reports:
            images = _part(report, *_TASK), tuple(report.outcomes.id)
            if images not in limits:
                asked, limit = _part(report, *_TASK, "limit"), _part(report, "limit")
                sets[asked] += 1
                limits[images] = limit if sets[asked] == 1 else f"{limit}, set {sets[asked]}"
        return limits

    def tables(self, layout: Layout | None = None) -> list[Table]:
        """The numbers, laid out: as a row for each model and a column for each attack and budget, if nothing is given,
        in a table for each task, limit, surrogate (and its weights) and seed, in the order of the reports; of a
        retrieval one for each direction.

        Clean accuracy has no adversary, so it is taken from any report of the same task, limit, model and weights, and
        a clean evaluation makes a table of its own only where nothing attacked.
        """
        layout = layout or Layout()
        if self.crossed:
            return self._matrices(layout)
        found = entries(self.reports, _key, "class" in layout.shown)
        if not found:
            raise CrossguardError("there are no classes to tell apart: the reports are of retrievals")
        return pivot(found, layout, self._label, self._rank, partial(self._header, layout), self._places(found))

    def _label(self, entry: Entry, axis: str) -> str:
        """What people call a part of what a number is of."""
        if axis == "task" and isinstance(entry.rate, Average):
            return entry.at["task"]
        if axis == "class":
            names = entry.report.texts.names if entry.report.texts is not None else ()
            label = int(entry.at["class"])
            return names[label] if label < len(names) else str(label)
        if axis == "attack" and entry.when == CLEAN:
            return CLEAN
        return self._labelled.get((axis, entry.at[axis]), entry.at[axis])

    @cached_property
    def _labelled(self) -> dict[tuple[str, str], str]:
        """What people call each part of the questions."""
        return {(axis, _key(report, axis)): self.label(report, axis) for report in self.reports for axis in _WORDS}

    def _rank(self, entry: Entry, axis: str) -> int:
        """The place of a word in the experiment; clean before all, what is not listed behind."""
        if not entry.at[axis] or (axis == "attack" and entry.when == CLEAN):
            return -1
        if axis == "class":
            return int(entry.at["class"])
        listed = self._listed.get(axis, {})
        return listed.get(_part(entry.report, axis), len(listed))

    @cached_property
    def _listed(self) -> dict[str, dict[str, int]]:
        return {axis: {word: place for place, word in enumerate(named)} for axis, named in self.labels.items()}

    def _header(self, layout: Layout, attacked: Sequence[Entry], clean: Sequence[Entry]) -> dict[str, str]:
        """What holds for all numbers of a table."""
        first = (*attacked, *clean)[0]
        header = {axis: self._label(first, axis) for axis in layout.split if axis in ("task", "model", "score")}
        if attacked:
            header |= {axis: self._label(first, axis) for axis in layout.split if axis in ("attack", "budget")}
        elif "attack" in layout.split:
            header["attack"] = CLEAN
        counts = sorted({one.rate.n for one in (*attacked, *clean) if isinstance(one.rate, Rate)})
        if counts and "class" not in layout.shown:
            header["n"] = " and ".join(f"{count}" for count in counts)
            if len(counts) > 1 and "task" in layout.split:
                header["beware"] = "the cells differ in n and are not of the same samples"
        asked = {_part(one.report, *_TASK) for one in (*attacked, *clean)}
        if (
            "limit" in layout.split
            and len({_part(one, "limit") for one in self.reports if _part(one, *_TASK) in asked}) > 1
        ):
            header["limit"] = _part(first.report, "limit")
        if attacked and "surrogate" in layout.split:
            header["surrogate"] = self.label(first.report, "surrogate")
        if "seed" in layout.split:
            header["seed"] = first.report.question.get("seed", "")
        return {name: value for name, value in header.items() if value or name != "score"}

    def _places(self, found: Sequence[Entry]) -> dict[tuple[str, ...], Published]:
        """What others have measured, by what it is a number of."""
        return {
            place(entry): told
            for entry in found
            if (told := self.published.get((entry.report.key, entry.at["score"]))) is not None
            and entry.when == ("robust" if entry.report.attacked else CLEAN)
            and entry.rows is None
        }

    def _matrices(self, layout: Layout) -> list[Table]:
        """One table per task, limit, attack, budget and seed: what is left of each model (columns) when the attack was
        crafted on each of them (rows). The diagonal is the white box."""
        groups: dict[str, list[Report]] = {}
        for report in self.reports:
            if report.attacked:
                groups.setdefault(_part(report, *_TASK, "limit", *_ATTACK, *_BUDGET, "seed"), []).append(report)
        return [
            self._matrix(reports, part, layout) for reports in groups.values() for part in range(len(reports[0].parts))
        ]

    def _matrix(self, reports: list[Report], part: int, layout: Layout) -> Table:
        first = reports[0]
        models = self._models(reports)
        labels = {_part(report, *_MODEL): self.label(report, "model") for report in reports}
        clean: dict[str, Rate] = {}
        rows: dict[str, dict[str, Rate]] = {label: {} for label in labels.values()}
        for report in reports:
            _, before, robust = report.judged.parts[part]
            model = _part(report, *_MODEL)
            clean.setdefault(model, before)
            own = _part(report, "surrogate") in ("None", _part(report, "model"))
            crafted = labels[model] if own else self.label(report, "surrogate")
            rows.setdefault(crafted, {})[model] = robust
        score = first.parts[part][0]
        header = {name: self.label(first, name) for name in ("task", "attack", "budget")}
        header |= ({"score": score} if score else {}) | {"n": str(first.parts[part][1].n)}
        header["seed"] = first.question.get("seed", "")
        listed = [("nobody", clean), *rows.items()]
        return Table(
            header=header,
            heads=tuple((labels[model],) for model in models),
            rows=tuple((label, tuple(Cell(row.get(model)) for model in models)) for label, row in listed if row),
            corner="crafted on",
            layout=layout,
        )

    @property
    def judged(self) -> list[Judged]:
        """What became of the claims of the experiment."""
        found = entries(self.reports, _key, False) if self.claims else []
        return [self._judged(claimed, found) for claimed in self.claims]

    def _judged(self, claimed: _Claimed, found: Sequence[Entry]) -> Judged:
        numbers: list[Entry] = []
        try:
            claim = words.build(claimed["word"])
            if not isinstance(claim, Claim) or len(claim.cells) != len(claimed["cells"]):
                raise CrossguardError(f"{shortly(claimed['word'])} is no claim about its cells")
            for name, (key, score) in zip(claim.cells, claimed["cells"], strict=True):
                there = [one for one in found if one.report.key == key and (one.when == CLEAN) != one.report.attacked]
                there = [one for one in there if score in ("", one.at["score"])]
                if not there:
                    raise CrossguardError(f"'{name}' is not answered yet")
                if len(there) > 1:
                    scores = " or ".join(f"'{one.at['score']}'" for one in there)
                    raise CrossguardError(f"'{name}' has several numbers; add {scores}")
                numbers += there
        except CrossguardError as error:
            return Judged(claimed["name"], UNDECIDED, str(error))
        verdict, why = claim.judge(numbers)
        return Judged(claimed["name"], verdict, why)

    def notes(self) -> list[str]:
        """Every warning once, with the cell that it is about, or how many."""
        about: dict[str, list[str]] = {}
        for report in self.reports:
            where = ", ".join(
                self.label(report, part) for part in ("model", "attack", "budget") if _part(report, part) != "None"
            )
            for note in (*report.notes, *_of_texts(report)):
                about.setdefault(note, []).append(where)
        listed = [
            f"{note} [{where[0] if len(where) == 1 else f'{len(where)} of {len(self.reports)} reports'}]"
            for note, where in about.items()
        ]
        return [*listed, *self.doubts]

    def label(self, report: Report, part: str) -> str:
        """A word of a question for people: the experiment's label, or the word without its defaults; with the start of
        the fingerprint of its files where the folder has the word with several."""
        full = _part(report, part)
        label = self.labels.get(part, {}).get(full) or report.short.get(part, full)
        told = report.question.get(_FILES.get(part, ""), "").split()
        if part == "attack" and report.asked is not None:
            label += ", after the others"  # what is left after all of them, in an audit
        several = self._held.get((part, full), set())
        own = [one.rpartition(":")[2][:8] for one in told if any(one not in other for other in several)]
        return f"{label} ({', '.join(own)})" if own else label

    @cached_property
    def _held(self) -> Mapping[tuple[str, str], set[tuple[str, ...]]]:
        """The fingerprints of the files that each word was read with."""
        found: dict[tuple[str, str], set[tuple[str, ...]]] = {}
        for report in self.reports:
            for part, held in _FILES.items():
                told = tuple(report.question.get(held, "").split())
                found.setdefault((part, _part(report, part)), set()).add(told)
        return found

    def records(self) -> list[dict[str, Any]]:
        """One flat record per report, for machines: labels, counts, rates and intervals."""
        return [
            {part: self.label(report, part) for part in _WORDS}
            | {part: report.question.get(part, "") for part in ("knowledge", "seed", "limit")}
            | {"n": report.n}
            | {name: number for what, rate in self._rates(report) for name, number in _rate(what, rate).items()}
            | {"seconds": round(report.seconds, 3), "loading": round(report.loading, 3)}
            | {f"{part} word": report.question.get(part, "None") for part in _WORDS}
            | self._published(report)
            for report in self.reports
        ]

    def _published(self, report: Report) -> dict[str, Any]:
        """What others have measured of the same."""
        found: dict[str, Any] = {}
        for (key, score), told in self.published.items():
            if key == report.key:
                name = f"{score} published".lstrip()
                found |= {name: told.value, f"{name} source": told.source}
        return found

    @staticmethod
    def _rates(report: Report) -> list[tuple[str, Rate]]:
        """What a record says of a report: clean and, where somebody attacked, robust; of a retrieval all it knows."""
        return [(name, rate) for name, rate in report.rates.items() if name != "adversarial"]

    def _models(self, reports: list[Report]) -> list[str]:
        """The models with their weights, as the experiment lists them, then the others."""
        present = {_part(report, *_MODEL): _part(report, "model") for report in reports}
        listed = list(self.labels.get("model", {}))
        return sorted(present, key=lambda one: listed.index(present[one]) if present[one] in listed else len(listed))


def _of_texts(report: Report) -> list[str]:
    """What the interval of an attack on class prompts does not count."""
    prompts = 0 if report.texts is None else report.texts.prompts
    return [
        f"rests on {prompts} rewritten prompts, however many images were asked about, so its interval says little"
    ] * (prompts > 0)


def worst(outcomes: Sequence[Outcomes | Ranks]) -> Outcomes | Ranks:
    """What is left of each sample after all of these, which are of the same samples."""
    return outcomes[0].worst(outcomes)


def _worst(reports: list[Report]) -> Report:
    """One report of what is left of each image after all of these: the first attack that broke it, or else the one
    that came nearest."""
    first = reports[0]
    attack = "worst case"
    count = f"{len(reports)} report{'s' * (len(reports) > 1)}"
    (known, *others) = dict.fromkeys(report.question.get("knowledge", "") for report in reports)
    known = f"{'several adversaries' if others else known}, {count}"
    question = {**first.question, "attack": attack, "knowledge": known}
    for part in ("surrogate", "seed"):
        if len({_key(report, part) for report in reports}) > 1:
            question[part] = "pooled"
            question.pop(_FILES.get(part, ""), None)
    question.pop(_ATTACK[1], None)
    notes = tuple(dict.fromkeys(note for report in reports for note in report.notes))
    return Report(
        question=question,
        outcomes=worst([report.judged for report in reports]),
        notes=notes,
        versions=first.versions,
        seconds=sum(report.seconds for report in reports),
        short={**first.short, "attack": attack, "surrogate": question["surrogate"]},
    )


def render(answers: Answers, form: str, layout: Layout | None = None) -> str:
    """The answers as text: markdown and latex for reading, csv and json with a record per report."""
    layout = layout or Layout()
    if form == "markdown":
        return _markdown(answers, layout)
    if form == "latex":
        return _latex(answers, layout)
    if form == "csv":
        return _csv(answers)
    if form == "json":
        full = [
            {
                **record,
                "question": dict(report.question),
                "notes": list(report.notes),
                "versions": dict(report.versions),
            }
            for record, report in zip(answers.records(), answers.reports, strict=True)
        ]
        judged = [one._asdict() for one in answers.judged]
        content = {"reports": full, "doubts": list(answers.doubts)} | ({"claims": judged} if judged else {})
        return json.dumps(content, indent=2) + "\n"
    raise CrossguardError(f"unknown format {form!r}; give one of {', '.join(FORMATS)}")


def pretty(answers: Answers, layout: Layout | None = None) -> RenderableType:
    """The answers for a terminal."""
    shown: list[RenderableType] = []
    for table in answers.tables(layout):
        grid = RichTable(
            title=_text(table.caption), title_justify="left", caption=_text(table.legend), caption_justify="left"
        )
        grid.add_column(_text(table.corner), overflow="fold")
        for column in table.columns:
            grid.add_column(_text(column), justify="right", overflow="fold")
        for (_, cells), (label, *said) in zip(table.rows, table.cells, strict=True):
            numbers = zip(said, cells, strict=True)
            grid.add_row(_text(label), *(_text(one, "bold" if cell.best else "") for one, cell in numbers))
        shown.append(grid)
    shown.extend(_text(str(one)) for one in answers.judged)
    shown.extend(_text(f"- {note}") for note in answers.notes())
    return Group(*shown)


def _text(text: str, style: str = "") -> Text:
    return Text(plain(text), style)


def _markdown(answers: Answers, layout: Layout) -> str:
    lines = []
    for table in answers.tables(layout):
        lines += [in_markdown(table.caption), ""]
        lines.append(_row([table.corner, *table.columns]))
        lines.append("|" + "---|" + "---:|" * len(table.columns))
        for (_, cells), (label, *said) in zip(table.rows, table.cells, strict=True):
            text, *more = (in_markdown(one) for one in (label, *said))
            marked = [text, *(f"**{one}**" if cell.best else one for one, cell in zip(more, cells, strict=True))]
            lines.append(f"| {' | '.join(marked)} |")
        lines += ["", f"{in_markdown(table.legend)}.", ""]
    lines += [f"- {in_markdown(str(one))}" for one in answers.judged]
    lines += [f"- {in_markdown(note)}" for note in answers.notes()]
    return "\n".join(lines).rstrip("\n") + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(in_markdown(cell) for cell in cells) + " |"


def in_markdown(text: str) -> str:
    """The text as markdown shows it: no markup, no link, no end of a cell."""
    return re.sub(r"([\\|*_`<]|\](?=[(\[:]))", r"\\\1", one_line(text))


def _csv(answers: Answers) -> str:
    records = answers.records()
    text = io.StringIO()
    names = dict.fromkeys(name for record in records for name in record)
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _in_csv(value) for name, value in record.items()} for record in records)
    return text.getvalue()


_FORMULA = "=+-@＝＋－＠"  # spreadsheets compute a cell that begins so
_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?(e[-+]?[0-9]+)?", re.ASCII | re.IGNORECASE)


def _in_csv(value: Any) -> Any:
    """A value as a cell that no spreadsheet computes: where a text that is no number begins as a formula does, an
    apostrophe goes before it, as the OWASP project advises against CSV injection."""
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text.lstrip().startswith(tuple(_FORMULA)) and not _NUMBER.fullmatch(text) else text


def _latex(answers: Answers, layout: Layout) -> str:
    """Tables as papers print them, with the lines of the package booktabs. What makes the columns in two parts, as
    attack and budget do, stands in two lines of headings."""
    lines = ["% \\usepackage{booktabs}"]
    for table in answers.tables(layout):
        lines += [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{_in_latex(table.caption)}. Numbers in \\%: {_in_latex(table.legend)}.}}",
            f"\\begin{{tabular}}{{l{'r' * len(table.heads)}}}",
            "\\toprule",
            *_heads(table),
            "\\midrule",
        ]
        for label, cells in table.rows:
            said = [_in_latex(table.text(cell, unit="")) for cell in cells]
            marked = [f"\\textbf{{{one}}}" if cell.best else one for one, cell in zip(said, cells, strict=True)]
            lines.append(" & ".join([_in_latex(label), *marked]) + " \\\\")
        lines += ["\\bottomrule", "\\end{tabular}", "\\end{table}", ""]
    lines += [f"% {_in_latex(str(one))}" for one in answers.judged]
    lines += [f"% {_in_latex(note)}" for note in answers.notes()]
    return "\n".join(lines).rstrip("\n") + "\n"


def _heads(table: Table) -> list[str]:
    """The headings in LaTeX: in two lines where each column has two parts and some share the first."""
    corner = _in_latex(table.corner)
    groups = [(upper, [head[1:] for head in same]) for upper, same in groupby(table.heads, lambda head: head[0])]
    if len(groups) == len(table.heads):
        return [" & ".join([corner, *map(_in_latex, table.columns)]) + " \\\\"]
    upper, rules, at = [""], list[str](), 2
    for name, same in groups:
        said = _in_latex(name)
        upper.append(f"\\multicolumn{{{len(same)}}}{{c}}{{{said}}}" if len(same) > 1 else said)
        if len(same) > 1:
            rules.append(f"\\cmidrule(lr){{{at}-{at + len(same) - 1}}}")
        at += len(same)
    lower = [corner, *(_in_latex(joined(head)) for _, same in groups for head in same)]
    return [" & ".join(upper) + " \\\\", " ".join(rules), " & ".join(lower) + " \\\\"]


_LATEX = {sign: f"\\{sign}" for sign in "&%$#_{}"}
_LATEX |= {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
_LATEX |= {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}


def _in_latex(text: str) -> str:
    """The text as LaTeX typesets it. What begins with `[` or `*` would be taken for an option of the line end before
    it."""
    text = "".join(_LATEX.get(sign, sign) for sign in one_line(text))
    return f"{{}}{text}" if text[:1] in ("[", "*") else text


def _rate(name: str, rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    return {name: round(rate.value, 6), f"{name}_low": round(low, 6), f"{name}_high": round(high, 6)}


def _key(report: Report, axis: str) -> str:
    """What tells the parts of questions apart along an axis: the word, and what its files held; of an attack also
    whether others went before it, since its number is then of what all of them leave."""
    told = _part(report, axis, *([_FILES[axis]] if axis in _FILES else []))
    return f"{told}\nafter" if axis == "attack" and report.asked is not None else told


def _part(report: Report, *parts: str) -> str:
    return "\n".join(report.question.get(part, "None") for part in parts)


class _Claimed(TypedDict):
    """A claim as the index of an experiment holds it: its word, and the key and score of each cell."""

    name: str
    word: str
    cells: list[list[str]]


class _Said(TypedDict):
    cell: str
    score: str
    value: float
    source: str


class _Beside(TypedDict, total=False):
    published: list[_Said]
    claims: list[_Claimed]


class _Index(_Beside):
    """What is read of the index that an experiment writes."""

    labels: dict[str, dict[str, str]]
    cells: list[str]


class _Indexed(NamedTuple):
    labels: Mapping[str, Mapping[str, str]]
    cells: Sequence[str]
    published: Mapping[tuple[str, str], Published]
    claims: tuple[_Claimed, ...]


def _index(path: Path) -> _Indexed:
    """The labels by full word, the names of the cells, and what stands beside them; nothing, if no experiment wrote to
    the folder."""
    try:
        content: Any = reading.read_json(path, _Index, "run the experiment again")
    except CrossguardError:
        return _Indexed({}, [], {}, ())
    labels = {kind: {word: label for label, word in axis.items()} for kind, axis in content["labels"].items()}
    published = {
        (one["cell"], one["score"]): Published(float(one["value"]), one["source"])
        for one in content.get("published", [])
    }
    claims = tuple(one for one in content.get("claims", []) if all(len(cell) == 2 for cell in one["cells"]))
    return _Indexed(labels, content["cells"], published, claims)
