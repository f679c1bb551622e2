"""The reports of a folder as a table: a row per model, a column per attack and budget."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from crossguard import files, reading
from crossguard.errors import CrossguardError
from crossguard.experiment import INDEX
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


@dataclass(frozen=True)
class Table:
    """Numbers that may be compared: one task, one limit, one surrogate, one seed.

    Args:
        header: what holds for every number, by name.
        columns: `clean`, then one heading per attack and budget.
        rows: the label of a model and a cell per column; None where nothing was asked.
        corner: what the rows are.
    """

    header: Mapping[str, str]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Rate | None, ...]], ...]
    corner: str = "model"

    @property
    def cells(self) -> list[list[str]]:
        """The texts of the table without its headings; a cell says its n if the cells differ in it."""
        differ = len({rate.n for _, rates in self.rows for rate in rates if rate}) > 1
        return [[label, *(_cell(rate, differ) for rate in rates)] for label, rates in self.rows]

    @property
    def caption(self) -> str:
        return "; ".join(f"{name}: {value}" for name, value in self.header.items())

    @property
    def legend(self) -> str:
        rate = (
            "recall [95 % interval by bootstrap over images]"
            if "score" in self.header
            else "accuracy [95 % Wilson interval]"
        )
        attacked = any(column != "clean" for column in self.columns)
        return f"{rate}; robust = right both clean and under attack" if attacked else rate


@dataclass(frozen=True, eq=False)
class Answers:
    """All reports of a folder, the labels of the experiment that asked, and doubts about the folder."""

    reports: tuple[Report, ...]
    labels: Mapping[str, Mapping[str, str]]
    doubts: tuple[str, ...] = ()
    crossed: bool = False  # tables of who was crafted on against who was asked, instead of attacks

    @staticmethod
    def load(folder: str | Path) -> Answers:
        """Reads every report of a folder; what cannot be read is named among the doubts."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CrossguardError(f"there is no folder {folder}; give the one that 'crossguard run' wrote to")
        labels, order = _index(folder / INDEX)
        reports, doubts, others = {}, [], []
        try:
            paths = sorted(path for path in folder.glob("*.json") if path.name != INDEX)
        except OSError as error:
            raise CrossguardError(f"the folder {folder} cannot be read: {files.reason(error)}") from None
        for path in paths:
            try:
                reports[path.stem] = Report.load(path)
            except NoReportError:
                others.append(path.name)
            except ReportError as error:
                doubts.append(f"left out: {error}.")
        if others:
            more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
            what = "are not reports" if len(others) > 1 else "is not a report"
            doubts.append(f"left out: {', '.join(others[:_LISTED])}{more} in {folder} {what}.")
        if not reports:
            broken = f" that can be read ({doubts[0]})" if doubts else ""
            raise CrossguardError(f"there is no report in {folder}{broken}")
        missing = len([one for one in order if one not in reports])
        if missing:
            doubts.append(f"{missing} of {len(order)} cells are not answered yet; run the experiment again to go on.")
        first = [reports.pop(one) for one in order if one in reports]
        return Answers((*first, *reports.values()), labels, tuple(doubts))

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
        return replace(self, reports=tuple(pooled), doubts=tuple(doubts))

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

    def tables(self) -> list[Table]:
        """One table per task, limit, surrogate (and its weights) and seed, in the order of the reports; of a retrieval
        one for each direction.

        Clean accuracy has no adversary, so it is taken from any report of the same task, limit, model and weights, and
        a clean evaluation makes a table of its own only where nothing attacked.
        """
        if self.crossed:
            return self._matrices()
        attacked = [report for report in self.reports if report.attacked]
        covered = {_part(report, *_TASK, "limit", *_MODEL) for report in attacked}
        groups: dict[str, list[Report]] = {}
        for report in attacked:
            groups.setdefault(_part(report, *_TASK, "limit", *_SURROGATE, "seed"), []).append(report)
        for report in self.reports:
            if not report.attacked:
                self._place_clean(report, groups, _part(report, *_TASK, "limit", *_MODEL) in covered)
        return [
            self._table(reports, part) for reports in groups.values() for part in range(len(reports[0].outcomes.parts))
        ]

    def _place_clean(self, report: Report, groups: dict[str, list[Report]], covered: bool) -> None:
        """A clean evaluation is a row of every table of its task and limit, or of a table of its own."""
        homes = [
            group for group in groups.values() if _part(group[0], *_TASK, "limit") == _part(report, *_TASK, "limit")
        ]
        if not homes:
            groups[_part(report, *_TASK, "limit")] = [report]
        for group in homes:
            if not covered or _part(report, *_MODEL) in {_part(one, *_MODEL) for one in group}:
                group.append(report)

    def _table(self, reports: list[Report], part: int) -> Table:
        columns: dict[str, str] = {}
        rows: dict[str, dict[str, Rate]] = {model: {} for model in self._models(reports)}
        for report in reports:
            row = rows[_part(report, *_MODEL)]
            _, clean, robust = report.judged.parts[part]
            if not report.attacked:
                row["clean"] = clean
                continue
            row.setdefault("clean", clean)
            column = _part(report, *_ATTACK, *_BUDGET)
            columns[column] = f"{self.label(report, 'attack')}, {self.label(report, 'budget')}"
            row[column] = robust
        knowledge = {
            _part(report, *_MODEL): report.question.get("knowledge", "") for report in reports if report.attacked
        }
        same = len(set(knowledge.values())) < 2
        labels = {_part(report, *_MODEL): self.label(report, "model") for report in reports}
        first = next((report for report in reports if report.attacked), reports[0])
        counts = sorted({rate.n for row in rows.values() for rate in row.values()})
        score = first.parts[part][0]
        header = {"task": self.label(first, "task")} | ({"score": score} if score else {})
        header |= {"n": " and ".join(f"{count}" for count in counts)}
        limits = {_part(one, "limit") for one in self.reports if _part(one, *_TASK) == _part(first, *_TASK)}
        if len(limits) > 1:
            header["limit"] = _part(first, "limit")
        if first.attacked:
            header["surrogate"] = self.label(first, "surrogate")
            header["knowledge"] = knowledge[_part(first, *_MODEL)] if same else "differs, see the rows"
        header["seed"] = first.question.get("seed", "")
        if len(counts) > 1:
            header["beware"] = "the cells differ in n and are not of the same samples"
        return Table(
            header=header,
            columns=("clean", *columns.values()),
            rows=tuple(
                (
                    labels[model] if same or model not in knowledge else f"{labels[model]} ({knowledge[model]})",
                    tuple(row.get(column) for column in ("clean", *columns)),
                )
                for model, row in rows.items()
            ),
        )

    def _matrices(self) -> list[Table]:
        """One table per task, limit, attack, budget and seed: what is left of each model (columns) when the attack was
        crafted on each of them (rows). The diagonal is the white box."""
        groups: dict[str, list[Report]] = {}
        for report in self.reports:
            if report.attacked:
                groups.setdefault(_part(report, *_TASK, "limit", *_ATTACK, *_BUDGET, "seed"), []).append(report)
        return [self._matrix(reports, part) for reports in groups.values() for part in range(len(reports[0].parts))]

    def _matrix(self, reports: list[Report], part: int) -> Table:
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
            columns=tuple(labels[model] for model in models),
            rows=tuple((label, tuple(row.get(model) for model in models)) for label, row in listed if row),
            corner="crafted on",
        )

    def notes(self) -> list[str]:
        """Every warning once, with the cell that it is about, or how many."""
        about: dict[str, list[str]] = {}
        for report in self.reports:
            where = ", ".join(
                self.label(report, part) for part in ("model", "attack", "budget") if _part(report, part) != "None"
            )
            for note in report.notes:
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
            {part: self.label(report, part) for part in ("task", "model", "attack", "budget", "surrogate")}
            | {part: report.question.get(part, "") for part in ("knowledge", "seed", "limit")}
            | {"n": report.n}
            | {name: number for what, rate in self._rates(report) for name, number in _rate(what, rate).items()}
            | {"seconds": round(report.seconds, 3)}
            for report in self.reports
        ]

    @staticmethod
    def _rates(report: Report) -> list[tuple[str, Rate]]:
        """What a record says of a report: clean and, where somebody attacked, robust; of a retrieval all it knows."""
        return [(name, rate) for name, rate in report.rates.items() if name != "adversarial"]

    def _models(self, reports: list[Report]) -> list[str]:
        """The models with their weights, as the experiment lists them, then the others."""
        present = {_part(report, *_MODEL): _part(report, "model") for report in reports}
        listed = list(self.labels.get("model", {}))
        return sorted(present, key=lambda one: listed.index(present[one]) if present[one] in listed else len(listed))


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
    question = {**first.question, "attack": attack, "surrogate": "pooled", "seed": "pooled", "knowledge": known}
    for held in (_SURROGATE[1], _ATTACK[1]):
        question.pop(held, None)
    notes = tuple(dict.fromkeys(note for report in reports for note in report.notes))
    return Report(
        question=question,
        outcomes=worst([report.judged for report in reports]),
        notes=notes,
        versions=first.versions,
        seconds=sum(report.seconds for report in reports),
        short={**first.short, "attack": attack, "surrogate": "pooled"},
    )


def render(answers: Answers, form: str) -> str:
    """The answers as text: markdown and latex for reading, csv and json with a record per report."""
    if form == "markdown":
        return _markdown(answers)
    if form == "latex":
        return _latex(answers)
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
        return json.dumps({"reports": full, "doubts": list(answers.doubts)}, indent=2) + "\n"
    raise CrossguardError(f"unknown format {form!r}; give one of {', '.join(FORMATS)}")


def pretty(answers: Answers) -> RenderableType:
    """The answers for a terminal."""
    shown: list[RenderableType] = []
    for table in answers.tables():
        grid = RichTable(
            title=_text(table.caption), title_justify="left", caption=_text(table.legend), caption_justify="left"
        )
        grid.add_column(_text(table.corner), overflow="fold")
        for column in table.columns:
            grid.add_column(_text(column), justify="right", overflow="fold")
        for row in table.cells:
            grid.add_row(*map(_text, row))
        shown.append(grid)
    shown.extend(_text(f"- {note}") for note in answers.notes())
    return Group(*shown)


def _text(text: str) -> Text:
    return Text(plain(text))


def _markdown(answers: Answers) -> str:
    lines = []
    for table in answers.tables():
        lines += [in_markdown(table.caption), ""]
        lines.append(_row([table.corner, *table.columns]))
        lines.append("|" + "---|" + "---:|" * len(table.columns))
        lines += [_row(row) for row in table.cells]
        lines += ["", f"{table.legend}.", ""]
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


def _latex(answers: Answers) -> str:
    lines = []
    for table in answers.tables():
        lines += [
            f"% {_in_latex(table.caption)}",
            f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            "\\hline",
        ]
        lines.append(" & ".join(_in_latex(cell) for cell in (table.corner, *table.columns)) + " \\\\")
        lines.append("\\hline")
        lines += [" & ".join(_in_latex(cell) for cell in row) + " \\\\" for row in table.cells]
        lines += ["\\hline", "\\end{tabular}", ""]
    lines += [f"% {_in_latex(note)}" for note in answers.notes()]
    return "\n".join(lines).rstrip("\n") + "\n"


_LATEX = {sign: f"\\{sign}" for sign in "&%$#_{}"}
_LATEX |= {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
_LATEX |= {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}


def _in_latex(text: str) -> str:
    """The text as LaTeX typesets it. What begins with `[` or `*` would be taken for an option of the line end before
    it."""
    text = "".join(_LATEX.get(sign, sign) for sign in one_line(text))
    return f"{{}}{text}" if text[:1] in ("[", "*") else text


def _cell(rate: Rate | None, with_n: bool) -> str:
    if rate is None:
        return "-"
    return f"{rate} (n={rate.n})" if with_n else str(rate)


def _rate(name: str, rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    return {name: round(rate.value, 6), f"{name}_low": round(low, 6), f"{name}_high": round(high, 6)}


def _part(report: Report, *parts: str) -> str:
    return "\n".join(report.question.get(part, "None") for part in parts)


class _Index(TypedDict):
    """What is read of the index that an experiment writes."""

    labels: dict[str, dict[str, str]]
    cells: list[str]


def _index(path: Path) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The labels by full word, and the names of the cells; nothing, if no experiment wrote to the folder."""
    try:
        content = reading.read_json(path, _Index, "run the experiment again")
    except CrossguardError:
        return {}, []
    labels = {kind: {word: label for label, word in axis.items()} for kind, axis in content["labels"].items()}
    return labels, content["cells"]
